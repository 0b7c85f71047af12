"""The size of a block, told from a config, is what the engine will make of it."""

from __future__ import annotations

import pytest

from pdserve.config import WorkerConfig, load
from pdserve.engine.memory import LocalMemory
from pdserve.errors import ConfigError, NotSupported
from pdserve_cli.block_bytes import block_bytes
from worker_core.engines import build_engine


@pytest.mark.torch_model
def test_the_derived_block_size_is_the_engines() -> None:
    from pdserve.engine.torch.engine import build_runner
    from pdserve.models import resolve

    runner = build_runner(resolve("embedded"), dtype="bf16", block_tokens=32)
    assert block_bytes({"engine": "torch", "block_tokens": 32}) == runner.layout.block_bytes
    assert runner.layout.dtype == "bf16"
    assert block_bytes({"engine": "torch", "block_tokens": 32, "dtype": "fp32"}) == 2 * runner.layout.block_bytes


@pytest.mark.parametrize("block_tokens", [16, 32])
def test_the_derived_block_size_is_that_of_sim(block_tokens: int) -> None:
    worker = {"engine": "sim", "block_tokens": block_tokens, "num_blocks": 16}
    engine = build_engine(load(WorkerConfig, None, worker), LocalMemory)
    try:
        assert block_bytes(worker) == engine.layout.block_bytes
    finally:
        engine.close()


def test_an_engine_whose_layout_only_it_knows_is_refused() -> None:
    with pytest.raises(NotSupported):
        block_bytes({"engine": "vllm"})


def test_a_wrong_key_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        block_bytes({"engine": "sim", "block_size": 3})
    assert caught.value.key == "block_size"
