"""Workers and their node's store: what one computed, another one need not. The sim engine's tokens follow from every
byte of KV, so a wrong, stale or missing block would show as a wrong token."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from session_client import PairRequest, RouterSession
from worker_pair import MODEL, SIM, expected, make_request, prompt, running, sim_builder, until, until_free
from worker_stores import SIM_BLOCK_BYTES, joined, metric, run, running_node, store_of, turn

from pdserve.engine.base import StepResult
from pdserve.engine.core.config import CoreConfig
from pdserve.engine.sim import SimEngineConfig
from pdserve.types import Phase, Request, Role, SamplingParams
from pdserve.wire.store import Found
from worker_core.store_sources import Find
from worker_core.worker import EngineBuilder

DEVICE = SimEngineConfig(
    core=CoreConfig(num_blocks=512, chunk_tokens=64, max_num_batched_tokens=256, staging_blocks=20), host_memory=False
)


@pytest.mark.parametrize("phase", [Phase.FULL, Phase.PREFILL])
async def test_another_worker_computes_only_what_is_new(phase: Phase) -> None:
    async with running_node(workers=2) as node:
        first = make_request("a", length=4000, max_tokens=32)
        answer = await node.run(0, first)
        assert (answer.tokens, answer.cached) == (expected(first), 0)
        known = (4000 + len(answer.tokens) - 1) // 16 * 16
        await node.stored(known // 16)

        second = turn(first, answer.tokens, more=20, max_tokens=1 if phase is Phase.PREFILL else 8)
        again = await node.run(1, second, phase)
        assert again.tokens == expected(second)
        assert (again.cached, again.fetched) == (known, known)
        worker = node.workers[1]
        assert metric(worker, "pdserve_prefix_tokens_total", tier="dram") == known
        assert metric(worker, "pdserve_prefix_tokens_total", tier="computed") == len(second.prompt_token_ids) - known
        assert metric(worker, "pdserve_store_bytes_total", tier="dram", direction="read") == known * 16
        assert metric(worker, "pdserve_store_leases") == 0
        await until_free(*node.workers)


async def test_an_engine_that_times_its_prompts_itself_is_believed() -> None:
    """vLLM's steps are polls: their duration says nothing."""
    async with running_node(workers=1) as node:
        engine = await node.workers[0].engine.call(lambda engine: engine)
        step = engine.step

        def timed() -> StepResult:
            result = step()
            result.prefill_s = 0.5 * result.num_prompt_tokens
            return result

        engine.step = timed
        await node.run(0, make_request("a", length=320))
        assert node.workers[0].store.planner.prefill_s_per_token.value == 0.5


async def test_what_came_from_the_stores_disk_is_counted_apart(tmp_path: Path) -> None:
    """Of 20 blocks the last 8 are on disk alone."""
    async with running_node(workers=2, store={"disk": {"path": str(tmp_path / "kv")}}) as node:
        request, parts = make_request("a", length=321), node.store.parts
        await node.run(0, request)
        await node.stored(20)
        await node.workers[0].store.publisher.flush()
        await parts.tiers.flush()
        parts.dram.drop(list(parts.dram.entries)[12:])
        again = await node.run(1, request)
        assert again.tokens == expected(request)
        worker = node.workers[1]
        tokens = {each: metric(worker, "pdserve_prefix_tokens_total", tier=each) for each in ("hbm", "dram", "disk")}
        assert tokens == {"hbm": 0, "dram": 12 * 16, "disk": 8 * 16}
        assert metric(worker, "pdserve_store_promoted_blocks_total") == 8
        assert again.cached == again.fetched == 320


def test_only_the_last_blocks_of_a_find_were_on_disk() -> None:
    found = Found(1, tuple(range(10)), promoted=4)
    own, peer = (Find(tier, tier, found, None, None, 1.0) for tier in ("dram", "peer"))
    assert [own.num_from_disk(range(*span)) for span in ((0, 10), (0, 6), (5, 8), (8, 10), (3, 3))] == [4, 0, 2, 2, 0]
    assert peer.num_from_disk(range(10)) == 0


async def test_what_decode_generated_is_there_for_the_next_prefill() -> None:
    async with running_node(workers=3) as node:
        prefill, decode, other = node.routers
        first = make_request("a", length=200, max_tokens=100)
        tokens = await PairRequest(prefill, decode, first).start().result()
        assert tokens == expected(first)
        await node.stored((200 + len(tokens) - 1) // 16)
        second = turn(first, tokens, more=5)
        again = await run(other, second)
        assert again.tokens == expected(second)
        assert again.fetched == (200 + len(tokens) - 1) // 16 * 16
        await until_free(*node.workers)


@pytest.mark.parametrize("build", [None, sim_builder(DEVICE)], ids=["host", "device"])
async def test_what_prefill_fetched_is_handed_over_with_the_rest(build: EngineBuilder | None) -> None:
    async with store_of() as kvstore, joined(kvstore, 3, build=build) as node:
        first = make_request("a", length=300, max_tokens=20)
        answer = await node.run(2, first)
        known = (300 + len(answer.tokens) - 1) // 16
        await node.stored(known)
        second = turn(first, answer.tokens, more=50)
        pair = PairRequest(node.routers[0], node.routers[1], second).start()
        assert await pair.result() == expected(second)
        assert pair.first.prompt.num_fetched_tokens == known * 16
        await until_free(*node.workers)


async def test_prompts_that_begin_alike_and_come_together_are_read_once() -> None:
    async with running_node(workers=2) as node:
        base = make_request("a", length=800, max_tokens=2)
        await node.run(0, base)
        await node.stored(50)
        prompts = [(*base.prompt_token_ids[:640], *prompt(100, i)) for i in range(8)]
        requests = [Request(f"r{i}", MODEL, tokens, base.params) for i, tokens in enumerate(prompts)]
        answers = await asyncio.gather(*(node.run(1, request) for request in requests))
        assert [answer.tokens for answer in answers] == [expected(request) for request in requests]
        assert [answer.cached for answer in answers] == [640] * 8
        assert metric(node.workers[1], "pdserve_store_bytes_total", tier="dram", direction="read") == 40 * 256
        await until_free(*node.workers)


async def test_a_device_engine_stores_and_fetches_through_its_staging_area() -> None:
    async with store_of() as kvstore, joined(kvstore, 2, build=sim_builder(DEVICE)) as node:
        first = make_request("a", length=500, max_tokens=16)
        answer = await node.run(0, first)
        await node.stored((500 + len(answer.tokens) - 1) // 16)
        second = turn(first, answer.tokens, more=20)
        again = await node.run(1, second)
        assert again.tokens == expected(second)
        assert again.fetched == (500 + len(answer.tokens) - 1) // 16 * 16
        await until_free(*node.workers)


async def test_choices_share_what_was_fetched_and_store_their_own() -> None:
    async with running_node(workers=2) as node:
        params = SamplingParams(n=3, temperature=0.9, max_tokens=40, seed=7, ignore_eos=True)
        request = make_request("a", length=100, params=params)
        assert (await node.run(0, request)).tokens == expected(request)
        await node.stored(6 + 3 * (139 // 16 - 6))
        reply = node.routers[1].submit(request, Phase.FULL)
        await reply.result()
        assert [reply.output(choice) for choice in range(3)] == [expected(request, choice) for choice in range(3)]
        assert reply.prompt.num_fetched_tokens == 96
        await until_free(*node.workers)


async def test_a_migrated_request_finds_its_outputs_too() -> None:
    async with running_node(workers=2) as node:
        first = make_request("a", length=100, max_tokens=60)
        whole = (await node.run(0, first)).tokens
        await node.stored(9)
        moved = Request(
            "moved", MODEL, first.prompt_token_ids, first.params, output_token_ids=(tuple(whole[: len(whole) // 2]),)
        )
        reply = node.routers[1].submit(moved, Phase.FULL)
        await reply.result()
        assert reply.output() == whole[len(whole) // 2 :]
        assert reply.prompt.num_fetched_tokens == 100, "the whole prompt, and a part of the outputs"
        await until_free(*node.workers)


async def test_nothing_is_asked_for_what_the_engine_has() -> None:
    async with running_node(workers=1) as node:
        request = make_request("a", length=161)
        await node.run(0, request)
        await node.stored(10)
        again = await node.run(0, request)
        assert (again.cached, again.fetched) == (160, 0)
        assert metric(node.workers[0], "pdserve_store_seconds_count", operation="lookup") == 1, "only the first time"


async def test_blocks_in_the_store_are_not_copied_again() -> None:
    async with running_node(workers=2) as node:
        request = make_request("a", length=161, max_tokens=2)
        await node.run(0, request)
        await node.stored(10)
        await node.run(1, request)
        await node.workers[1].store.publisher.flush()
        assert metric(node.workers[1], "pdserve_store_bytes_total", tier="dram", direction="write") == 0


@pytest.mark.parametrize("build", [None, sim_builder(DEVICE)], ids=["host", "device"])
async def test_what_decode_has_cached_is_not_pulled_again(build: EngineBuilder | None) -> None:
    async with store_of() as kvstore, joined(kvstore, 2, build=build) as node:
        prefill, decode = node.routers
        first = make_request("a", length=160, max_tokens=33)
        tokens = await PairRequest(prefill, decode, first).start().result()
        pulled = node.workers[1].kv_bytes_pulled
        second = turn(first, tokens, more=30)
        assert await PairRequest(prefill, decode, second).start().result() == expected(second)
        new_blocks = -(-len(second.prompt_token_ids) // 16) - (160 + len(tokens) - 1) // 16
        assert node.workers[1].kv_bytes_pulled - pulled == new_blocks * SIM_BLOCK_BYTES
        await until_free(*node.workers)


# ---- without a store, or with one that does not do its part ----


async def test_a_store_that_is_down_costs_nothing() -> None:
    async with running(store="127.0.0.1:9") as worker:
        router = await RouterSession.open(worker.address)
        assert router.hello.worker.store_address == "127.0.0.1:9"
        request = make_request("a", length=300)
        assert (await run(router, request)).tokens == expected(request)
        assert metric(worker, "pdserve_store_attached") == 0
        await until_free(worker)
        await router.close()


async def test_a_store_of_another_block_size_is_refused_and_serving_goes_on() -> None:
    async with store_of(block_bytes=4096) as kvstore, running(store=kvstore.address) as worker:
        router = await RouterSession.open(worker.address)
        request = make_request("a", length=300)
        assert (await run(router, request)).tokens == expected(request)
        assert not worker.store.link.attached.is_set()
        await router.close()


async def test_a_store_that_restarts_is_used_again() -> None:
    async with running_node(workers=1) as node:
        worker, router = node.workers[0], node.routers[0]
        await node.run(0, make_request("a", length=300))
        await node.stored(18)
        host, _, port = node.store.address.rpartition(":")
        await node.store.stop()
        await until(lambda: worker.store.link.client is None)
        request = make_request("b", length=300)
        assert (await run(router, request)).tokens == expected(request)
        async with store_of(listen=f"{host}:{port}") as reborn:
            await worker.store.link.attached.wait()
            request = make_request("c", length=300)
            assert (await run(router, request)).tokens == expected(request)
            await until(lambda: len(reborn.parts.dram.entries) >= 18)
        await until_free(worker)


async def test_a_quota_that_is_used_up_keeps_blocks_out_and_nothing_else() -> None:
    async with running_node(workers=2, store={"quota_bytes": 4 * SIM_BLOCK_BYTES}) as node:
        request = make_request("a", length=320, cache_root=b"tenant one......")
        pinned = await node.run(0, request)
        assert pinned.tokens == expected(request)
        await until(lambda: len(node.store.parts.dram.entries) == 4)
        assert dict(node.store.parts.dram.tenants.used) == {b"tenant one......".hex(): 4}
        again = await node.run(1, request)
        assert (again.tokens, again.fetched) == (expected(request), 64)
        other = make_request("b", length=320, cache_root=b"tenant two......")
        assert (await node.run(0, other)).tokens == expected(other)
        await until(lambda: len(node.store.parts.dram.entries) == 8)


async def test_a_full_store_of_pinned_blocks_refuses_and_serving_goes_on() -> None:
    async with running_node(workers=1, store={"num_blocks": 8}) as node:
        first = make_request("a", length=129)
        await node.run(0, first)
        await node.stored(8)
        dram = node.store.parts.dram
        dram.pin(list(dram.entries), pinned=True)
        request = make_request("b", length=300)
        assert (await node.run(0, request)).tokens == expected(request)
        await node.workers[0].store.publisher.flush()
        assert metric(node.workers[0], "pdserve_store_publish_dropped_total", reason="no_room") >= 18
        await until_free(*node.workers)


async def test_fetching_can_be_switched_off() -> None:
    async with running_node(workers=2, store_fetch="never") as node:
        request = make_request("a", length=300)
        await node.run(0, request)
        await node.stored(18)
        assert (await node.run(1, request)).fetched == 0


async def test_an_engine_without_prefix_cache_uses_no_store() -> None:
    plain = SimEngineConfig(core=CoreConfig(num_blocks=64, prefix_cache=False))
    async with (
        store_of() as kvstore,
        running(Role.PREFILL, sim_builder(plain), store=kvstore.address, prefix_cache=False) as worker,
    ):
        router = await RouterSession.open(worker.address)
        request = make_request("a", length=100)
        assert (await run(router, request)).tokens == expected(request, sim=SIM)
        assert not kvstore.parts.dram.entries
        assert worker.store.link is None
        await router.close()


# ---- other nodes' stores ----


@pytest.mark.parametrize("transports", [["shm", "tcp"], ["tcp"]])
async def test_another_nodes_store_gives_what_the_own_one_has_not(transports: list[str]) -> None:
    async with running_node(workers=1) as far, running_node(workers=1, transports=transports) as near:
        first = make_request("a", length=1000, max_tokens=20)
        answer = await far.run(0, first)
        known = (1000 + len(answer.tokens) - 1) // 16
        await far.stored(known)
        second = turn(first, answer.tokens, more=20)
        again = await near.run(0, second, prefix_store=far.store.address)
        assert (again.tokens, again.fetched) == (expected(second), known * 16)
        assert metric(near.workers[0], "pdserve_prefix_tokens_total", tier="peer") == known * 16
        await near.stored(known + 1)  # a replica, and what was new
        assert not len(far.store.parts.dram.leases)
        await until_free(*far.workers, *near.workers)


async def test_a_worker_without_a_store_of_its_own_fetches_from_a_peers() -> None:
    async with running_node(workers=1) as far, running(store_fetch="always") as worker:
        request = make_request("a", length=300)
        await far.run(0, request)
        await far.stored(18)
        router = await RouterSession.open(worker.address)
        again = await run(router, request, prefix_store=far.store.address)
        assert (again.tokens, again.fetched) == (expected(request), 288)
        await router.close()


async def test_a_peer_that_cannot_be_reached_is_left_alone_for_a_while() -> None:
    async with running_node(workers=1) as node:
        for request_id in ("a", "b"):
            request = make_request(request_id, length=300)
            assert (await node.run(0, request, prefix_store="127.0.0.1:9")).tokens == expected(request)
        assert metric(node.workers[0], "pdserve_store_recomputes_total", reason="worker_lost") == 1


async def test_the_own_store_is_preferred_where_it_has_as_much() -> None:
    async with running_node(workers=1) as far, running_node(workers=2) as near:
        request = make_request("a", length=300)
        await far.run(0, request)
        await near.run(0, request)
        await far.stored(18)
        await near.stored(18)
        assert (await near.run(1, request, prefix_store=far.store.address)).fetched == 288
        assert metric(near.workers[1], "pdserve_prefix_tokens_total", tier="dram") == 288
