"""A real vLLM's KV events, over its own publisher: the index names its blocks as a router would. Ends with vLLM's
death."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import psutil
import pytest
from vllm_pair import SMALL_BLOCKS, Driven, make_request

from kvstore.index.index import KVIndex
from kvstore.index.vllm_blocks import ModelRoots, VllmBlocks
from kvstore.index.vllm_source import VllmEventOptions, VllmEventSource
from pdserve.block_keys import block_keys
from pdserve.errors import EngineFailed
from pdserve.types import Phase, Request

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

FINGERPRINT = b"layout.........."


@pytest.fixture
def engine(small: Driven) -> Driven:
    return small


def cached_blocks(index: KVIndex, request: Request) -> int:
    """Leading blocks of 16 tokens that the index knows of."""
    keys = block_keys(request.cache_root, request.prompt_token_ids, 16)
    reach = index.match(keys, FINGERPRINT).get("vllm")
    return reach.hbm if reach else 0


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - what is waited for comes over a socket
            await asyncio.sleep(0.01)


async def test_blocks_of_a_real_engine_come_and_go(engine: Driven, event_sockets: VllmEventOptions) -> None:
    early, live = make_request("early", 100, 2), make_request("live", 200, 2)
    engine.run_alone(early)
    index = KVIndex(lease_s=60)
    blocks = VllmBlocks(ModelRoots({}, salt_is_root=True), block_tokens=16, fingerprint=FINGERPRINT)
    source = VllmEventSource(event_sockets, blocks, index, "vllm")
    following = asyncio.create_task(source.run())
    try:
        await until(lambda: cached_blocks(index, early) == 6)
        orphans = blocks.counts.orphans  # of what other tests left: a parent may go before its child
        await asyncio.to_thread(engine.run_alone, live)
        await until(lambda: cached_blocks(index, live) == 12)
        for number in range(4):
            await asyncio.to_thread(engine.run_alone, make_request(f"crowd {number}", 300, 2))
        await until(lambda: cached_blocks(index, early) == 0)
        assert len(blocks) <= SMALL_BLOCKS
        assert (source.counts.lost, source.counts.malformed, blocks.counts.orphans) == (0, 0, orphans)
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


def test_when_vllm_dies_the_engine_says_so_and_nothing_of_it_stays(engine: Driven) -> None:
    engine.submit(make_request("dies", 60, 400, ignore_eos=True), Phase.FULL)
    engine.run_until(lambda: engine.engine.load().num_running == 1)
    (process,) = engine.engine._driver._llm.engine_core.resources.engine_manager.processes
    core = psutil.Process(process.pid)
    workers = core.children(recursive=True)
    assert workers
    core.kill()
    with pytest.raises(EngineFailed):
        engine.run_until(lambda: False)
    engine.engine.submit(make_request("late", 10), 1000, Phase.FULL)
    with pytest.raises(EngineFailed):
        engine.run_until(lambda: False)
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive
