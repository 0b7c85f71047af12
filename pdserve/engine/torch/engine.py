"""Puts an engine together: model files -> decoder -> runner -> `LocalEngine`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from pdserve.engine.base import KVMemoryFactory
from pdserve.engine.core.blocks import CachePolicy
from pdserve.engine.core.config import CoreConfig
from pdserve.engine.core.engine import LocalEngine
from pdserve.engine.torch.loader import load_decoder
from pdserve.engine.torch.runner import DTYPES, TorchRunner
from pdserve.errors import ConfigError
from pdserve.models import DEFAULT_CACHE_DIR, DEFAULT_MODEL, ResolvedModel, model_info, resolve
from pdserve.tokens import Tokenizer


@dataclass(frozen=True, slots=True)
class TorchEngineConfig:
    """Raises `ConfigError` naming the key that is out of range."""

    model: str = DEFAULT_MODEL
    """The embedded model's name, a folder of safetensors, a .gguf file or a hub id."""
    model_cache_dir: Path = DEFAULT_CACHE_DIR
    dtype: str = "bf16"
    """bf16 or fp32: of weights and of the KV cache. bf16 is twice as fast and half as large."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    max_model_len: int | None = None
    """Tokens of prompt and output together; None: what the model was trained for."""
    block_tokens: int = 16
    """Equal in a whole pool, as block keys and hand-over depend on it. 16 is what vLLM uses too."""
    kv_bytes: int = 1 << 30
    """Memory for the KV pool. 1 GiB holds 46,000 tokens of the embedded model in bf16. Not used with num_blocks."""
    num_blocks: int | None = None
    """KV pool in blocks, instead of kv_bytes."""
    threads: int = 1
    """Torch's threads. On shared cores a step with two threads took 370 ms, with one 48: they wait for each other."""
    deterministic: bool = False
    """Compute every request batch-invariantly, not only those that ask for it."""
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    chunk_tokens: int = 512
    prefix_cache: bool = True

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}", key="dtype")
        for key, value in (("threads", self.threads), ("block_tokens", self.block_tokens), ("kv_bytes", self.kv_bytes)):
            if value < 1:
                raise ConfigError(f"{key} must be at least 1", key=key)


def build_torch_engine(
    config: TorchEngineConfig, memory_factory: KVMemoryFactory, cache_policy: CachePolicy | None = None
) -> LocalEngine:
    """Load the model and make its KV pool. Sets torch's thread count for the process.

    Raises `ConfigError` (model not found or damaged, no such device), `NotSupported` (a model shape that we don't
    compute, by name).
    """
    use_huge_pages()
    torch.set_num_threads(config.threads)
    resolved = resolve(config.model, config.model_cache_dir)
    runner = build_runner(
        resolved,
        dtype=config.dtype,
        device=config.device,
        block_tokens=config.block_tokens,
        max_model_len=config.max_model_len,
        deterministic=config.deterministic,
    )
    core = _core_config(config, runner.layout.block_bytes)
    return LocalEngine(runner, memory_factory, core, cache_policy=cache_policy)


def use_huge_pages() -> None:
    """Have torch ask the kernel for huge pages, which it decides once, at its first allocation: so call it before.
    Decode streams all weights and KV through the TLB; with 4 KiB pages a step takes up to 1.15 times as long."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def build_runner(
    resolved: ResolvedModel,
    *,
    dtype: str = "bf16",
    device: str = "cpu",
    block_tokens: int = 16,
    max_model_len: int | None = None,
    deterministic: bool = False,
) -> TorchRunner:
    """Load a model, without a KV pool yet. Raises as `build_torch_engine` does."""
    info = model_info(resolved, max_model_len)
    decoder = load_decoder(resolved.path, info.max_model_len, DTYPES[dtype], _device(device))
    path = resolved.path
    return TorchRunner(
        decoder, info, dtype, block_tokens, lambda: Tokenizer.load(path).table.shown_bytes, deterministic=deterministic
    )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r}: give cpu, cuda or cuda:N", key="device") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r}: torch sees {torch.cuda.device_count()} CUDA devices", key="device")
    return device


def _core_config(config: TorchEngineConfig, block_bytes: int) -> CoreConfig:
    num_blocks = config.num_blocks or config.kv_bytes // block_bytes
    if num_blocks < 1:
        raise ConfigError(f"kv_bytes holds no block of {block_bytes} bytes", key="kv_bytes")
    return CoreConfig(
        num_blocks=num_blocks,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        chunk_tokens=config.chunk_tokens,
        prefix_cache=config.prefix_cache,
    )
