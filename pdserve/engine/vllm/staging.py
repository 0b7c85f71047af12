"""Who owns which block of the staging area, which of them can be found again by key, and who has which board slot.

The books are those of the other engines (`core.blocks`): counts of holders, a free list that is the LRU list of a
prefix cache at the same time, a new generation before a block's new owner writes. So staging is a second prefix cache
beside vLLM's own: prompts that were handed over and blocks that a store brought stay in it until room is needed.

What vLLM may still touch is *retired*: the hold on it ends once the transfers that touch it have ended. A load that
found bad bytes takes the keys of its blocks, from the bad one on, along.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import xxhash

from pdserve.engine.base import KVMemory
from pdserve.engine.core.blocks import BlockManager
from pdserve.engine.vllm.board import Ending, TransferBoard


class StagedBlocks(BlockManager):
    """The books of the staging area."""

    def lose(self, block: int) -> None:
        """Its content is not what its key says; whoever holds it still does."""
        self._forget(block)
        if block in self._free:
            self._free.move_to_end(block, last=False)


@dataclass(slots=True, eq=False)
class _Retired:
    blocks: list[int]
    slot: int | None
    waits_for: set[int]
    """Slots whose transfers have not been seen to end. Seen once is enough: the slot may be used again."""
    first_block: int = 0
    """Position of the first one in the chain that is loaded."""
    first_bad: int | None = None
    """Index of the first block that a load found bad."""


@dataclass(slots=True)
class StagingPool:
    """Blocks, slots and what is retired. One thread."""

    memory: KVMemory
    board: TransferBoard
    block_tokens: int = 16
    verify: bool = True
    """Whether blocks that can be found carry a digest, to be checked when they are loaded."""
    books: StagedBlocks = field(init=False)
    _slots: list[int] = field(init=False)
    _retired: list[_Retired] = field(default_factory=list)
    _digests: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.books = StagedBlocks(self.memory.generations)
        self._slots = list(range(self.board.num_slots))

    @property
    def num_blocks(self) -> int:
        return self.books.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Those that only the prefix cache wants included."""
        return self.books.num_available

    @property
    def num_free_slots(self) -> int:
        return len(self._slots)

    @property
    def retiring(self) -> bool:
        """Whether something waits for vLLM to let go of it."""
        return bool(self._retired)

    def allocate(self, num_blocks: int, num_slots: int) -> tuple[list[int], list[int]] | None:
        """(blocks, slots), or None while there is no room for all of them."""
        if num_blocks > self.books.num_available or num_slots > len(self._slots):
            return None
        blocks = self.books.allocate(num_blocks) if num_blocks else []
        slots = [heapq.heappop(self._slots) for _ in range(num_slots)]
        for slot in slots:
            self.board.start(slot)
        return blocks, slots

    # The prefix cache

    def publish(self, block: int, key: bytes, digest: str | None = None) -> int:
        """The block is whole: it can be found from now on. The block under the key, which may be an earlier one."""
        known = self.books.find(key)
        if known is not None:
            return known
        self.books.publish(block, key)
        if self.verify:
            self._digests[block] = digest or xxhash.xxh3_128_hexdigest(self.memory.blocks[block])
        return block

    def hold(self, keys: Iterable[bytes]) -> list[int]:
        """The longest prefix of the chain that is staged, with one more holder."""
        found = self.books.lookup(keys)
        self.books.acquire(found)
        return found

    def digests(self, blocks: Iterable[int]) -> list[str]:
        """Of published blocks; empty where none is to be checked."""
        return [self._digests.get(block, "") if self.verify else "" for block in blocks]

    # Giving back

    def retire_blocks(self, blocks: Iterable[int], slots: Iterable[int] = (), first_block: int = 0) -> None:
        """One holder less as soon as the transfers of these slots have ended: now, or at a `collect`. `first_block`:
        where in its chain a load of theirs begins."""
        self._retire(_Retired(list(blocks), None, set(slots), first_block))

    def retire_slot(self, slot: int) -> None:
        """Give a slot back as soon as its transfer has ended."""
        self._retire(_Retired([], slot, {slot}))

    def _retire(self, entry: _Retired) -> None:
        self._retired.append(entry)
        self.collect()

    def collect(self) -> None:
        """Free what was retired and has ended. In order: blocks learn of an end before its slot is used again."""
        ended = [entry for entry in self._retired if self._has_ended(entry)]
        for entry in ended:
            self._retired.remove(entry)
            for block in entry.blocks[entry.first_bad :] if entry.first_bad is not None else ():
                self.books.lose(block)
            self.books.free(entry.blocks)
            if entry.slot is not None:
                heapq.heappush(self._slots, entry.slot)

    def _has_ended(self, entry: _Retired) -> bool:
        for slot in [slot for slot in entry.waits_for if self.board.ended(slot)]:
            entry.waits_for.discard(slot)
            if self.board.ending(slot) in (Ending.STALE, Ending.CORRUPT):
                bad = max(0, self.board.num_tokens(slot) // self.block_tokens - entry.first_block)
                entry.first_bad = bad if entry.first_bad is None else min(bad, entry.first_bad)
        return not entry.waits_for

    def check_integrity(self, holders: Iterable[Sequence[int]] = ()) -> None:
        """`holders`: the blocks of every owner. Raises `AssertionError` if the books are not theirs, or a slot is
        free twice, or free and retired."""
        self.books.check_integrity([*holders, *self._retired_blocks()])
        slots = self._slots + [entry.slot for entry in self._retired if entry.slot is not None]
        assert len(slots) == len(set(slots)), "a slot was given back twice"

    def _retired_blocks(self) -> Iterator[Sequence[int]]:
        return (entry.blocks for entry in self._retired)
