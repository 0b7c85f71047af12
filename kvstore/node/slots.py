"""Which slots of the pool are free, and which to take so that one request's blocks lie in few runs.

Each run is one transfer: on every transport tried, few large ranges moved about twice as fast as many small ones. So
a request goes on behind its previous block if it can, else into the smallest free run that holds it whole, and what
is given back merges with its free neighbours.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence

from kvstore.eviction.base import require


def runs_of(slots: Iterable[int]) -> list[tuple[int, int]]:
    """(first slot, length) of each run of neighbours, ascending."""
    runs: list[tuple[int, int]] = []
    for slot in sorted(slots):
        if runs and slot == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((slot, 1))
    return runs


class SlotAllocator:
    """Free runs, found by start, by end and by size. A call costs O(log runs) and the shift of a short array."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.free = 0
        self._is_free = bytearray(count)
        self._length: dict[int, int] = {}
        """Start of a free run -> its length."""
        self._start: dict[int, int] = {}
        """End (exclusive) of a free run -> its start."""
        self._sizes: list[tuple[int, int]] = []
        """(length, start) of each free run, ascending."""
        self.give(range(count))

    def take(self, count: int, after: int | None = None) -> list[int]:
        """`count` slots, best from behind `after`. Raises `ValueError` when fewer are free."""
        if count > self.free:
            raise ValueError(f"{count} slots wanted, {self.free} free")
        taken: list[int] = []
        if after is not None and after + 1 in self._length:
            taken += self._cut(after + 1, count)
        while len(taken) < count:
            taken += self._cut(self._best(count - len(taken)), count - len(taken))
        return taken

    def take_below(self, limit: int, count: int) -> list[int]:
        """Up to `count` slots of one run that ends at `limit` or before; of the smallest that is long enough, else of
        the longest. Empty when there is no such run."""
        runs = [(length, start) for start, length in self._length.items() if start + length <= limit]
        if not runs or not count:
            return []
        enough = [run for run in runs if run[0] >= count]
        return list(self._cut((min(enough) if enough else max(runs))[1], count))

    def _best(self, count: int) -> int:
        """Start of the smallest run that holds `count`, else of the largest."""
        at = bisect_left(self._sizes, (count, 0))
        return self._sizes[min(at, len(self._sizes) - 1)][1]

    def _cut(self, start: int, count: int) -> Sequence[int]:
        length = self._drop(start)
        used = min(length, count)
        if used < length:
            self._add(start + used, length - used)
        self._is_free[start : start + used] = bytes(used)
        self.free -= used
        return range(start, start + used)

    def give(self, slots: Iterable[int]) -> None:
        """Raises `ValueError` for a slot that is free already."""
        for start, length in runs_of(slots):
            if any(self._is_free[start : start + length]):
                raise ValueError(f"slots {start} to {start + length - 1}: one of them is free already")
            self._is_free[start : start + length] = b"\x01" * length
            self.free += length
            if start + length in self._length:
                length += self._drop(start + length)
            if start in self._start:
                start = self._start[start]
                length += self._drop(start)
            self._add(start, length)

    @property
    def largest_run(self) -> int:
        return self._sizes[-1][0] if self._sizes else 0

    def is_free(self, slot: int) -> bool:
        return bool(self._is_free[slot])

    def _add(self, start: int, length: int) -> None:
        self._length[start] = length
        self._start[start + length] = start
        insort(self._sizes, (length, start))

    def _drop(self, start: int) -> int:
        length = self._length.pop(start)
        del self._start[start + length]
        del self._sizes[bisect_left(self._sizes, (length, start))]
        return length

    def check_integrity(self) -> None:
        """Linear. Raises `IntegrityError`."""
        listed = [slot for start, length in self._length.items() for slot in range(start, start + length)]
        require(len(listed) == len(set(listed)) == self.free, "a slot stands in two free runs, or the count is wrong")
        require(all(self._is_free[slot] for slot in listed), "a run holds a slot that is taken")
        require(sum(self._is_free) == self.free, "a free slot stands in no run")
        require(sorted((n, s) for s, n in self._length.items()) == self._sizes, "the order by size is out of step")
        require(not self._start.keys() & self._length.keys(), "two free runs are neighbours and not merged")
