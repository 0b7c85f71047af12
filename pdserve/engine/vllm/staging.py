"""Who owns which block of the staging area, and which slot of the board.

Blocks are given lowest number first, so that a request's blocks tend to lie side by side and move as one range. Giving
a block raises its generation before anything is written: a peer that still reads the former owner's bytes notices.
What vLLM may still touch is *retired*: it is given back once the transfers that touch it have ended.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

from pdserve.engine.base import KVMemory
from pdserve.engine.vllm.board import TransferBoard


@dataclass(slots=True)
class _Retired:
    blocks: list[int]
    slot: int | None
    waits_for: set[int]
    """Slots whose transfers have not been seen to end. Seen once is enough: the slot may be used again."""


class StagingPool:
    """Free lists of blocks and slots. One thread."""

    def __init__(self, memory: KVMemory, board: TransferBoard) -> None:
        self.memory, self.board = memory, board
        self._blocks = list(range(len(memory.generations)))
        self._slots = list(range(board.num_slots))
        self._retired: list[_Retired] = []

    @property
    def num_blocks(self) -> int:
        return len(self.memory.generations)

    @property
    def num_free_blocks(self) -> int:
        return len(self._blocks)

    @property
    def num_free_slots(self) -> int:
        return len(self._slots)

    @property
    def retiring(self) -> bool:
        """Whether something waits for vLLM to let go of it."""
        return bool(self._retired)

    def allocate(self, num_blocks: int, num_slots: int) -> tuple[list[int], list[int]] | None:
        """(blocks, slots), or None while there is no room for all of them."""
        if num_blocks > len(self._blocks) or num_slots > len(self._slots):
            return None
        blocks = [heapq.heappop(self._blocks) for _ in range(num_blocks)]
        self.memory.generations[blocks] += 1
        slots = [heapq.heappop(self._slots) for _ in range(num_slots)]
        for slot in slots:
            self.board.start(slot)
        return blocks, slots

    def retire_blocks(self, blocks: Iterable[int], slots: Iterable[int] = ()) -> None:
        """Give blocks back as soon as the transfers of these slots have ended: now, or at a `collect`."""
        self._retire(_Retired(list(blocks), None, set(slots)))

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
            for block in entry.blocks:
                heapq.heappush(self._blocks, block)
            if entry.slot is not None:
                heapq.heappush(self._slots, entry.slot)

    def _has_ended(self, entry: _Retired) -> bool:
        entry.waits_for = {slot for slot in entry.waits_for if not self.board.ended(slot)}
        return not entry.waits_for

    def check_integrity(self) -> None:
        """Raises `AssertionError` if a block or slot is free twice, or free and retired."""
        blocks = self._blocks + [block for entry in self._retired for block in entry.blocks]
        slots = self._slots + [entry.slot for entry in self._retired if entry.slot is not None]
        assert len(blocks) == len(set(blocks)), "a block was given back twice"
        assert len(slots) == len(set(slots)), "a slot was given back twice"
