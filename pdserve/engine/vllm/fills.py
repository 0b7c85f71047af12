"""Blocks of the staging area that a store fills (`KVCache`): opened, written by another thread, committed under keys.

vLLM takes what it loads when it starts a request, not later. So a request whose fill is open waits here, not in vLLM;
and blocks before `first_block` that are not staged cannot be computed meanwhile: what is filled behind such a gap is
cached for others. A committed fill is held until its request has started or ended, or somebody needs the room.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pdserve.engine.base import ImportTarget
from pdserve.engine.vllm.news import CacheNews
from pdserve.engine.vllm.staging import StagingPool


@dataclass(slots=True)
class _Fill:
    first_block: int
    keys: Sequence[bytes]
    """Of its blocks."""
    blocks: list[int]
    num_cached: int
    """Leading ones of `blocks` that were staged before."""
    open: bool = True

    @property
    def num_fetched(self) -> int:
        return 0 if self.open else len(self.blocks) - self.num_cached


class Fills:
    """All fills of one engine, by handle."""

    def __init__(self, staging: StagingPool, news: CacheNews) -> None:
        self._staging = staging
        self._news = news
        self._fills: dict[int, _Fill] = {}

    def is_open(self, handle: int) -> bool:
        fill = self._fills.get(handle)
        return fill is not None and fill.open

    def open(self, handle: int, keys: Sequence[bytes], first_block: int) -> ImportTarget | None:
        """See `KVCache.cache_open`."""
        if not 0 <= first_block < len(keys) or self.is_open(handle):
            raise ValueError(f"no blocks to fill, or a fill under way (handle {handle}, first block {first_block})")
        wanted = keys[first_block:]
        cached = self._staging.hold(wanted)
        count = min(len(wanted) - len(cached), self._staging.num_free_blocks)
        if not cached and not count:
            return None
        new, _ = self._staging.allocate(count, 0) or ([], [])
        self.close(handle)
        blocks = [*cached, *new]
        self._fills[handle] = _Fill(first_block, wanted[: len(blocks)], blocks, len(cached))
        return ImportTarget(tuple(blocks), len(cached))

    def commit(self, handle: int, num_blocks: int) -> None:
        """See `KVCache.cache_commit`."""
        fill = self._fills.get(handle)
        if fill is None or not fill.open:
            return
        fill.open = False
        num_blocks = min(max(num_blocks, fill.num_cached), len(fill.blocks))
        self._staging.retire_blocks(fill.blocks[num_blocks:])
        fill.blocks, fill.keys = fill.blocks[:num_blocks], fill.keys[:num_blocks]
        found = [self._staging.publish(block, key) for block, key in zip(fill.blocks, fill.keys, strict=True)]
        self._news.took(handle, fill.first_block, fill.keys, found)

    def close(self, handle: int, *, open_too: bool = False) -> int:
        """The request has started, or ended: what it was given is held no more. A fill that is open stays for its
        writer's sake, unless told otherwise. Returns how many blocks were fetched for it."""
        fill = self._fills.get(handle)
        if fill is None or (fill.open and not open_too):
            return 0
        del self._fills[handle]
        self._staging.retire_blocks(fill.blocks)
        return fill.num_fetched

    def give_way(self) -> bool:
        """End the newest hold that is a mere wish; False if there is none."""
        handle = next((handle for handle in reversed(self._fills) if not self._fills[handle].open), None)
        if handle is None:
            return False
        self.close(handle)
        return True

    def holders(self) -> list[list[int]]:
        return [fill.blocks for fill in self._fills.values()]
