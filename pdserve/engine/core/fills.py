"""Blocks of the prefix cache that are filled from a store, for a request that needs them next.

A fill holds its blocks from `open` until the request took them into its table or ended. While it is *open* another
thread writes into them, so nothing may touch them; once it is *committed* they are ordinary cached blocks and the hold
is a wish: the scheduler ends it (`give_way`) rather than preempt or keep waiting what could run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pdserve.engine.base import ImportTarget
from pdserve.engine.core.handover_area import HandoverArea
from pdserve.engine.core.news import CacheNews


@dataclass(slots=True)
class Fill:
    """Blocks [first_block, first_block + len(blocks)) of one chain."""

    first_block: int
    keys: Sequence[bytes]
    head: list[int]
    """Held as well: what was cached of the chain before `first_block`."""
    blocks: list[int]
    num_cached: int
    """Leading ones of `blocks` that were cached before; the others are written."""
    area_blocks: list[int]
    """Where those are written."""
    first_fetched: int
    """Block of the chain from which on they came from outside, earlier fills of the same request included."""
    open: bool = True
    wanted: bool = True
    """The request has not ended."""

    @property
    def end(self) -> int:
        return self.first_block + len(self.blocks)


class Fills:
    """All fills of one engine, by handle."""

    def __init__(self, area: HandoverArea, news: CacheNews) -> None:
        self._area = area
        self._pool = area.pool
        self._news = news
        self._fills: dict[int, Fill] = {}

    def __len__(self) -> int:
        return len(self._fills)

    def start(self, handle: int) -> int | None:
        """The block from which on this request should not compute: it was, or is being, fetched."""
        fill = self._fills.get(handle)
        return fill.first_block if fill is not None and fill.blocks else None

    def is_open(self, handle: int) -> bool:
        fill = self._fills.get(handle)
        return fill is not None and fill.open

    def open(self, handle: int, keys: Sequence[bytes], first_block: int, room: int) -> ImportTarget | None:
        """See `KVCache.cache_open`; at most `room` free blocks are taken."""
        before = self._fills.get(handle)
        if not 0 <= first_block < len(keys) or (before is not None and before.open):
            raise ValueError(f"no blocks to fill, or a fill under way (handle {handle}, first block {first_block})")
        head, cached = self._pool.lookup(keys[:first_block]), self._pool.lookup(keys[first_block:])
        num_new = min(len(keys) - first_block - len(cached), self._area.import_room)
        free_cached = sum(not self._pool.is_held(block) for block in (*head, *cached))
        if num_new + free_cached > room or not (cached or num_new):
            return None
        self._pool.acquire([*head, *cached])
        new = self._pool.allocate(num_new) if num_new else []
        area_blocks = self._area.open_import(new)
        assert area_blocks is not None, "import_room told that there is room"
        first_fetched = first_block + len(cached)
        if before is not None:
            first_fetched = min(first_fetched, before.first_fetched)
            self._release(handle)
        blocks = [*cached, *new]
        wanted = keys[first_block : first_block + len(blocks)]
        self._fills[handle] = Fill(first_block, wanted, head, blocks, len(cached), area_blocks, first_fetched)
        return ImportTarget((*cached, *area_blocks), len(cached))

    def commit(self, handle: int, num_blocks: int) -> None:
        """See `KVCache.cache_commit`."""
        fill = self._fills.get(handle)
        if fill is None or not fill.open:
            return
        fill.open = False
        num_blocks = min(max(num_blocks, fill.num_cached), len(fill.blocks))
        num_new = num_blocks - fill.num_cached
        self._area.commit_import(fill.area_blocks[:num_new], fill.blocks[fill.num_cached : num_blocks])
        self._area.abandon_import(fill.area_blocks[num_new:])
        self._pool.free(fill.blocks[num_blocks:])
        fill.blocks = fill.blocks[:num_blocks]
        fill.area_blocks = []
        for index in range(fill.num_cached, num_blocks):
            fill.blocks[index] = self._publish(fill.blocks[index], fill.keys[index])
        self._news.took(handle, fill.first_block, fill.keys[:num_blocks], fill.blocks)
        if not fill.wanted or not fill.blocks:
            self._release(handle)

    def _publish(self, block: int, key: bytes) -> int:
        """The block that is found under the key: this one, or one that somebody else has filled meanwhile."""
        known = self._pool.find(key)
        if known is None:
            self._pool.publish(block, key)
            return block
        self._pool.acquire([known])
        self._pool.free([block])
        return known

    def drop(self, handle: int) -> None:
        """See `KVCache.cache_drop`."""
        fill = self._fills.get(handle)
        if fill is not None:
            if fill.open:
                self._area.abandon_import(fill.area_blocks)
            self._release(handle)

    def close(self, handle: int) -> None:
        """The request has ended. An open fill stays for its writer's sake."""
        fill = self._fills.get(handle)
        if fill is not None and fill.open:
            fill.wanted = False
        elif fill is not None:
            self._release(handle)

    def settle(self, handle: int, num_blocks: int) -> int:
        """The request has taken the first `num_blocks` of its chain from the cache; returns how many of them were
        fetched for it."""
        fill = self._fills.get(handle)
        if fill is None or fill.open:
            return 0
        num_fetched = max(0, min(num_blocks, fill.end) - fill.first_fetched)
        if num_blocks >= fill.end:
            self._release(handle)
        return num_fetched

    def give_way(self) -> bool:
        """End the newest hold that is a mere wish; False if there is none."""
        handle = next((handle for handle in reversed(self._fills) if not self._fills[handle].open), None)
        if handle is None:
            return False
        self._release(handle)
        return True

    def _release(self, handle: int) -> None:
        fill = self._fills.pop(handle)
        self._pool.free([*fill.head, *fill.blocks])

    def pool_blocks(self) -> Iterator[Sequence[int]]:
        return ([*fill.head, *fill.blocks] for fill in self._fills.values())

    def area_blocks(self) -> Iterator[Sequence[int]]:
        return (fill.area_blocks for fill in self._fills.values())
