"""What an engine needs before vLLM starts: vLLM itself, and a staging area."""

from __future__ import annotations

import os
from typing import Any

from pdserve.engine.base import KVMemory, KVMemoryFactory
from pdserve.engine.vllm.settings import VllmSettings
from pdserve.errors import ConfigError, EngineFailed, PdserveError
from pdserve.types import KVLayout

INSTALL_HINT = "pip install vllm (deploy/test-vllm.sh shows how on CPU)"


def import_vllm() -> tuple[Any, Any, Any]:
    """Only an engine that is made needs vLLM. Raises `ConfigError`."""
    # A worker's stdout is for its ready line; nobody reads on, and vLLM's processes would stall on a full pipe.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    # On CPU each engine would bind its threads to the same first cores, all workers of a host to one.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    try:
        from pdserve.engine.vllm.driver import VllmDriver
        from pdserve.engine.vllm.model import finish_config, plan_model
    except ImportError as error:
        raise ConfigError(f"engine vllm cannot be used here ({error}): {INSTALL_HINT}", key="engine") from error
    return plan_model, finish_config, VllmDriver


def start_error(error: Exception, refusal: str) -> PdserveError:
    """Why vLLM did not start. `refusal`: what our connector wrote on the board (key, message); vLLM itself tells only
    that a process of its ended."""
    if refusal:
        key, _, message = refusal.partition("\n")
        return ConfigError(message, key=key)
    return EngineFailed(f"vLLM did not start: {error}")


def make_memory(factory: KVMemoryFactory, settings: VllmSettings, layout: KVLayout, max_model_len: int) -> KVMemory:
    """Staging that holds at least one request of full length: one that could never be admitted would wait for ever."""
    num_blocks = settings.staging_blocks or settings.staging_bytes // layout.block_bytes
    needed = -(-max_model_len // layout.block_tokens)
    if num_blocks < needed:
        raise ConfigError(
            f"{num_blocks} blocks cannot hold one request of {max_model_len} tokens: give {needed} blocks of "
            f"{layout.block_bytes} bytes (num_blocks or kv_memory_bytes), or lower max_model_len",
            key="num_blocks" if settings.staging_blocks else "kv_memory_bytes",
        )
    memory = factory(num_blocks, layout.block_bytes)
    if not hasattr(memory, "name"):
        raise ConfigError("vllm needs hand-over memory that its processes can map: transport shm", key="transports")
    return memory
