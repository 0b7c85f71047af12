"""Fetching and storing with everything that can go wrong in the middle: right tokens, and nothing left behind."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from session_client import Reply, RouterSession
from worker_pair import expected, make_request, sim_builder, until, until_free
from worker_stores import Node, joined, metric, run, running_node, store_of

from pdserve.engine.core.config import CoreConfig
from pdserve.engine.sim import SimEngineConfig
from pdserve.errors import DeadlineExceeded
from pdserve.types import Phase, Request
from pdserve.wire.session import RouterUpdate, Submission
from worker_core import fetcher, store_sources
from worker_core.worker import Worker


class Held:
    """Puts a gate before the n-th call of a method of a real object: what happens there is the test's to decide."""

    def __init__(self, owner: object, name: str, call: int = 1) -> None:
        self.arrived, self.open = threading.Event(), threading.Event()
        self._real, self._left = getattr(owner, name), call
        setattr(owner, name, self)

    def __call__(self, *arguments: object) -> object:
        self._left -= 1
        if self._left == 0:
            self.arrived.set()
            assert self.open.wait(60), "nothing opened the gate"
        return self._real(*arguments)

    async def reached(self) -> None:
        assert await asyncio.to_thread(self.arrived.wait, 60), "nothing came"


class LateOpen:
    """Lets the n-th fill that a worker's fetcher opens wait for `open`."""

    def __init__(self, worker: Worker, call: int) -> None:
        self.open, self.reached = asyncio.Event(), False
        self._real, self._left = worker.store.fetcher._open, call
        worker.store.fetcher._open = self

    async def __call__(self, *arguments: object) -> object:
        self._left -= 1
        if self._left == 0:
            self.reached = True
            await self.open.wait()
        return await self._real(*arguments)


@asynccontextmanager
async def a_known_prompt(length: int = 640, **overrides: object) -> AsyncIterator[tuple[Node, Request]]:
    """Computed on worker 0, in the store, unknown to worker 1, which reads 10 blocks at a time."""
    async with running_node(workers=2, **overrides) as node:
        request = make_request("known", length=length)
        await node.run(0, request)
        await node.stored((length - 1) // 16)
        node.workers[1].store.fetcher.read_bytes = 10 * 256
        yield node, request


def begin(router: RouterSession, request: Request, phase: Phase = Phase.FULL, prefix_store: str = "") -> Reply:
    reply = router.expect(request.params.n)
    router.send(RouterUpdate(submissions=[Submission(reply.handle, phase, request, prefix_store=prefix_store)]))
    return reply


def reads(worker: Worker, call: int = 1) -> Held:
    client = worker.store.link.client
    assert client is not None
    return Held(client, "read", call)


def slot_of(node: Node, index: int) -> int:
    """Of the index-th block that was stored."""
    return list(node.store.parts.dram.entries.values())[index].slot


async def test_a_store_that_dies_in_the_middle_costs_only_what_was_not_read() -> None:
    async with a_known_prompt() as (node, request):
        gate = reads(node.workers[1], call=3)
        reply = begin(node.routers[1], request)
        await gate.reached()
        await node.store.stop()
        gate.open.set()
        assert await reply.result() == expected(request)
        assert reply.prompt.num_fetched_tokens == 20 * 16
        assert metric(node.workers[1], "pdserve_store_recomputes_total", reason="peer_lost") == 1
        await until(lambda: node.workers[1].store.link.client is None)
        again = make_request("other", length=100)
        assert (await run(node.routers[1], again)).tokens == expected(again)
        await until_free(*node.workers)


@pytest.mark.parametrize("index", [0, 17, 38])
async def test_a_corrupt_block_is_found_and_computed(index: int) -> None:
    async with a_known_prompt() as (node, request):
        node.store.parts.pool.blocks[slot_of(node, index)][200] ^= 1
        answer = await node.run(1, request)
        assert answer.tokens == expected(request)
        assert answer.fetched == index // 10 * 160, "the parts before it are used"
        assert metric(node.workers[1], "pdserve_store_recomputes_total", reason="digest_mismatch") == 1
        await until_free(*node.workers)


async def test_a_corrupt_block_of_a_peers_store_is_found_too() -> None:
    async with a_known_prompt() as (far, request), running_node(workers=1) as near:
        far.store.parts.pool.blocks[slot_of(far, 5)][3] ^= 128
        answer = await near.run(0, request, prefix_store=far.store.address)
        assert (answer.tokens, answer.fetched) == (expected(request), 0)
        await until_free(*near.workers)


@pytest.mark.parametrize("column", ["slots", "generations", "digests"])
async def test_a_peer_that_answers_garbage_is_not_believed(column: str) -> None:
    async with a_known_prompt() as (far, request), running_node(workers=1) as near:
        await near.run(0, make_request("x", length=40), prefix_store=far.store.address)
        (peer,) = near.workers[0].store.fetcher._peers._peers.values()
        real = peer.client.lookup

        async def lookup(keys: list[bytes], fingerprint: bytes, **options: object) -> object:
            found = await real(keys, fingerprint, **options)
            return replace(found, **{column: getattr(found, column) * 2})

        peer.client.lookup = lookup
        answer = await near.run(0, request, prefix_store=far.store.address)
        assert (answer.tokens, answer.fetched) == (expected(request), 0)
        assert metric(near.workers[0], "pdserve_store_recomputes_total", reason="handover_failed") == 1
        await until_free(*near.workers)


async def test_a_read_that_breaks_in_an_unforeseen_way_costs_only_the_fetch() -> None:
    async with a_known_prompt() as (node, request):
        client = node.workers[1].store.link.client
        assert client is not None

        def read(*arguments: object) -> None:
            raise IndexError("no such row")

        client.read = read
        answer = await node.run(1, request)
        assert (answer.tokens, answer.fetched) == (expected(request), 0)
        await until_free(*node.workers)


async def test_slots_beyond_the_peers_pool_are_not_read() -> None:
    async with a_known_prompt() as (far, request), running_node(workers=1, transports=["tcp"]) as near:
        await near.run(0, make_request("x", length=40), prefix_store=far.store.address)
        (peer,) = near.workers[0].store.fetcher._peers._peers.values()
        real = peer.client.lookup

        async def lookup(keys: list[bytes], fingerprint: bytes, **options: object) -> object:
            found = await real(keys, fingerprint, **options)
            return replace(found, slots=tuple(slot + 10**6 for slot in found.slots))

        peer.client.lookup = lookup
        answer = await near.run(0, request, prefix_store=far.store.address)
        assert (answer.tokens, answer.fetched) == (expected(request), 0)
        await until_free(*near.workers)


async def test_blocks_that_get_another_owner_while_they_are_read_are_computed() -> None:
    async with a_known_prompt() as (node, request):
        gate = reads(node.workers[1], call=2)
        reply = begin(node.routers[1], request)
        await gate.reached()
        dram = node.store.parts.dram
        slot = slot_of(node, 15)
        dram.pool.generations[slot] += 1  # as when its lease had lapsed and it was given away
        dram.pool.blocks[slot] = 7
        gate.open.set()
        assert await reply.result() == expected(request)
        assert reply.prompt.num_fetched_tokens == 160
        assert metric(node.workers[1], "pdserve_store_recomputes_total", reason="stale_block") == 1
        dram.pool.generations[slot] -= 1
        await until_free(*node.workers)


async def test_a_lease_is_renewed_while_a_slow_read_goes_on() -> None:
    async with a_known_prompt(store={"lease_s": 2.0}) as (node, request):
        gate = reads(node.workers[1])
        reply = begin(node.routers[1], request)
        await gate.reached()
        (lease,) = node.store.parts.dram.leases
        first_end = lease.until
        await until(lambda: lease.until > first_end + 0.2)
        gate.open.set()
        assert await reply.result() == expected(request)
        assert reply.prompt.num_fetched_tokens == 39 * 16
        await until(lambda: not len(node.store.parts.dram.leases))


# ---- the request ends first ----


@pytest.mark.parametrize("phase", [Phase.FULL, Phase.PREFILL])
async def test_a_cancel_stops_the_read_and_frees_everything(phase: Phase) -> None:
    async with a_known_prompt() as (node, request):
        worker, router = node.workers[1], node.routers[1]
        gate = reads(worker, call=2)
        reply = begin(router, request, phase)
        await gate.reached()
        router.cancel(reply)
        await until(lambda: not len(worker.jobs))
        assert len(worker.store.fetcher) == 1, "a thread still writes into its blocks"
        gate.open.set()
        await until_free(worker)
        await until(lambda: not len(node.store.parts.dram.leases))
        again = await node.run(1, request)
        assert (again.tokens, again.fetched) == (expected(request), 39 * 16)


async def test_a_cancel_that_comes_with_its_submission_leaves_nothing_behind() -> None:
    async with a_known_prompt() as (node, request):
        worker, router = node.workers[1], node.routers[1]
        reply = router.expect(1)
        submission = Submission(reply.handle, Phase.PREFILL, request)
        router.send(RouterUpdate(submissions=[submission], cancels=[reply.handle]))
        await run(router, make_request("between", length=20))
        assert not len(worker.store.fetcher)
        router.send(RouterUpdate(submissions=[submission]))
        await reply.until(lambda: reply.prompt is not None)
        assert reply.prompt.num_fetched_tokens == 39 * 16, "the handle can be used again"
        router.cancel(reply)
        await until_free(worker)


async def test_a_deadline_that_passes_while_blocks_are_fetched_ends_the_request() -> None:
    async with a_known_prompt() as (node, _):
        gate = reads(node.workers[1])
        reply = begin(node.routers[1], make_request("known", length=640, timeout_ms=50))
        with pytest.raises(DeadlineExceeded):
            await reply.result()
        gate.open.set()
        await until_free(*node.workers)


async def test_a_router_that_dies_while_blocks_are_fetched_leaves_nothing_behind() -> None:
    async with a_known_prompt() as (node, request):
        gate = reads(node.workers[1])
        begin(node.routers[1], request)
        await gate.reached()
        node.routers[1].break_off()
        await until(lambda: not len(node.workers[1].jobs))
        gate.open.set()
        await until_free(*node.workers)


async def test_a_drain_waits_for_a_request_that_is_being_fetched_and_for_what_is_to_be_stored() -> None:
    async with a_known_prompt() as (node, request):
        gate = reads(node.workers[1])
        reply = begin(node.routers[1], request)
        await gate.reached()
        draining = asyncio.create_task(node.workers[1].drain())
        await until(lambda: node.workers[1].jobs.draining)
        gate.open.set()
        assert await reply.result() == expected(request)
        await draining


async def test_a_stop_in_the_middle_of_a_read_waits_for_its_thread() -> None:
    async with a_known_prompt() as (node, request):
        gate = reads(node.workers[1], call=2)
        begin(node.routers[1], request)
        await gate.reached()
        stopping = asyncio.create_task(node.workers[1].stop())
        await until(lambda: not len(node.workers[1].jobs))
        assert len(node.workers[1].store.fetcher) == 1
        gate.open.set()
        await stopping
        assert not len(node.workers[1].store.fetcher)


# ---- no room, no answer ----


async def test_a_store_that_does_not_answer_is_done_without() -> None:
    async with a_known_prompt() as (node, request):
        worker = node.workers[1]
        worker.store.fetcher._timeout_s = 0.1
        client = worker.store.link.client
        never = asyncio.Event()

        async def lookup(*arguments: object, **options: object) -> object:
            await never.wait()

        client.lookup = lookup
        assert (await node.run(1, request)).tokens == expected(request)
        assert metric(worker, "pdserve_store_recomputes_total", reason="deadline_exceeded") == 1
        assert worker.store.link.client is None, "and not asked for a while"
        other = make_request("b", length=100)
        assert (await node.run(1, other)).tokens == expected(other)


async def test_without_room_in_the_engine_the_prompt_waits_and_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetcher, "OPEN_S", 0.1)
    small = SimEngineConfig(core=CoreConfig(num_blocks=48, chunk_tokens=64, max_num_batched_tokens=256))
    async with running_node(workers=2, build=sim_builder(small)) as node:
        request = make_request("known", length=640)
        await node.run(0, request)
        await node.stored(39)
        holder = node.routers[1].submit(make_request("holder", length=320), Phase.PREFILL)
        await holder.until(lambda: holder.prompt is not None)  # 20 of 48 blocks wait for a decode worker
        reply = begin(node.routers[1], request)
        await until(lambda: metric(node.workers[1], "pdserve_store_recomputes_total", reason="no_room") == 1)
        node.routers[1].cancel(holder)
        assert await reply.result() == expected(request)
        await until_free(*node.workers)


# ---- storing ----


def copies(worker: Worker) -> Held:
    client = worker.store.link.client
    assert client is not None
    return Held(client, "write_slots")


async def test_blocks_that_the_engine_reuses_while_they_are_copied_are_not_stored() -> None:
    small = SimEngineConfig(core=CoreConfig(num_blocks=48, chunk_tokens=64, max_num_batched_tokens=256))
    async with running_node(workers=2, build=sim_builder(small)) as node:
        worker = node.workers[0]
        gate = copies(worker)
        first, second = make_request("a", length=600), make_request("b", length=600)
        await node.run(0, first)
        await gate.reached()
        assert (await node.run(0, second)).tokens == expected(second)
        gate.open.set()
        await worker.store.publisher.flush()
        assert metric(worker, "pdserve_store_publish_dropped_total", reason="reused") > 0
        for request in (first, second):
            assert (await node.run(1, request)).tokens == expected(request)
        await until_free(*node.workers)


async def test_a_store_that_dies_while_blocks_are_copied_costs_nothing() -> None:
    async with running_node(workers=1) as node:
        worker = node.workers[0]
        gate = copies(worker)
        first = make_request("a", length=600)
        assert (await node.run(0, first)).tokens == expected(first)
        await gate.reached()
        await node.store.stop()
        gate.open.set()
        second = make_request("b", length=600)
        assert (await node.run(0, second)).tokens == expected(second)
        await until(lambda: worker.store.link.client is None)
        await worker.store.publisher.flush()
        await until_free(worker)


@pytest.mark.parametrize("lost", ["session", "answer"])
async def test_slots_that_were_reserved_when_the_answer_was_lost_come_back(lost: str) -> None:
    """The store cannot know that this process, which lives, writes there no more: it must be told."""
    async with running_node(workers=1) as node:
        worker, reservations = node.workers[0], node.store.parts.dram.reservations
        client = worker.store.link.client
        assert client is not None
        if lost == "session":
            gate = Held(client, "write_slots")
            answer = asyncio.create_task(node.run(0, make_request("a", length=320)))
            await gate.reached()
            client.lost.cancel()
            await until(lambda: worker.store.link.client not in (None, client))
            gate.open.set()
            await answer
        else:
            losing(client, "reserve")
            await node.run(0, make_request("a", length=320))
        await until(worker.store.publisher._idle.is_set)
        assert len(reservations) == (lost == "answer"), "nobody but the writer can end it"
        worker.store.link._paused_until = 0.0
        await node.run(0, make_request("b", length=320))
        await until(lambda: len(node.store.parts.dram.entries) >= 20 and not len(reservations))
        node.store.parts.dram.check_integrity()


def losing(client: object, name: str) -> None:
    """The next call's answer does not come."""
    real = getattr(client, name)

    async def call(*arguments: object, **keywords: object) -> None:
        setattr(client, name, real)
        await real(*arguments, **keywords)
        raise DeadlineExceeded("the answer was lost")

    setattr(client, name, call)


async def test_a_store_too_slow_for_what_is_computed_gets_the_newest() -> None:
    async with running_node(workers=1, store_backlog_blocks=30) as node:
        worker = node.workers[0]
        gate = copies(worker)
        for i in range(6):
            request = make_request(f"r{i}", length=200)
            assert (await node.run(0, request)).tokens == expected(request)
        await gate.reached()
        assert metric(worker, "pdserve_store_publish_dropped_total", reason="backlog") > 0
        gate.open.set()
        await worker.store.publisher.flush()
        await until_free(worker)


async def test_two_workers_that_compute_one_prompt_at_once_store_it_once() -> None:
    async with running_node(workers=2) as node:
        request = make_request("a", length=640, max_tokens=2)
        await asyncio.gather(node.run(0, request), node.run(1, request))
        for worker in node.workers:
            await worker.store.publisher.flush()
        written = sum(metric(w, "pdserve_store_bytes_total", tier="dram", direction="write") for w in node.workers)
        assert written == 40 * 256
        assert len(node.store.parts.dram.entries) == 40


# ---- both at once ----


async def test_the_head_is_computed_while_the_tail_is_fetched() -> None:
    async with a_known_prompt(store_fetch="auto", chunk_tokens=64) as (node, request):
        worker = node.workers[1]
        planner = worker.store.planner
        planner.prefill_s_per_token.add(0.001)
        planner.observe_read("dram", 1 << 20, (1 << 20) * 0.016 / 256)  # as long as computing it
        gate = reads(worker)
        reply = begin(node.routers[1], request)
        await gate.reached()
        await until(lambda: len(worker.store.view) > 0)
        while await worker.engine.call(lambda engine: engine.has_work()):  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert reply.prompt is None, "it stops before what is being fetched"
        gate.open.set()
        assert await reply.result() == expected(request)
        assert 200 < reply.prompt.num_fetched_tokens < 400, "about half"
        computed = metric(worker, "pdserve_prefix_tokens_total", tier="computed")
        assert computed == 640 - reply.prompt.num_fetched_tokens
        await until_free(*node.workers)


@pytest.mark.parametrize("end", ["cancel", "fail"])
async def test_a_tail_that_does_not_come_is_computed_or_freed(end: str) -> None:
    async with a_known_prompt(store_fetch="auto", chunk_tokens=64) as (node, request):
        worker = node.workers[1]
        worker.store.planner.prefill_s_per_token.add(0.001)
        worker.store.planner.observe_read("dram", 1 << 20, (1 << 20) * 0.016 / 256)
        gate = reads(worker)
        reply = begin(node.routers[1], request)
        await gate.reached()
        await until(lambda: len(worker.store.view) > 0)
        if end == "cancel":
            node.routers[1].cancel(reply)
        else:
            node.store.parts.pool.blocks[slot_of(node, 38)] ^= 1
        gate.open.set()
        if end == "fail":
            assert await reply.result() == expected(request)
        await until_free(*node.workers)


async def test_a_prompt_that_is_computed_sooner_than_its_tail_is_fetched_leaves_nothing_held() -> None:
    """Through a staging area the tail comes in several fills: what would come after the prompt's end is not begun."""
    core = CoreConfig(num_blocks=256, chunk_tokens=64, max_num_batched_tokens=256, staging_blocks=8)
    device = sim_builder(SimEngineConfig(core=core, host_memory=False))
    async with store_of() as kvstore, joined(kvstore, 2, device, store_fetch="auto", chunk_tokens=64) as node:
        worker = node.workers[1]
        worker.store.planner.prefill_s_per_token.add(0.001)
        worker.store.planner.observe_read("dram", 1 << 20, (1 << 20) * 0.016 / 256)
        for attempt in range(1, 20):
            request = make_request(f"known{attempt}", length=640)
            await node.run(0, request)
            await node.stored(39 * attempt)
            gate = LateOpen(worker, call=2)
            assert await begin(node.routers[1], request).result() == expected(request)
            gate.open.set()
            worker.store.fetcher._open = gate._real
            if gate.reached:  # else the prompt was computed before there was a second fill to begin
                break
        assert gate.reached
        await until(lambda: not len(worker.store.fetcher))
        await until_free(*node.workers)


# ---- who pays ----


async def test_blocks_that_are_told_after_a_cancel_count_for_their_tenant() -> None:
    """The step was under way when the request was cancelled: what it computed is stored all the same."""
    root = b"tenant one......"
    async with running_node(workers=1) as node:
        worker, router = node.workers[0], node.routers[0]
        held = Held(await worker.engine.call(lambda engine: engine), "step")
        reply = router.submit(make_request("a", length=320, cache_root=root), Phase.FULL)
        await held.reached()
        router.cancel(reply)
        await until(lambda: not len(worker.jobs))
        held.open.set()
        await node.stored(1)
        assert set(node.store.parts.dram.tenants.used) == {root.hex()}
        await until_free(worker)


# ---- peers that nobody names any more ----


async def test_a_peer_that_is_not_named_any_more_is_let_go_and_met_again_when_it_is() -> None:
    async with running_node(workers=1) as far, running_node(workers=1) as near:
        request, peers = make_request("a", length=300), near.workers[0].store.fetcher._peers
        await far.run(0, request)
        await far.stored(18)
        assert (await near.run(0, request, prefix_store=far.store.address)).fetched == 288
        attached = len(far.store.parts.sessions)
        peers.let_go(time.monotonic() - store_sources.IDLE_S)
        assert len(peers) == 1
        peers.let_go(time.monotonic())
        assert len(peers) == 0
        await until(lambda: len(far.store.parts.sessions) == attached - 1)
        other = make_request("b", length=300)
        await far.run(0, other)
        await far.stored(36)
        assert (await near.run(0, other, prefix_store=far.store.address)).fetched == 288
        await until_free(*far.workers, *near.workers)
