"""What the store's side of a worker asks of the engine: commands, run in the engine's thread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from pdserve.engine.base import HandoverEngine, ImportTarget, KVCache


def _cache(engine: HandoverEngine) -> KVCache:
    """The worker made sure at start that the engine has one."""
    return cast(KVCache, engine)


def open_fill(handle: int, keys: Sequence[bytes], first_block: int, engine: HandoverEngine) -> ImportTarget | None:
    return _cache(engine).cache_open(handle, keys, first_block)


def commit_fill(handle: int, num_blocks: int, engine: HandoverEngine) -> None:
    _cache(engine).cache_commit(handle, num_blocks)


def drop_fill(handle: int, engine: HandoverEngine) -> None:
    _cache(engine).cache_drop(handle)


def lend(keys: Sequence[bytes], engine: HandoverEngine) -> tuple[int, ...] | None:
    return _cache(engine).cache_lend(keys)


def take_back(blocks: Sequence[int], engine: HandoverEngine) -> None:
    _cache(engine).cache_return(blocks)
