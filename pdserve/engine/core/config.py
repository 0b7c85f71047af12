"""Settings of the engine core: frozen, checked once, passed to `LocalEngine`."""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class CoreConfig:
    """Raises `ConfigError` naming the key that is out of range."""

    num_blocks: int
    """KV pool, in blocks of `layout.block_tokens` tokens. No default: only the worker knows its memory."""
    max_num_seqs: int = 64
    """Sequences that run in one step. Bounds the step's latency and the runner's buffers."""
    max_num_batched_tokens: int = 2048
    """Tokens computed in one step, decodes first: vLLM's default for serving."""
    chunk_tokens: int = 512
    """Of one prompt in one step. Small chunks leave sooner (hand-over overlaps the compute) and delay decodes less;
    large ones compute more efficiently."""
    prefix_cache: bool = True
    watermark: float = 0.01
    """Part of the pool that admission leaves free while others run, so that they can grow before they preempt."""
    staging_blocks: int = 0
    """Host hand-over area of a device pool, in blocks; 0: a quarter of the pool. Not used when the pool itself is
    host memory."""

    def __post_init__(self) -> None:
        _check(self.num_blocks >= 1, "num_blocks", "must be at least 1")
        _check(self.max_num_seqs >= 1, "max_num_seqs", "must be at least 1")
        _check(self.chunk_tokens >= 1, "chunk_tokens", "must be at least 1")
        _check(
            self.max_num_batched_tokens > self.max_num_seqs,
            "max_num_batched_tokens",
            "must exceed max_num_seqs, or prompts wait for ever behind decodes",
        )
        _check(0.0 <= self.watermark < 1.0, "watermark", "must be at least 0 and below 1")
        _check(self.staging_blocks >= 0, "staging_blocks", "must be 0 or more")


def _check(ok: bool, key: str, rule: str) -> None:
    if not ok:
        raise ConfigError(f"engine.{key} {rule}", key=f"engine.{key}")
