"""From config to engine."""

from __future__ import annotations

import importlib.util

import pytest
from session_client import RouterSession
from worker_pair import Pair
from worker_process import worker_process

from kvstore.eviction import HazardPolicy
from pdserve.config import WorkerConfig, from_mapping
from pdserve.engine.memory import LocalMemory
from pdserve.errors import ConfigError
from pdserve.types import KVLayout, Phase, Request, SamplingParams
from worker_core.engines import build_engine, cache_policy
from worker_core.identity import fingerprint


def test_the_sim_engine_follows_the_workers_config() -> None:
    config = from_mapping(
        WorkerConfig,
        {"engine": "sim", "num_blocks": 99, "block_tokens": 8, "model_name": "m", "sim": {"max_model_len": 512}},
    )
    engine = build_engine(config, LocalMemory)
    assert (engine.model.name, engine.model.max_model_len, engine.layout.block_tokens) == ("m", 512, 8)
    assert engine.memory.blocks.shape == (99, 128)
    engine.close()


def test_impossible_settings_name_their_key() -> None:
    config = from_mapping(WorkerConfig, {"engine": "sim", "max_num_batched_tokens": 32, "max_num_seqs": 64})
    with pytest.raises(ConfigError) as caught:
        build_engine(config, LocalMemory)
    assert caught.value.key == "engine.max_num_batched_tokens"


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed here")
def test_a_missing_engine_package_is_a_config_error_that_says_what_to_install() -> None:
    with pytest.raises(ConfigError) as caught:
        build_engine(from_mapping(WorkerConfig, {"engine": "vllm"}), LocalMemory)
    assert "vllm" in caught.value.message


def test_fingerprints_differ_in_every_field_of_a_layout() -> None:
    layout = KVLayout("rev", "bf16", 16, 30, 3, 64, 16 * 30 * 3 * 64 * 4)
    others = [
        KVLayout("rev2", "bf16", 16, 30, 3, 64, 368_640),
        KVLayout("rev", "fp32", 16, 30, 3, 64, 368_640),
        KVLayout("rev", "bf16", 32, 30, 3, 64, 368_640),
        KVLayout("rev", "bf16", 16, 30, 3, 64, 368_640, order="head,layer"),
        KVLayout("rev", "bf16", 16, 30, 3, 64, 368_640, tp_size=2),
        KVLayout("rev", "bf16", 16, 30, 3, 64, 368_640, deterministic=True),
    ]
    assert len({fingerprint(layout), *map(fingerprint, others)}) == 7
    assert fingerprint(layout) == fingerprint(KVLayout("rev", "bf16", 16, 30, 3, 64, 368_640))


@pytest.mark.torch_model
@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_torch_workers_hand_over_and_give_the_tokens_of_one_alone(transport: str) -> None:
    config = {"engine": "torch", "dtype": "fp32", "num_blocks": 128, "transports": [transport], "chunk_tokens": 100}
    async with worker_process("prefill", **config) as p, worker_process("decode", **config) as d:
        prefill, decode = await RouterSession.open(p.address), await RouterSession.open(d.address)
        pair = Pair(None, None, prefill, decode)
        name = prefill.hello.worker.model.name
        for length in (5, 250):
            prompt = tuple(1000 + (37 * i) % 9000 for i in range(length))
            params = SamplingParams(temperature=0.7, seed=11, max_tokens=8, ignore_eos=True)
            request = Request(f"torch-{length}", name, prompt, params)
            handed = await pair.run(request)
            assert handed == await decode.submit(request, Phase.FULL).result()
            assert handed == await prefill.submit(request, Phase.FULL).result()
        await prefill.close()
        await decode.close()


def test_the_cache_policy_is_the_configs() -> None:
    config = from_mapping(WorkerConfig, {"engine": "sim", "cache_policy": "hazard", "num_blocks": 8})
    engine = build_engine(config, LocalMemory)
    request = Request("r", engine.model.name, tuple(range(40)), SamplingParams(max_tokens=2, ignore_eos=True))
    for handle in range(1, 5):
        engine.submit(request, handle, Phase.FULL)
        cached = [stats.num_cached_tokens for _ in range(4) for stats in engine.step().output.prompts]
        assert cached == [32 if handle > 1 else 0]
    assert isinstance(cache_policy(config), HazardPolicy)
    assert cache_policy(from_mapping(WorkerConfig, {"engine": "sim"})) is None
    with pytest.raises(ConfigError):
        from_mapping(WorkerConfig, {"cache_policy": "best"})
    engine.close()
