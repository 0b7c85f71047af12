"""The event queue and its clock. Events of one instant run in the order in which they were planned."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush


class Event:
    """A planned call; `cancel` it as long as it has not run."""

    __slots__ = ("action", "at_s")

    def __init__(self, at_s: float, action: Callable[[], None]) -> None:
        self.at_s = at_s
        self.action: Callable[[], None] | None = action

    def cancel(self) -> None:
        self.action = None


class EventQueue:
    """Virtual time. `now` starts at 0 and only moves forward, to the next event."""

    def __init__(self) -> None:
        self.now = 0.0
        self.num_run = 0
        self._heap: list[tuple[float, int, Event]] = []
        self._planned = 0

    def clock(self) -> float:
        """Seconds, for whatever takes a clock."""
        return self.now

    def at(self, at_s: float, action: Callable[[], None]) -> Event:
        """Run `action` then; a time that is over counts as now."""
        event = Event(max(at_s, self.now), action)
        self._planned += 1
        heappush(self._heap, (event.at_s, self._planned, event))
        return event

    def after(self, delay_s: float, action: Callable[[], None]) -> Event:
        return self.at(self.now + delay_s, action)

    def soon(self, action: Callable[[], None]) -> Event:
        """In this instant, after what is planned for it already: `loop.call_soon`."""
        return self.at(self.now, action)

    def run(self, until_s: float = float("inf")) -> None:
        """Until nothing is planned, or `until_s`."""
        while self._heap and self._heap[0][0] <= until_s:
            at_s, _, event = heappop(self._heap)
            action = event.action
            if action is None:
                continue
            self.now, event.action = at_s, None
            self.num_run += 1
            action()
        if until_s != float("inf"):
            self.now = max(self.now, until_s)

    def __len__(self) -> int:
        """Events that are planned, cancelled ones included until their time."""
        return len(self._heap)
