"""Who holds which block of a KV pool, and what can be found in it again.

Every block is either free or held by one or more owners (sequences, exports, imports): reference counts. A freed
block that carries a key keeps its bytes and stays findable until it is handed to a new owner, so the free list is
at the same time the LRU list of the prefix cache. Handing a block to a new owner adds one to its generation before
anybody can write to it: that is what remote readers check.

Pure bookkeeping: no bytes move here. The scheduler allocates, `handover.py` holds for exports and imports.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from itertools import islice, takewhile
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class OutOfBlocks(RuntimeError):
    """More blocks were asked for than `num_available`: the caller did not check."""


class CachePolicy(Protocol):
    """Names the cached block that is given up next; without one it is the least recently used. A policy of
    `kvstore.eviction` fits; see there for the contract in full. `now` is in seconds."""

    def access(self, keys: Sequence[bytes], now: float, *, extends: bool = False) -> None:
        """A request used this chain, first block first; `extends`: the same request as before."""

    def evict(self, now: float, allowed: Callable[[bytes], bool]) -> bytes | None:
        """The next victim, which it now takes for gone; None when there is none that is allowed to leave."""

    def forget(self, key: bytes) -> None:
        """It left for another reason."""


class BlockManager:
    """Reference counts, free list, prefix cache and reservations over `len(generations)` blocks.

    `generations`: shape [num_blocks], written in place, so it may lie in memory that peers read.
    """

    def __init__(
        self,
        generations: NDArray[np.uint64],
        policy: CachePolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.num_blocks = len(generations)
        self.num_reserved = 0
        self._generations = generations
        self._refs = [0] * self.num_blocks
        self._key_of: list[bytes | None] = [None] * self.num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(self.num_blocks))
        """First to be reused first: blocks without a key, then the least recently used."""
        self._evicted: dict[bytes, None] = {}
        """Keys that were forgotten since `take_evicted`."""
        self._policy = policy
        self._clock = clock

    @property
    def num_available(self) -> int:
        """Free and not reserved."""
        return len(self._free) - self.num_reserved

    def is_held(self, block: int) -> bool:
        return self._refs[block] > 0

    def is_shared(self, block: int) -> bool:
        return self._refs[block] > 1

    def generations_of(self, blocks: Sequence[int]) -> tuple[int, ...]:
        return tuple(self._generations[list(blocks)].tolist())

    # Reservations

    def reserve(self, count: int) -> None:
        """Keep `count` free blocks for someone who takes them later."""
        if count > self.num_available:
            raise OutOfBlocks(f"{count} blocks to reserve, {self.num_available} available")
        self.num_reserved += count

    def unreserve(self, count: int) -> None:
        self.num_reserved -= count

    # Allocation

    def allocate(self, count: int, after: int | None = None) -> list[int]:
        """`count` blocks with one owner each and a new generation, in ascending order, neighbours where possible.

        `after`: a single block is taken next to this one if that costs the cache nothing.
        """
        if count > self.num_available:
            raise OutOfBlocks(f"{count} blocks to allocate, {self.num_available} available")
        blocks = self._pick_one(after) if count == 1 else self._pick(count)
        for block in blocks:
            del self._free[block]
            self._forget(block)
            self._refs[block] = 1
        self._generations[blocks] += np.uint64(1)
        return blocks

    def acquire(self, blocks: Iterable[int]) -> None:
        """One more owner for blocks whose content stays as it is."""
        for block in blocks:
            if not self._refs[block]:
                del self._free[block]
            self._refs[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """One owner less. The last blocks are reused first: the tail of a prefix is worth nothing without its head."""
        for block in reversed(blocks):
            self._refs[block] -= 1
            if self._refs[block] < 0:
                raise RuntimeError(f"block {block} was freed twice")
            if not self._refs[block]:
                self._free[block] = None
                if self._key_of[block] is None:
                    self._free.move_to_end(block, last=False)

    def open_table(self, keys: Iterable[bytes], num_blocks: int, spare: int = 0) -> tuple[list[int], int] | None:
        """A block table of `num_blocks`, as much of it as `keys` find from the cache: (table, number found).
        None if then fewer than `spare` blocks would be left."""
        found = self.lookup(keys)
        num_new = num_blocks - len(found)
        taken = num_new + sum(not self._refs[block] for block in found)
        if taken + spare > self.num_available:
            return None
        self.acquire(found)
        return found + self.allocate(num_new), len(found)

    def _pick_one(self, after: int | None) -> list[int]:
        if after is not None and after + 1 in self._free and self._key_of[after + 1] is None:
            return [after + 1]
        return [next(iter(self._free))] if self._policy is None else self._pick_by_policy(1, self._policy)

    def _pick(self, count: int) -> list[int]:
        """From the oldest free blocks, a few more than needed, those that form the longest runs: the shortest run
        that holds all, else long ones first. The slack bounds both the cost and how far reuse departs from LRU."""
        if self._policy is not None:
            return self._pick_by_policy(count, self._policy)
        slack = min(len(self._free) // 8, 3 * count + 32)
        runs = _runs(sorted(islice(self._free, count + slack)))
        whole = [run for run in runs if len(run) >= count]
        if whole:
            return min(whole, key=len)[:count]
        picked: list[int] = []
        for run in sorted(runs, key=len, reverse=True):
            picked += run[: count - len(picked)]
        return sorted(picked)

    def _pick_by_policy(self, count: int, policy: CachePolicy) -> list[int]:
        """Blocks without a key, which are first on the free list; then victims; at last what the policy never saw."""
        unkeyed = takewhile(lambda block: self._key_of[block] is None, self._free)
        picked = dict.fromkeys(islice(unkeyed, count))
        now = self._clock()
        while len(picked) < count and (key := policy.evict(now, self._is_idle)) is not None:
            if (block := self._block_of.get(key)) is not None:
                picked[block] = None
        rest = list(islice((block for block in self._free if block not in picked), count - len(picked)))
        for block in rest:
            if (unseen := self._key_of[block]) is not None:
                policy.forget(unseen)
        return sorted([*picked, *rest])

    def _is_idle(self, key: bytes) -> bool:
        block = self._block_of.get(key)
        return block is None or not self._refs[block]

    # Prefix cache

    def used(self, keys: Sequence[bytes], *, extends: bool) -> None:
        """A request uses these leading blocks of its chain, all published; `extends`: not for the first time."""
        if self._policy is not None and keys:
            self._policy.access(keys, self._clock(), extends=extends)

    def publish(self, block: int, key: bytes) -> None:
        """The block is full and its content final: findable from now on. The first block under a key stays it."""
        if key not in self._block_of and self._key_of[block] is None:
            self._block_of[key] = block
            self._key_of[block] = key
            self._evicted.pop(key, None)

    def find(self, key: bytes) -> int | None:
        """The block under one key."""
        return self._block_of.get(key)

    def lookup(self, keys: Iterable[bytes]) -> list[int]:
        """Blocks of the longest known prefix of the chain `keys`."""
        found = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def _forget(self, block: int) -> None:
        key = self._key_of[block]
        if key is not None:
            del self._block_of[key]
            self._key_of[block] = None
            self._evicted[key] = None

    @property
    def has_evicted(self) -> bool:
        return bool(self._evicted)

    def take_evicted(self) -> list[bytes]:
        """Keys that were lost since this was last asked, and are not known again."""
        evicted, self._evicted = list(self._evicted), {}
        return evicted

    def keys(self) -> list[bytes]:
        """Everything that can be found."""
        return list(self._block_of)

    # Self-check

    def check_integrity(self, holders: Iterable[Sequence[int]]) -> None:
        """`holders`: the blocks of every owner. Raises `AssertionError` naming what is inconsistent."""
        held = Counter(block for blocks in holders for block in blocks)
        for block, refs in enumerate(self._refs):
            _assert(held[block] == refs, f"block {block} is held by {held[block]} owners but counts {refs}")
            _assert((block in self._free) == (refs == 0), f"block {block} with {refs} owners is on the wrong list")
        for key, block in self._block_of.items():
            _assert(self._key_of[block] == key, f"key {key.hex()} finds block {block}, which has another key")
        keyed = sum(key is not None for key in self._key_of)
        _assert(keyed == len(self._block_of), "a block has a key under which it is not found")
        _assert(0 <= self.num_reserved <= len(self._free), f"{self.num_reserved} reserved of {len(self._free)} free")


def _runs(blocks: list[int]) -> list[list[int]]:
    """Split ascending numbers where they are not neighbours."""
    runs: list[list[int]] = []
    for block in blocks:
        if runs and runs[-1][-1] + 1 == block:
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs


def _assert(ok: bool, message: str) -> None:
    if not ok:
        raise AssertionError(message)
