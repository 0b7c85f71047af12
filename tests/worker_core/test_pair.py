"""Hand-overs between two real workers in one process: right tokens, right order, nothing left behind."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
from session_client import PairRequest, RouterSession
from worker_pair import (
    SIM,
    Constant,
    Gate,
    HeldStep,
    Pair,
    expected,
    make_request,
    prompt,
    running,
    running_pair,
    sim_builder,
    until,
    until_free,
)

from pdserve.errors import (
    DeadlineExceeded,
    DigestMismatch,
    FingerprintMismatch,
    HandoverError,
    PdserveError,
    ProtocolMismatch,
    StaleBlock,
    TicketRefused,
)
from pdserve.types import FinishReason, Phase, Role, SamplingParams
from pdserve.wire.handover import decode_manifest, decode_ticket, encode_ticket
from pdserve.wire.session import Relay

TRANSPORTS = pytest.mark.parametrize("transport", ["shm", "tcp"])


async def test_one_worker_alone_gives_the_expected_tokens() -> None:
    async with running() as worker:
        router = await RouterSession.open(worker.address)
        request = make_request(length=300, max_tokens=12)
        reply = router.submit(request, Phase.FULL)
        assert await reply.result() == expected(request)
        await until_free(worker)
        await router.close()


@TRANSPORTS
@pytest.mark.parametrize("length", [1, 15, 16, 17, 64, 1000])
async def test_a_pair_gives_the_tokens_of_one_engine_alone(transport: str, length: int) -> None:
    async with running_pair([transport]) as pair:
        request = make_request(length=length)
        assert await pair.run(request) == expected(request)
        num_blocks = -(-length // 16)
        assert pair.decode_worker.kv_bytes_pulled == num_blocks * 256
        assert pair.prefill.hello.worker.fingerprint == pair.decode.hello.worker.fingerprint
        await pair.until_free()


async def test_the_prefill_worker_gives_the_first_token_and_decode_the_others() -> None:
    async with running_pair() as pair:
        running_request = pair.start(make_request(max_tokens=5))
        await running_request.result()
        assert list(running_request.first.tokens[0]) == [0]
        assert list(running_request.rest.tokens[0]) == [1, 2, 3, 4]
        assert running_request.first.prompt.num_prompt_tokens == 100


async def test_seeded_choices_are_those_of_one_engine_alone() -> None:
    async with running_pair() as pair:
        params = SamplingParams(n=3, temperature=0.9, top_p=0.9, max_tokens=10, seed=77, logprobs=2)
        request = make_request(length=70, params=params)
        handed = pair.start(request)
        await handed.result()
        for choice in range(3):
            tokens = {**handed.first.tokens[choice], **handed.rest.tokens[choice]}
            assert [tokens[i] for i in sorted(tokens)] == expected(request, choice)
        logprobs = {(e.handle - handed.first.handle, e.index) for e in handed.first.logprobs}
        logprobs |= {(e.handle - handed.rest.handle, e.index) for e in handed.rest.logprobs}
        assert len(logprobs) == sum(len(expected(request, choice)) for choice in range(3))
        await pair.until_free()


async def test_a_migrated_request_goes_on_where_it_stopped() -> None:
    async with running_pair() as pair:
        request = make_request(length=50, max_tokens=12)
        whole = expected(request)
        migrated = replace(request, output_token_ids=(tuple(whole[:5]),))
        assert await pair.run(migrated) == whole[5:]
        await pair.until_free()


async def test_a_request_that_prefill_ends_needs_no_decode() -> None:
    async with running_pair() as pair:
        request = make_request(max_tokens=1)
        handed = pair.start(request)
        assert await handed.result() == expected(request)
        assert handed.first.finishes[0].reason is FinishReason.LENGTH
        await pair.until_free()


async def test_blocks_that_decode_has_cached_are_not_pulled_again() -> None:
    async with running_pair() as pair:
        first = make_request("a", length=320, max_tokens=4)
        await pair.run(first)
        pulled = pair.decode_worker.kv_bytes_pulled
        again = replace(first, request_id="b", prompt_token_ids=(*first.prompt_token_ids, *prompt(16)))
        assert await pair.run(again) == expected(again)
        assert pair.decode_worker.kv_bytes_pulled - pulled < pulled
        await pair.until_free()


@TRANSPORTS
async def test_the_first_chunk_is_pulled_while_prefill_still_computes(transport: str) -> None:
    pulled = threading.Event()
    held = sim_builder(timing=HeldStep(10, pulled))
    async with running_pair([transport], prefill_build=held) as pair:
        request = make_request(length=640)  # ten chunks, and the last waits for the first to be pulled
        handed = pair.start(request)
        await until(lambda: pair.decode_worker.kv_bytes_pulled > 0)
        assert handed.first.prompt is None, "prefill had ended before the first pull"
        pulled.set()
        assert await handed.result() == expected(request)
        assert len(handed.first.announcements) == 10


async def test_chunks_large_enough_for_the_digest_thread_arrive_whole() -> None:
    sim = replace(SIM, core=replace(SIM.core, num_blocks=4096, chunk_tokens=32_768, max_num_batched_tokens=40_000))
    build = sim_builder(sim)
    async with running_pair(prefill_build=build, decode_build=build) as pair:
        request = make_request(length=40_000, max_tokens=3)
        assert await pair.run(request) == expected(request)
        await pair.until_free()


async def test_a_staged_pool_hands_over_like_a_direct_one() -> None:
    staged = sim_builder(replace(SIM, host_memory=False, core=replace(SIM.core, staging_blocks=8)))
    async with running_pair(prefill_build=staged, decode_build=staged) as pair:
        requests = [make_request(f"s{i}", length=200 + i) for i in range(6)]
        handed = [pair.start(request) for request in requests]
        for one in handed:
            assert await one.result() == expected(one.request)
        await pair.until_free()


async def test_requests_wait_for_room_on_the_decode_worker() -> None:
    small = sim_builder(replace(SIM, core=replace(SIM.core, num_blocks=24)))
    async with running_pair(decode_build=small) as pair:
        requests = [make_request(f"w{i}", length=200) for i in range(8)]  # 13 blocks each
        handed = [pair.start(request) for request in requests]
        for one in handed:
            assert await one.result() == expected(one.request)
        await pair.until_free()


# ---- cancel, at every stage ----


async def _cancelled_clean(pair: Pair, handed: PairRequest) -> None:
    handed.cancel()
    await pair.until_free()
    request = make_request("after")
    assert await pair.run(request) == expected(request)


@TRANSPORTS
async def test_cancel_before_anything_was_relayed(transport: str) -> None:
    async with running_pair([transport]) as pair:
        handed = pair.start(make_request(), lambda p: setattr(p, "hold_back", True))
        await handed.first.until(lambda: handed.first.prompt is not None)
        await _cancelled_clean(pair, handed)


@TRANSPORTS
async def test_cancel_in_the_middle_of_prefill(transport: str) -> None:
    async with running_pair([transport], prefill_build=sim_builder(timing=Constant(10.0))) as pair:
        handed = pair.start(make_request(length=2000))
        await handed.first.until(lambda: len(handed.first.announcements) >= 3)
        await _cancelled_clean(pair, handed)


@TRANSPORTS
async def test_cancel_in_the_middle_of_decode(transport: str) -> None:
    async with running_pair([transport], decode_build=sim_builder(timing=Constant(5.0))) as pair:
        handed = pair.start(make_request(max_tokens=200))
        await handed.rest.until(lambda: len(handed.rest.tokens[0]) > 3)
        await _cancelled_clean(pair, handed)


@TRANSPORTS
async def test_cancel_during_a_pull_frees_the_target_only_after_the_read_has_ended(transport: str) -> None:
    async with running_pair([transport]) as pair:
        worker = pair.decode_worker
        gate = Gate().install(worker)
        handed = pair.start(make_request(length=200))
        await gate.reached()
        handed.cancel()
        await until_free(pair.prefill_worker)  # the exporter is fenced by generations and frees at once
        await until(lambda: len(worker.jobs) == 0)
        crowd = make_request("crowd", length=8000)  # needs the blocks that the pull still writes into
        reply = pair.decode.submit(crowd, Phase.FULL)
        await until(lambda: len(worker.jobs) == 1)
        load = await worker.engine.call(lambda engine: engine.load())
        assert (load.num_waiting, load.num_running) == (1, 0)
        assert load.num_total_blocks - load.num_free_blocks >= 13
        gate.open.set()
        assert await reply.result() == expected(crowd)
        await pair.until_free()


async def test_a_deadline_during_a_pull_ends_the_request_at_once_and_the_blocks_later() -> None:
    async with running_pair() as pair:
        gate = Gate().install(pair.decode_worker)
        handed = pair.start(make_request(timeout_ms=1500))
        await gate.reached()
        with pytest.raises(DeadlineExceeded) as caught:
            await handed.rest.result()
        assert caught.value.leg == "transfer"
        gate.open.set()
        await until_free(pair.decode_worker)
        await until_free(pair.prefill_worker)


# ---- what must fail closed ----


async def _fails(pair: Pair, handed: PairRequest, error: type[PdserveError]) -> PdserveError:
    with pytest.raises(error) as caught:
        await handed.rest.result()
    assert not handed.rest.tokens[0], "a token was decoded from KV that could not be trusted"
    handed.cancel()
    await pair.until_free()
    return caught.value


@TRANSPORTS
async def test_a_corrupted_block_gives_an_error_and_never_a_token(transport: str) -> None:
    async with running_pair([transport]) as pair:
        handed = pair.start(make_request(length=100), lambda p: setattr(p, "hold_back", True))
        await handed.first.until(lambda: handed.first.prompt is not None)
        last = decode_manifest(handed.first.announcements[-1].manifests[-1])
        pair.prefill_worker.port.pool.blocks[last.blocks[-1], 3] ^= 1
        handed.hold_back = False
        handed.pump()
        error = await _fails(pair, handed, DigestMismatch)
        assert error.retryable
        assert error.leg == "transfer"


@TRANSPORTS
async def test_a_block_that_was_reused_before_the_pull_is_refused(transport: str) -> None:
    async with running_pair([transport]) as pair:
        handed = pair.start(make_request(length=100), lambda p: setattr(p, "hold_back", True))
        await handed.first.until(lambda: handed.first.prompt is not None)
        manifest = decode_manifest(handed.first.announcements[0].manifests[0])
        pair.prefill_worker.port.pool.generations[manifest.blocks[1]] += 1
        handed.hold_back = False
        handed.pump()
        await _fails(pair, handed, StaleBlock)


@TRANSPORTS
async def test_a_block_that_is_reused_during_the_pull_is_refused(transport: str) -> None:
    async with running_pair([transport]) as pair:
        gate = Gate().install(pair.decode_worker)
        handed = pair.start(make_request(length=60))
        await gate.reached()
        manifest = decode_manifest(handed.first.announcements[0].manifests[0])
        pool = pair.prefill_worker.port.pool
        pool.generations[manifest.blocks[0]] += 1
        pool.blocks[manifest.blocks[0]] = 0
        gate.open.set()
        await _fails(pair, handed, StaleBlock)


async def test_workers_of_different_layouts_exchange_nothing() -> None:
    other = sim_builder(replace(SIM, model=replace(SIM.model, revision="other weights")))
    async with running_pair(decode_build=other) as pair:
        await _fails(pair, pair.start(make_request()), FingerprintMismatch)


async def test_a_ticket_that_nobody_used_expires_and_frees_its_blocks() -> None:
    async with running_pair(prefill_overrides={"ticket_lease_s": 0.3}) as pair:
        handed = pair.start(make_request(), lambda p: setattr(p, "hold_back", True))
        await handed.first.until(lambda: handed.first.prompt is not None)
        await until_free(pair.prefill_worker)
        handed.hold_back = False
        handed.pump()
        await _fails(pair, handed, TicketRefused)


async def test_a_lease_is_renewed_while_a_slow_prefill_goes_on() -> None:
    slow = sim_builder(timing=Constant(60.0))
    async with running_pair(prefill_build=slow, prefill_overrides={"ticket_lease_s": 2.0}) as pair:
        request = make_request(length=64 * 45)  # 2.7 s
        assert await pair.run(request) == expected(request)
        await pair.until_free()


async def test_a_forged_ticket_is_refused() -> None:
    def forge(relay: Relay) -> Relay:
        if not relay.ticket:
            return relay
        return replace(relay, ticket=encode_ticket(replace(decode_ticket(relay.ticket), incarnation=12345)))

    async with running_pair() as pair:
        handed = pair.start(make_request(), lambda p: setattr(p, "change_relay", forge))
        await _fails(pair, handed, TicketRefused)


@pytest.mark.parametrize("field", ["ticket", "manifests"])
async def test_relayed_bytes_that_cannot_be_read_end_the_request(field: str) -> None:
    def garble(relay: Relay) -> Relay:
        garbage = b"\xff\xff\xff"
        return replace(relay, **{field: garbage if field == "ticket" else (garbage,)})

    async with running_pair() as pair:
        handed = pair.start(make_request(), lambda p: setattr(p, "change_relay", garble))
        await _fails(pair, handed, ProtocolMismatch)


async def test_a_connection_that_breaks_in_an_unforeseen_way_is_tried_anew_by_the_next_request() -> None:
    async with running_pair(["shm"]) as pair:
        transport = pair.decode_worker.port.transports["shm"]
        connect = transport.connect

        def breaks(descriptor: bytes) -> None:
            transport.connect = connect
            raise OSError(12, "no memory to map it")

        transport.connect = breaks
        error = await _fails(pair, pair.start(make_request()), HandoverError)
        assert "no memory" in error.message
        request = make_request()
        assert await pair.run(request) == expected(request)


async def test_workers_without_a_common_transport_say_so() -> None:
    async with running_pair(["shm"], prefill_overrides={"transports": ["tcp"]}) as pair:
        error = await _fails(pair, pair.start(make_request()), HandoverError)
        assert "transport" in error.message


# ---- streams and workers that die ----


async def test_a_router_that_dies_frees_its_requests_on_both_workers() -> None:
    slow = sim_builder(timing=Constant(10.0))
    async with running_pair(prefill_build=slow, decode_build=slow) as pair:
        for i in range(4):
            pair.start(make_request(f"d{i}", length=400, max_tokens=100))
        await until(lambda: pair.decode_worker.kv_bytes_pulled > 0)
        pair.prefill.break_off()
        pair.decode.break_off()
        await pair.until_free()


async def test_decode_streams_death_lets_prefill_free_at_once() -> None:
    async with running_pair() as pair:
        gate = Gate().install(pair.decode_worker)
        pair.start(make_request(length=300))
        await gate.reached()
        pair.decode.break_off()
        gate.open.set()
        await until_free(pair.prefill_worker)  # decode released it, long before the lease


async def test_a_prefill_worker_that_stops_gives_its_requests_a_typed_error() -> None:
    async with running_pair(prefill_build=sim_builder(timing=Constant(20.0))) as pair:
        handed = pair.start(make_request(length=3000))
        await handed.first.until(lambda: len(handed.first.announcements) > 2)
        await pair.prefill_worker.stop()
        with pytest.raises(PdserveError) as caught:
            await handed.first.result()
        assert caught.value.retryable
        handed.cancel()
        await until_free(pair.decode_worker)


async def test_a_prefill_that_is_retried_elsewhere_replaces_the_first() -> None:
    async with running_pair() as pair, running(Role.PREFILL) as second_worker:
        request = make_request(length=300)
        gate = Gate().install(pair.decode_worker)
        lost = pair.start(request)
        await gate.reached()
        lost.hold_back = True
        pair.prefill.cancel(lost.first)
        second = await RouterSession.open(second_worker.address)
        retried = PairRequest(second, pair.decode, request).start(lost.rest)
        await until(lambda: any(len(tickets) > 1 for tickets in pair.decode_worker.puller._sources.values()))
        gate.open.set()
        assert await retried.result() == expected(request)
        await until_free(pair.prefill_worker, second_worker, pair.decode_worker)
        await second.close()
