"""What routers hear of an engine's prefix cache: all of it, in the end, however slowly they read."""

from __future__ import annotations

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st
from session_client import RouterSession
from worker_pair import make_request, running, sim_builder, until
from worker_stores import run

from pdserve.engine.base import PublishedBlocks, StepResult
from pdserve.engine.core.config import CoreConfig
from pdserve.engine.sim import SimEngineConfig
from pdserve.types import CacheDelta
from worker_core.cache_view import MAX_KEYS, CacheFeed, CacheView
from worker_core.worker import Worker


def key(i: int) -> bytes:
    return i.to_bytes(16, "little")


def step(stored: list[int], evicted: list[int]) -> StepResult:
    published = [PublishedBlocks(1, 0, tuple(map(key, stored)))] if stored else []
    return StepResult(published=published, evicted=list(map(key, evicted)))


def apply(known: set[bytes] | None, delta: CacheDelta) -> set[bytes]:
    """As a router does."""
    if delta.reset:
        known = set()
    assert known is not None, "the first one is a reset"
    return (known - set(delta.removed)) | set(delta.stored)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 12), max_size=6), st.lists(st.integers(0, 12), max_size=6), st.booleans()),
        max_size=25,
    )
)
def test_a_router_that_reads_now_and_then_knows_the_cache_in_the_end(
    steps: list[tuple[list[int], list[int], bool]],
) -> None:
    view = CacheView()
    early, late, known_early, known_late = CacheFeed(view), None, None, None
    for i, (stored, evicted, reads) in enumerate(steps):
        delta = view.update(step(stored, [k for k in evicted if k not in stored]))
        for feed in [early] if late is None else [early, late]:
            feed.add(delta)
        if i == 5:
            late = CacheFeed(view)
        if reads and (told := early.take()):
            known_early = apply(known_early, told)
    while told := early.take():
        known_early = apply(known_early, told)
    assert known_early == set(view.keys())
    if late is not None:
        while told := late.take():
            known_late = apply(known_late, told)
        assert known_late == set(view.keys())


def test_a_delta_names_only_what_changed() -> None:
    view = CacheView()
    assert view.update(step([1, 2], [])) == CacheDelta((key(1), key(2)))
    assert view.update(step([1, 2, 3], [])) == CacheDelta((key(3),)), "found blocks are published again"
    assert not view.update(step([], [9]))
    assert view.update(step([4], [1])) == CacheDelta((key(4),), (key(1),))
    assert view.match([key(2), key(3), key(1)]) == 2


def test_a_large_cache_is_told_in_messages_of_bounded_size() -> None:
    view = CacheView()
    view.update(step(list(range(2 * MAX_KEYS + 5)), []))
    feed, sizes, resets = CacheFeed(view), [], []
    while told := feed.take():
        sizes.append(len(told.stored))
        resets.append(told.reset)
    assert sizes == [MAX_KEYS, MAX_KEYS, 5]
    assert resets == [True, False, False]


def test_what_piles_up_for_a_router_that_does_not_read_is_bounded() -> None:
    view = CacheView()
    feed = CacheFeed(view)
    assert feed.take() == CacheDelta(reset=True)
    for i in range(3 * MAX_KEYS):
        feed.add(view.update(step([i + 10], [i])))
    assert len(feed._pending) <= 2 * len(view) + MAX_KEYS + 1
    told = feed.take()
    assert told is not None
    assert told.reset, "rather than tens of thousands of keys that came and went"


async def engine_keys(worker: Worker) -> set[bytes]:
    return set(await worker.engine.call(lambda engine: engine.cached_keys()))


async def test_every_router_knows_what_the_engine_has_cached() -> None:
    small = SimEngineConfig(core=CoreConfig(num_blocks=60, chunk_tokens=64, max_num_batched_tokens=256))
    async with running(build=sim_builder(small)) as worker:
        first = await RouterSession.open(worker.address, "r1")
        await asyncio.gather(*(run(first, make_request(f"a{i}", length=250, max_tokens=30)) for i in range(12)))
        second = await RouterSession.open(worker.address, "r2")
        await run(second, make_request("b", length=400, max_tokens=3))
        there = await engine_keys(worker)
        assert len(there) >= 25
        await until(lambda: first.cache == there and second.cache == there)
        assert (first.num_cache_resets, second.num_cache_resets) == (1, 1)
        await first.close()
        await second.close()


async def test_a_fresh_worker_says_at_once_that_its_cache_is_empty() -> None:
    async with running() as worker:
        router = await RouterSession.open(worker.address)
        await until(lambda: router.cache == set())
        await router.close()
