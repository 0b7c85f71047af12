"""The `KVCache` part of the engine: staging as a prefix cache that a store fills and copies from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence

from pdserve.engine.base import ImportTarget
from pdserve.engine.vllm.fills import Fills
from pdserve.engine.vllm.news import CacheNews
from pdserve.engine.vllm.requests import Live
from pdserve.engine.vllm.saves import Saves
from pdserve.engine.vllm.staging import StagingPool


class StagedCache(ABC):
    """What the engine inherits; it makes the parts."""

    _staging: StagingPool
    _news: CacheNews
    _fills: Fills
    _saves: Saves
    _caches: bool
    """Whether vLLM takes up prefixes at all."""
    _live: dict[int, Live]
    _waiting: deque[Live]
    _filling: dict[int, Live]

    @abstractmethod
    def _start(self, live: Live) -> None: ...

    @abstractmethod
    def _admit(self) -> None: ...

    def cache_open(self, handle: int, keys: Sequence[bytes], first_block: int = 0) -> ImportTarget | None:
        return self._fills.open(handle, keys, first_block) if self._caches and not self._waiting else None

    def cache_commit(self, handle: int, num_blocks: int) -> None:
        self._fills.commit(handle, num_blocks)
        self._fill_ended(handle)

    def cache_drop(self, handle: int) -> None:
        self._fills.close(handle, open_too=True)
        self._fill_ended(handle)

    def _fill_ended(self, handle: int) -> None:
        live = self._filling.pop(handle, None)
        if live is not None:
            self._start(live)
        self._admit()

    def cache_lend(self, keys: Sequence[bytes]) -> tuple[int, ...] | None:
        return tuple(self._staging.hold(keys)) or None

    def cache_return(self, blocks: Sequence[int]) -> None:
        self._staging.retire_blocks(blocks)
        self._admit()

    def cached_keys(self) -> list[bytes]:
        """Every key that vLLM's cache or staging can find."""
        return self._news.keys()

    def check_integrity(self) -> None:
        """Raises `AssertionError` if the books of the staging area do not add up."""
        lives = set(self._live.values())
        chunks = (blocks for live in lives for blocks in live.chunks.values())
        own = (live.blocks[-(-live.num_exported // self._staging.block_tokens) :] for live in lives)
        self._staging.check_integrity([*chunks, *own, *self._saves.holders(), *self._fills.holders()])
