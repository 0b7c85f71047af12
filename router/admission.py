"""Whether one more request may come in: bounds on those under way and on those that wait, and an honest `Retry-After`
beyond them."""

from __future__ import annotations

from pdserve.errors import Draining, Overloaded

SMOOTHING = 0.05
"""Weight of the newest request in the mean duration: about the last 20 count."""
MIN_RETRY_AFTER_S = 0.1
FIRST_GUESS_S = 1.0
"""Duration assumed before any request has ended."""


class Admission:
    """Counts the requests under way, waiting ones included."""

    def __init__(self, max_inflight: int, max_waiting: int) -> None:
        self._max_inflight = max_inflight
        self._max_waiting = max_waiting
        self._mean_duration_s = FIRST_GUESS_S
        self.num_inflight = 0
        self.draining = False

    def enter(self, num_waiting: int, queue_s: float, max_queue_s: float) -> None:
        """`num_waiting` stand in queues; this one would for about `queue_s`, and may for `max_queue_s`. Raises
        `Draining` or `Overloaded`."""
        if self.draining:
            raise Draining("this router is going away; send the request to another one")
        if self.num_inflight >= self._max_inflight:
            raise Overloaded(
                f"{self.num_inflight} requests are under way, the limit is {self._max_inflight}",
                retry_after_s=max(self.retry_after_s, queue_s),
            )
        if num_waiting >= self._max_waiting:
            raise Overloaded(
                f"{num_waiting} requests wait for a worker, the limit is {self._max_waiting}",
                leg="queue",
                retry_after_s=max(MIN_RETRY_AFTER_S, queue_s),
            )
        if queue_s > max_queue_s:
            raise Overloaded(
                f"it would wait about {queue_s:.1f} s for a worker, the limit is {max_queue_s:g} s",
                leg="queue",
                retry_after_s=max(MIN_RETRY_AFTER_S, queue_s - max_queue_s),
            )
        self.num_inflight += 1

    def is_full(self, num_waiting: int) -> bool:
        """One more would be refused for want of room."""
        return self.num_inflight >= self._max_inflight or num_waiting >= self._max_waiting

    def leave(self, duration_s: float) -> None:
        self.num_inflight -= 1
        self._mean_duration_s += SMOOTHING * (duration_s - self._mean_duration_s)

    @property
    def retry_after_s(self) -> float:
        """By Little's law a place falls free every (mean duration / limit) seconds."""
        return max(MIN_RETRY_AFTER_S, self._mean_duration_s / self._max_inflight)
