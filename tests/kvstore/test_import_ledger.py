"""Pulls, credits, retries and ends, one fact a test."""

from dataclasses import replace

import pytest
from handover_model import Clock

from kvstore.handover import actions as act
from kvstore.handover.importer import ImportLedger
from kvstore.handover.incoming import ImportLimits
from kvstore.handover.ticket import ticket_id
from pdserve.engine.base import ImportTarget
from pdserve.errors import (
    FingerprintMismatch,
    HandoverError,
    PeerLost,
    RequestCancelled,
    StaleBlock,
    TicketRefused,
    TransferTimeout,
)
from pdserve.types import KVManifest, KVTicket
from pdserve.wire.session import FirstOutput

FP = b"f" * 16
OUT = [FirstOutput((42,), False)]
LIMITS = ImportLimits(announce_s=60.0, room_s=40.0, bind_s=10.0, pull_s=50.0, max_bytes_in_flight=300)


def ticket(number: int = 1, tokens: int = 32, fingerprint: bytes = FP) -> KVTicket:
    return KVTicket("r", "p0", 7, bytes([number] * 16), fingerprint, "127.0.0.1:1", 30_000, tokens)


def manifest(index: int, final: bool = False, t: KVTicket | None = None, first: int | None = None) -> KVManifest:
    first = index * 16 if first is None else first
    of = ticket_id((t or ticket()).nonce)
    return KVManifest(index, first, 16, (index,), (1,), (bytes(16),), final, ticket_id=of)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(clock: Clock) -> ImportLedger:
    return ImportLedger(FP, 16, 100, clock=clock, limits=LIMITS)


def reserve(ledger: ImportLedger, handle: int, index: int, cached: int = 0) -> list[act.ImportAction]:
    return ledger.reserved(act.Reserve(handle, index, index * 16, 16), ImportTarget((50 + index,), cached))


def start(ledger: ImportLedger, handle: int = 1, t: KVTicket | None = None) -> act.Pull:
    """Expect, relay chunk 0 of 2, reserve, bind: returns the pull."""
    t = t or ticket()
    ledger.expect(handle, 32)
    assert ledger.relay(handle, t, [manifest(0, t=t)]) == [act.Reserve(handle, 0, 0, 16)]
    assert reserve(ledger, handle, 0) == [act.Bind(handle, t)]
    (pull,) = ledger.bound(handle, t.nonce)
    assert isinstance(pull, act.Pull)
    return pull


def test_a_request_goes_from_ticket_to_resume(ledger: ImportLedger) -> None:
    pull = start(ledger)
    assert (pull.manifest.chunk_index, pull.target.blocks) == (0, (50,))
    assert ledger.pulled(pull.pull_id) == [act.Commit(1, 0, 16), act.ReleaseRemote(ticket(), (0,))]
    assert ledger.relay(1, None, [manifest(1, final=True)]) == [act.Reserve(1, 1, 16, 16)]
    (second,) = reserve(ledger, 1, 1)
    assert isinstance(second, act.Pull)
    assert ledger.pulled(second.pull_id)[0] == act.Commit(1, 16, 16)
    assert ledger.relay(1, outputs=OUT) == [act.Resume(1, ((42,),), (False,)), act.ReleaseRemote(ticket(), None)]
    assert len(ledger) == 0


def test_nothing_is_bound_before_there_is_room(ledger: ImportLedger) -> None:
    ledger.expect(1, 32)
    assert ledger.relay(1, ticket(), [manifest(0)]) == [act.Reserve(1, 0, 0, 16)]
    assert ledger.relay(1, None, [manifest(1, final=True)]) == [act.Reserve(1, 1, 16, 16)]
    assert reserve(ledger, 1, 1) == [act.Bind(1, ticket())]


def test_a_wholly_cached_prompt_needs_no_pull_and_no_bind(ledger: ImportLedger) -> None:
    ledger.expect(1, 16)
    t = ticket(tokens=16)
    ledger.relay(1, t, [manifest(0, final=True, t=t)], OUT)
    kinds = [type(a) for a in reserve(ledger, 1, 0, cached=1)]
    assert kinds == [act.Commit, act.ReleaseRemote, act.Resume, act.ReleaseRemote]


def test_doubled_and_late_messages_change_nothing(ledger: ImportLedger) -> None:
    pull = start(ledger)
    assert ledger.relay(1, ticket(), [manifest(0)]) == []
    assert ledger.bound(1, ticket().nonce) == []
    assert ledger.bind_failed(1, ticket().nonce, PeerLost("late")) == []
    assert reserve(ledger, 1, 0) == []
    ledger.pulled(pull.pull_id)
    assert ledger.pulled(pull.pull_id) == []
    assert ledger.pull_failed(pull.pull_id, PeerLost("late")) == []
    assert ledger.relay(1, None, [manifest(0)]) == []
    assert ledger.relay(99, ticket(), [manifest(0)]) == []


def test_the_first_outputs_are_kept(ledger: ImportLedger) -> None:
    pull = start(ledger)
    ledger.relay(1, None, [manifest(1, final=True)], OUT)
    ledger.relay(1, outputs=[FirstOutput((9,), True)])
    (second,) = reserve(ledger, 1, 1)
    ledger.pulled(pull.pull_id)
    assert isinstance(second, act.Pull)
    assert act.Resume(1, ((42,),), (False,)) in ledger.pulled(second.pull_id)


def test_chunks_that_arrive_out_of_order_are_committed_in_order(ledger: ImportLedger) -> None:
    first = start(ledger)
    ledger.relay(1, None, [manifest(1, final=True)])
    (second,) = reserve(ledger, 1, 1)
    assert isinstance(second, act.Pull)
    assert ledger.pulled(second.pull_id) == []
    commits = [a for a in ledger.pulled(first.pull_id) if isinstance(a, act.Commit)]
    assert commits == [act.Commit(1, 0, 16), act.Commit(1, 16, 16)]


def test_a_manifest_that_overtook_its_ticket_waits_for_it(ledger: ImportLedger) -> None:
    ledger.expect(1, 32)
    assert ledger.relay(1, None, [manifest(0)]) == []
    assert ledger.relay(1, ticket()) == [act.Reserve(1, 0, 0, 16)]


def test_a_new_ticket_replaces_the_old_one_and_waits_for_its_pulls(ledger: ImportLedger) -> None:
    old = start(ledger)
    new = ticket(2)
    actions = ledger.relay(1, new, [manifest(0, t=new)])
    assert actions == [act.AbortPull(old.pull_id), act.ReleaseRemote(ticket(), None), act.Reserve(1, 0, 0, 16)]
    assert reserve(ledger, 1, 0) == [act.Bind(1, new)]
    assert ledger.bound(1, ticket().nonce) == [], "an answer about the old ticket"
    assert ledger.bound(1, new.nonce) == [], "the old pull still writes into the blocks"
    (pull,) = ledger.pull_failed(old.pull_id, RequestCancelled("aborted"))
    assert isinstance(pull, act.Pull)
    assert pull.ticket == new


def test_an_old_tickets_messages_are_ignored_after_its_replacement(ledger: ImportLedger) -> None:
    start(ledger)
    new = ticket(2)
    ledger.relay(1, new)
    assert ledger.relay(1, ticket(), [manifest(0), manifest(1, final=True)]) == []


def test_a_late_success_of_a_replaced_pull_is_no_success(ledger: ImportLedger) -> None:
    old = start(ledger)
    new = ticket(2)
    ledger.relay(1, new, [manifest(0, t=new)])
    reserve(ledger, 1, 0)
    ledger.bound(1, new.nonce)
    (again,) = ledger.pulled(old.pull_id)
    assert isinstance(again, act.Pull)


def test_a_late_reservation_of_a_replaced_chunk_is_ignored(ledger: ImportLedger) -> None:
    ledger.expect(1, 32)
    ledger.relay(1, ticket(), [manifest(0)])
    new = ticket(2)
    whole = KVManifest(0, 0, 32, (5, 6), (1, 1), (bytes(16),) * 2, True, ticket_id=ticket_id(new.nonce))
    ledger.relay(1, new, [whole])
    assert reserve(ledger, 1, 0) == []
    assert 1 in ledger


def test_prefill_cannot_be_replaced_after_a_commit(ledger: ImportLedger) -> None:
    ledger.pulled(start(ledger).pull_id)
    failed, *rest = ledger.relay(1, ticket(2))
    assert isinstance(failed, act.Failed)
    assert isinstance(failed.error, TicketRefused)
    assert rest == [act.ReleaseRemote(ticket(), None), act.FreeLocal(1)]


def test_prefill_retried_when_only_outputs_are_missing_gives_them(ledger: ImportLedger) -> None:
    t, new = ticket(tokens=16), ticket(2, tokens=16)
    ledger.expect(1, 16)
    ledger.relay(1, t, [manifest(0, final=True, t=t)])
    reserve(ledger, 1, 0, cached=1)
    assert ledger.relay(1, new) == [act.ReleaseRemote(new, None)]
    assert ledger.relay(1, None, [manifest(0, final=True, t=new)]) == []
    assert ledger.relay(1, outputs=OUT)[0] == act.Resume(1, ((42,),), (False,))


def test_a_failed_pull_fails_the_request_and_frees_when_the_last_pull_ended(ledger: ImportLedger) -> None:
    first = start(ledger)
    ledger.relay(1, None, [manifest(1, final=True)])
    (second,) = reserve(ledger, 1, 1)
    assert isinstance(second, act.Pull)
    error = StaleBlock("reused")
    assert ledger.pull_failed(second.pull_id, error) == [
        act.Failed(1, error),
        act.AbortPull(first.pull_id),
        act.ReleaseRemote(ticket(), None),
    ]
    assert ledger.pulled(first.pull_id) == [act.FreeLocal(1)]
    assert (len(ledger), ledger.bytes_in_flight) == (0, 0)


def test_cancel_while_pulling_frees_only_after_the_pull(ledger: ImportLedger) -> None:
    pull = start(ledger)
    assert ledger.cancel(1) == [act.AbortPull(pull.pull_id), act.ReleaseRemote(ticket(), None)]
    assert ledger.cancel(1) == []
    assert ledger.relay(1, None, [manifest(1, final=True)]) == []
    assert ledger.pull_failed(pull.pull_id, RequestCancelled("aborted")) == [act.FreeLocal(1)]


def test_cancel_of_an_unknown_request_reaches_the_engine(ledger: ImportLedger) -> None:
    assert ledger.cancel(5) == [act.FreeLocal(5)]


def test_cancel_before_binding_leaves_the_ticket_to_another_worker(ledger: ImportLedger) -> None:
    ledger.expect(1, 32)
    ledger.relay(1, ticket(), [manifest(0)])
    assert ledger.cancel(1) == [act.FreeLocal(1)]


@pytest.mark.parametrize("released", [False, True])
def test_a_refused_bind_fails_the_request(ledger: ImportLedger, released: bool) -> None:
    ledger.expect(1, 32)
    ledger.relay(1, ticket(), [manifest(0)])
    reserve(ledger, 1, 0)
    error = PeerLost("no answer: it may be bound") if released else TicketRefused("bound by another")
    expected = [act.ReleaseRemote(ticket(), None)] if released else []
    assert ledger.bind_failed(1, ticket().nonce, error) == [act.Failed(1, error), *expected, act.FreeLocal(1)]


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (ticket(fingerprint=b"x" * 16), FingerprintMismatch),
        (ticket(tokens=31), HandoverError),
    ],
)
def test_a_ticket_that_does_not_fit_is_refused(ledger: ImportLedger, bad: KVTicket, error: type) -> None:
    ledger.expect(1, 32)
    failed, free = ledger.relay(1, bad)
    assert isinstance(failed, act.Failed)
    assert isinstance(failed.error, error)
    assert free == act.FreeLocal(1)


@pytest.mark.parametrize(
    "bad",
    [
        KVManifest(0, 8, 16, (0,), (1,), (b"",), False),
        KVManifest(0, 0, 10, (0,), (1,), (b"",), False),
        KVManifest(0, 0, 16, (0,), (1,), (b"",), True),
        KVManifest(0, 0, 32, (0, 1), (1, 1), (b"", b""), False),
        KVManifest(0, 16, 32, (0, 1), (1, 1), (b"", b""), True),
        KVManifest(0, 0, 16, (0, 1), (1, 1), (b"", b""), False),
        KVManifest(0, 0, 16, (0,), (1, 2), (b"",), False),
        KVManifest(0, 0, 0, (), (), (), False),
    ],
)
def test_a_manifest_that_cannot_be_right_fails_closed(ledger: ImportLedger, bad: KVManifest) -> None:
    ledger.expect(1, 32)
    actions = ledger.relay(1, ticket(), [replace(bad, ticket_id=ticket_id(ticket().nonce))])
    assert [type(a) for a in actions] == [act.Failed, act.FreeLocal]


def test_chunks_with_a_gap_fail_closed(ledger: ImportLedger) -> None:
    ledger.expect(1, 48)
    t = ticket(tokens=48)
    ledger.relay(1, t, [manifest(0, t=t, first=16)])
    (bind,) = ledger.reserved(act.Reserve(1, 0, 16, 16), ImportTarget((50,)))
    assert isinstance(bind, act.Bind)
    (pull,) = ledger.bound(1, t.nonce)
    assert isinstance(pull, act.Pull)
    failed = ledger.pulled(pull.pull_id)[0]
    assert isinstance(failed, act.Failed)
    assert "does not follow" in str(failed.error)


def test_credits_bound_what_is_in_flight_and_requests_take_turns(ledger: ImportLedger) -> None:
    """300 bytes are three chunks of 100."""
    pulls = []
    for handle in (1, 2):
        t = ticket(handle, tokens=96)
        ledger.expect(handle, 96)
        ledger.relay(handle, t, [manifest(i, final=i == 5, t=t) for i in range(6)])
        for i in range(6):
            reserve(ledger, handle, i)
        pulls += ledger.bound(handle, t.nonce)
    order = []
    while pulls:
        assert ledger.bytes_in_flight <= 300
        pull = pulls.pop(0)
        order.append((pull.handle, pull.manifest.chunk_index))
        pulls += [a for a in ledger.pulled(pull.pull_id) if isinstance(a, act.Pull)]
    assert order[:3] == [(1, 0), (1, 1), (1, 2)], "alone"
    assert order[3:9] == [(1, 3), (2, 0), (1, 4), (2, 1), (1, 5), (2, 2)], "in turns"
    assert order[9:] == [(2, 3), (2, 4), (2, 5)]
    assert ledger.bytes_in_flight == 0


def test_a_chunk_larger_than_all_credits_is_pulled_alone(clock: Clock) -> None:
    small = ImportLedger(FP, 16, 100, clock=clock, limits=ImportLimits(max_bytes_in_flight=10))
    pull = start(small)
    small.relay(1, None, [manifest(1, final=True)])
    assert reserve(small, 1, 1) == []
    assert any(isinstance(a, act.Pull) for a in small.pulled(pull.pull_id))


@pytest.mark.parametrize(("waits", "seconds"), [("announcement", 60.0), ("room", 40.0), ("bind", 10.0), ("pull", 50.0)])
def test_every_wait_ends(ledger: ImportLedger, clock: Clock, waits: str, seconds: float) -> None:
    if waits == "pull":
        start(ledger)
    else:
        ledger.expect(1, 32)
        if waits != "announcement":
            ledger.relay(1, ticket(), [manifest(0)])
        if waits == "bind":
            reserve(ledger, 1, 0)
    clock.now += seconds - 0.1
    assert not [a for a in ledger.tick() if isinstance(a, act.Failed)]
    clock.now += 0.1
    failed = ledger.tick()[0]
    assert isinstance(failed, act.Failed)
    assert isinstance(failed.error, TransferTimeout)
    assert waits in failed.error.message
    assert ledger.tick() == []


def test_waiting_for_first_outputs_ends(ledger: ImportLedger, clock: Clock) -> None:
    t = ticket(tokens=16)
    ledger.expect(1, 16)
    ledger.relay(1, t, [manifest(0, final=True, t=t)])
    reserve(ledger, 1, 0, cached=1)
    clock.now += 60.0
    assert [type(a) for a in ledger.tick()] == [act.Failed, act.FreeLocal]


def test_the_lease_is_renewed_at_a_third_of_it(ledger: ImportLedger, clock: Clock) -> None:
    start(ledger)
    clock.now += 10.0
    assert ledger.tick() == [act.Renew(1, ticket())]
    assert ledger.tick() == []
    clock.now += 10.0
    assert ledger.tick() == [act.Renew(1, ticket())]


def test_a_refused_renewal_fails_the_request_at_once(ledger: ImportLedger) -> None:
    pull = start(ledger)
    actions = ledger.renew_refused(1, ticket().nonce, TicketRefused("unknown"))
    assert actions[:2] == [act.Failed(1, actions[0].error), act.AbortPull(pull.pull_id)]  # type: ignore[union-attr]
