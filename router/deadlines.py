"""All of a router's deadlines behind one timer, at no cost a token.

A request whose clock runs is looked at when its time may be up; a clock that only bounds *silence* then asks how much
has come since and goes on. So a stream pays once a timeout instead of once a token, and silence is noticed after one
to two timeouts.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from typing import Protocol

MIN_SWEEP = 64
"""Ended entries that are not worth a sweep."""


class Timed(Protocol):
    """Something with a clock running."""

    deadline: float
    """Loop time at which to look at it; infinity when no clock runs."""

    def on_deadline(self, now: float) -> None:
        """`deadline` has passed. Either end, or set a later one."""
        ...


class Deadlines:
    """A heap and one timer. Entries of what has ended, or was put off, are dropped when they come up."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._heap: list[tuple[float, int, Timed]] = []
        self._order = itertools.count()
        self._timer: asyncio.TimerHandle | None = None
        self._num_ended = 0

    def watch(self, timed: Timed) -> None:
        """Call whenever `timed.deadline` was set to an earlier time than before; a later one needs no call."""
        if timed.deadline == float("inf"):
            return
        heapq.heappush(self._heap, (timed.deadline, next(self._order), timed))
        if self._heap[0][2] is timed:
            self._arm()

    def ended(self) -> None:
        """One of those watched needs no clock any more: its `deadline` is infinity. Its entry would keep it in memory
        until its time has come, so the heap is swept once half of it may be such."""
        self._num_ended += 1
        if self._num_ended > MIN_SWEEP and 2 * self._num_ended > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[2].deadline < float("inf")]
            heapq.heapify(self._heap)
            self._num_ended = 0

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._heap.clear()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(self._heap[0][0], self._fire)

    def _fire(self) -> None:
        self._timer = None
        now = self._loop.time()
        while self._heap and self._heap[0][0] <= now:
            timed = heapq.heappop(self._heap)[2]
            if timed.deadline <= now:
                timed.on_deadline(now)
            self.watch(timed)
        if self._heap and self._timer is None:
            self._arm()
