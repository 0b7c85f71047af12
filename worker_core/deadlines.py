"""Every deadline of a worker behind one timer: a heap, not a task for each request."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable

GRAIN_S = 0.005
"""Deadlines this close together fire in one go."""


class Deadlines:
    """Calls `expired(key)` when a key's time is up. Removal is lazy: O(1), the heap entry is skipped later."""

    def __init__(self, expired: Callable[[int], None]) -> None:
        self._expired = expired
        self._heap: list[tuple[float, int]] = []
        self._due: dict[int, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._due)

    def set(self, key: int, after_s: float) -> None:
        """Start (or move) the key's deadline."""
        due = asyncio.get_running_loop().time() + after_s
        self._due[key] = due
        heapq.heappush(self._heap, (due, key))
        if self._heap[0][1] == key:
            self._arm()

    def clear(self, key: int) -> None:
        """The key needs no deadline any more. Unknown keys are ignored."""
        self._due.pop(key, None)
        if len(self._heap) > 64 and len(self._heap) > 4 * len(self._due):
            self._heap = [(due, known) for known, due in self._due.items()]
            heapq.heapify(self._heap)

    def close(self) -> None:
        self._due.clear()
        self._heap.clear()
        if self._timer is not None:
            self._timer.cancel()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(self._heap[0][0], self._fire)

    def _fire(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time() + GRAIN_S
        while self._heap and self._heap[0][0] <= now:
            due, key = heapq.heappop(self._heap)
            if self._due.get(key) == due:
                del self._due[key]
                self._expired(key)
        if self._heap and self._timer is None:
            self._arm()
