"""A real vLLM's KV events, over its own publisher: the index names its blocks as a router would."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from vllm_pair import Driven, make_request, running_engine

from kvstore.index.index import KVIndex
from kvstore.index.vllm_blocks import ModelRoots, VllmBlocks
from kvstore.index.vllm_source import VllmEventOptions, VllmEventSource
from pdserve.block_keys import block_keys
from pdserve.types import Request

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

BLOCK = 32
NUM_BLOCKS = 24
FINGERPRINT = b"layout.........."


@pytest.fixture(scope="module")
def sockets(tmp_path_factory: pytest.TempPathFactory) -> VllmEventOptions:
    folder: Path = tmp_path_factory.mktemp("kv")
    return VllmEventOptions(f"ipc://{folder}/pub", f"ipc://{folder}/replay", heartbeat_s=0.05)


@pytest.fixture(scope="module")
def engine(sockets: VllmEventOptions) -> Iterator[Driven]:
    engine_args = {
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_batched_tokens": 64,
        "max_num_seqs": 8,
        "block_size": BLOCK,
        "num_gpu_blocks_override": NUM_BLOCKS,
        "kv_events_config": {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": sockets.endpoint,
            "replay_endpoint": sockets.replay_endpoint,
        },
    }
    with running_engine(staging_bytes=64 << 20, engine_args=engine_args) as engine:
        yield engine


def cached_blocks(index: KVIndex, request: Request) -> int:
    """Leading blocks of 16 tokens that the index knows of."""
    keys = block_keys(request.cache_root, request.prompt_token_ids, 16)
    reach = index.match(keys, FINGERPRINT).get("vllm")
    return reach.hbm if reach else 0


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - what is waited for comes over a socket
            await asyncio.sleep(0.01)


async def test_blocks_of_a_real_engine_come_and_go(engine: Driven, sockets: VllmEventOptions) -> None:
    early, live = make_request("early", 100, 2), make_request("live", 200, 2)
    engine.run_alone(early)
    index = KVIndex(lease_s=60)
    blocks = VllmBlocks(ModelRoots({}, salt_is_root=True), block_tokens=16, fingerprint=FINGERPRINT)
    source = VllmEventSource(sockets, blocks, index, "vllm")
    following = asyncio.create_task(source.run())
    try:
        await until(lambda: cached_blocks(index, early) == 6)
        await asyncio.to_thread(engine.run_alone, live)
        await until(lambda: cached_blocks(index, live) == 12)
        for number in range(4):
            await asyncio.to_thread(engine.run_alone, make_request(f"crowd {number}", 300, 2))
        await until(lambda: cached_blocks(index, early) == 0)
        assert len(blocks) <= NUM_BLOCKS
        assert (source.counts.lost, source.counts.malformed, blocks.counts.orphans) == (0, 0, 0)
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
