"""Requests that found no worker while one is known that may come soon: it connects, restarts, or is being replaced.

A worker that crashed is back within seconds, and in a rolling update the old one may have said farewell just before
the new one is connected. What falls into that moment waits here for a bounded time instead of being refused. To
everybody else it stands in the placer's queue: it is counted there, can be cancelled, and keeps its deadline.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from pdserve.errors import NoWorker, PdserveError
from pdserve.types import Role
from router.scheduling.base import Ask


class Grace:
    """`expects` tells whether a worker of a role may come; `again` is called when those that rest should be tried once
    more; `count` hears how each wait ended: "found", "not_found", or "ended" (cancelled, or past its deadline)."""

    def __init__(
        self,
        grace_s: float,
        loop: asyncio.AbstractEventLoop,
        *,
        expects: Callable[[Role], bool],
        again: Callable[[], None],
        count: Callable[[str], None],
    ) -> None:
        self._grace_s = grace_s
        self._loop = loop
        self._expects = expects
        self._again = again
        self._count = count
        self._until: dict[Ask, float] = {}
        """Of each that found no worker and has not ended; the loop's time. Those that came first end first."""
        self._resting: dict[Ask, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def takes(self, ask: Ask, error: PdserveError) -> bool:
        """Whether it may wait though this refuses it: then it is given back by `wake`."""
        if not isinstance(error, NoWorker) or not self._may_wait(error.leg):
            return False
        now = self._loop.time()
        until = self._until.setdefault(ask, now + self._grace_s)
        if until <= now:
            return False
        self._resting[ask] = None
        self._arm(until)
        return True

    def _arm(self, until: float) -> None:
        """Of those that rest only: one that was put back into the queue may wait there past its time."""
        if self._timer is not None:
            if self._timer.when() <= until:
                return
            self._timer.cancel()
        self._timer = self._loop.call_at(until, self._on_timer)

    def _may_wait(self, leg: str | None) -> bool:
        """A prefill worker may be refused for want of a decode worker that could go on."""
        roles = (Role.DECODE,) if leg == Role.DECODE.value else tuple(Role)
        return self._grace_s > 0 and any(self._expects(role) for role in roles)

    def wake(self) -> list[Ask]:
        """Those that rest, to be tried again: the fleet has changed, or somebody's time is over."""
        resting, self._resting = list(self._resting), {}
        return resting

    def end(self, ask: Ask, outcome: str) -> None:
        """It waits no more. Those that never did are ignored."""
        self._resting.pop(ask, None)
        if self._until.pop(ask, None) is not None:
            self._count(outcome)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _on_timer(self) -> None:
        self._timer = None
        if self._resting:
            self._again()
