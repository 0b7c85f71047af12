"""Tickets, leases and releases, one fact a test."""

import pytest
from handover_model import Clock

from kvstore.handover.chunk import Chunk, ChunkState
from kvstore.handover.exporter import Announce, CancelRequest, Expired, ExportLedger, ExportLimits, ReleaseBlocks
from kvstore.handover.ticket import ticket_id
from pdserve.engine.base import ExportedChunk
from pdserve.errors import FingerprintMismatch, TicketRefused

FP = b"f" * 16
LIMITS = ExportLimits(lease_s=30.0, compute_s=100.0, hold_s=200.0)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(clock: Clock) -> ExportLedger:
    return ExportLedger("p0", 7, FP, "127.0.0.1:1", clock=clock, limits=LIMITS)


def chunk(index: int, final: bool = False, handle: int = 1) -> ExportedChunk:
    return ExportedChunk(handle, index, index * 16, 16, (index,), (5,), final)


def export(ledger: ExportLedger, index: int, final: bool = False) -> Announce:
    (action,) = ledger.exported(chunk(index, final), [bytes(16)])
    assert isinstance(action, Announce)
    return action


def test_the_ticket_comes_with_the_first_announcement_only(ledger: ExportLedger) -> None:
    ticket = ledger.open(1, "r1", 32)
    first, second = export(ledger, 0), export(ledger, 1, final=True)
    assert (first.ticket, second.ticket) == (ticket, None)
    assert {first.manifest.ticket_id, second.manifest.ticket_id} == {ticket_id(ticket.nonce)}
    assert (second.manifest.blocks, second.manifest.generations, second.manifest.final) == ((1,), (5,), True)


def test_nonces_differ_and_have_16_bytes(ledger: ExportLedger) -> None:
    nonces = {ledger.open(h, f"r{h}", 1).nonce for h in range(50)}
    assert len(nonces) == 50
    assert {len(n) for n in nonces} == {16}


def test_states_follow_the_chunk(ledger: ExportLedger) -> None:
    ticket = ledger.open(1, "r1", 32)
    assert ledger.state(1) is ChunkState.COMPUTING
    export(ledger, 0, final=True)
    assert ledger.state(1) is ChunkState.EXPORTED
    ledger.bind(ticket.nonce, 7, "d0", 1, FP)
    assert ledger.state(1) is ChunkState.PULLING
    assert ledger.release(ticket.nonce, [0]) == [ReleaseBlocks(1, 0)]
    assert 1 not in ledger


def test_binding_again_is_the_same_and_another_worker_is_refused(ledger: ExportLedger) -> None:
    nonce = ledger.open(1, "r1", 32).nonce
    assert ledger.bind(nonce, 7, "d0", 1, FP) == ledger.bind(nonce, 7, "d0", 1, FP) == 30_000
    for worker, incarnation in (("d1", 1), ("d0", 2)):
        with pytest.raises(TicketRefused, match="another decode worker"):
            ledger.bind(nonce, 7, worker, incarnation, FP)


def test_bind_checks_nonce_incarnation_and_fingerprint_and_stays_unbound(ledger: ExportLedger) -> None:
    nonce = ledger.open(1, "r1", 32).nonce
    with pytest.raises(TicketRefused, match="unknown"):
        ledger.bind(bytes(16), 7, "d0", 1, FP)
    with pytest.raises(TicketRefused, match="incarnation"):
        ledger.bind(nonce, 6, "d0", 1, FP)
    with pytest.raises(FingerprintMismatch):
        ledger.bind(nonce, 7, "d0", 1, b"x" * 16)
    assert ledger.bind(nonce, 7, "another", 1, FP) == 30_000


def test_an_unbound_ticket_lives_while_prefill_computes_then_expires(ledger: ExportLedger, clock: Clock) -> None:
    nonce = ledger.open(1, "r1", 32).nonce
    for index in range(3):
        clock.now += 60.0
        assert ledger.tick() == []
        export(ledger, index, final=index == 2)
    clock.now += 29.0
    assert ledger.tick() == []
    clock.now += 1.0
    with pytest.raises(TicketRefused):
        ledger.bind(nonce, 7, "d0", 1, FP)
    cancel, expired = ledger.tick()
    assert cancel == CancelRequest(1)
    assert isinstance(expired, Expired)
    assert "no decode worker" in expired.error.message
    assert len(ledger) == 0


def test_prefill_that_exports_nothing_expires(ledger: ExportLedger, clock: Clock) -> None:
    ledger.open(1, "r1", 32)
    clock.now += 100.0
    assert [type(a) for a in ledger.tick()] == [CancelRequest, Expired]


def test_a_bound_decode_worker_that_falls_silent_loses_its_lease(ledger: ExportLedger, clock: Clock) -> None:
    nonce = ledger.open(1, "r1", 32).nonce
    export(ledger, 0)
    ledger.bind(nonce, 7, "d0", 1, FP)
    for _ in range(2):
        clock.now += 25.0
        ledger.renew(nonce)
        assert ledger.tick() == []
    clock.now += 30.0
    assert [type(a) for a in ledger.tick()] == [CancelRequest, Expired]
    with pytest.raises(TicketRefused):
        ledger.renew(nonce)


def test_renewals_cannot_hold_a_complete_prompt_for_ever(ledger: ExportLedger, clock: Clock) -> None:
    nonce = ledger.open(1, "r1", 16).nonce
    export(ledger, 0, final=True)
    ledger.bind(nonce, 7, "d0", 1, FP)
    for _ in range(9):
        clock.now += 20.0
        ledger.renew(nonce)
        assert ledger.tick() == []
    clock.now += 20.0
    assert [type(a) for a in ledger.tick()] == [CancelRequest, Expired]


def test_release_is_idempotent(ledger: ExportLedger) -> None:
    nonce = ledger.open(1, "r1", 48).nonce
    export(ledger, 0)
    export(ledger, 1)
    assert ledger.release(nonce, [0, 9]) == [ReleaseBlocks(1, 0)]
    assert ledger.release(nonce, [0]) == []
    assert ledger.release(nonce) == [ReleaseBlocks(1, 1)]
    assert ledger.release(nonce) == []


def test_after_release_of_all_later_chunks_are_freed_at_once_and_nobody_may_bind(ledger: ExportLedger) -> None:
    nonce = ledger.open(1, "r1", 48).nonce
    export(ledger, 0)
    ledger.release(nonce)
    with pytest.raises(TicketRefused):
        ledger.bind(nonce, 7, "d0", 1, FP)
    assert ledger.exported(chunk(1), [bytes(16)]) == [ReleaseBlocks(1, 1)]
    assert 1 in ledger, "prefill still computes its first token"
    assert ledger.exported(chunk(2, final=True), [bytes(16)]) == [ReleaseBlocks(1, 2)]
    assert 1 not in ledger


def test_cancel_frees_in_any_state_once(ledger: ExportLedger) -> None:
    nonce = ledger.open(1, "r1", 48).nonce
    export(ledger, 0)
    ledger.bind(nonce, 7, "d0", 1, FP)
    assert ledger.cancel(1) == [CancelRequest(1)]
    assert ledger.cancel(1) == []
    assert ledger.release(nonce) == []
    assert ledger.exported(chunk(1), [bytes(16)]) == [ReleaseBlocks(1, 1)], "a step that was under way"


def test_an_open_handle_cannot_be_opened_again(ledger: ExportLedger) -> None:
    ledger.open(1, "r1", 48)
    with pytest.raises(ValueError, match="open already"):
        ledger.open(1, "r1", 48)


def test_chunks_out_of_order_are_a_bug(ledger: ExportLedger) -> None:
    ledger.open(1, "r1", 48)
    with pytest.raises(RuntimeError, match="where 0 was due"):
        ledger.exported(chunk(1), [bytes(16)])


@pytest.mark.parametrize("old", list(ChunkState))
@pytest.mark.parametrize("new", list(ChunkState))
def test_only_the_next_state_or_the_end_may_follow(old: ChunkState, new: ChunkState) -> None:
    c = Chunk(0)
    c.state = old
    if old is not ChunkState.FREED and (new - old == 1 or new is ChunkState.FREED):
        c.to(new)
        assert c.state is new
    else:
        with pytest.raises(RuntimeError, match="cannot go from"):
            c.to(new)
