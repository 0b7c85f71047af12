from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

pytest.importorskip("vllm", reason="needs the environment of `make test-vllm`")

from vllm_pair import SMALL_BLOCK, SMALL_BLOCKS, Driven, Pair, running_engine

from kvstore.index.vllm_source import VllmEventOptions


@pytest.fixture(scope="session")
def prefill() -> Iterator[Driven]:
    """Fails a request whose KV cannot be loaded."""
    with running_engine(load_failure="fail") as engine:
        yield engine


@pytest.fixture(scope="session")
def decode() -> Iterator[Driven]:
    """Computes anew what cannot be loaded."""
    with running_engine(load_failure="recompute") as engine:
        yield engine


@pytest.fixture(scope="session")
def event_sockets(tmp_path_factory: pytest.TempPathFactory) -> VllmEventOptions:
    folder = tmp_path_factory.mktemp("kv")
    return VllmEventOptions(f"ipc://{folder}/pub", f"ipc://{folder}/replay", heartbeat_s=0.05)


@pytest.fixture(scope="session")
def small(event_sockets: VllmEventOptions) -> Iterator[Driven]:
    """bf16, few small blocks, no digests; it publishes its events for others. The last test of all kills it."""
    engine_args = {
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_batched_tokens": 64,
        "max_num_seqs": 8,
        "block_size": SMALL_BLOCK,
        "num_gpu_blocks_override": SMALL_BLOCKS,
        "kv_events_config": {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": event_sockets.endpoint,
            "replay_endpoint": event_sockets.replay_endpoint,
        },
    }
    with running_engine(dtype="bf16", verify_loads=False, staging_bytes=64 << 20, engine_args=engine_args) as engine:
        yield engine


@pytest.fixture
def pair(prefill: Driven, decode: Driven) -> Iterator[Pair]:
    """Both engines; after the test nothing of it may be left in either."""
    yield Pair(prefill, decode)
    prefill.settle()
    decode.settle()
