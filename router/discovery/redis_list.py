"""Workers as they wrote themselves into Redis (`pdserve.registry`).

An entry that is missing is no news by itself: Redis may have been flushed or restarted. A worker is taken for gone when
it said so, or when its time, as last read, has run out. That time stands still while Redis can't be reached, and after
it answers again every worker has one whole time to live to enter itself anew.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass

from pdserve.config import RegistryConfig
from pdserve.registry import FAILURES, Entry, WorkerList
from router.discovery.base import AskingDiscovery

POLL_S = 1.0
"""Between two reads when no news come: a worker that died silently is seen this long after its time."""

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Known:
    incarnation: int
    address: str
    until: float


class LastKnown:
    """What was read, and how long it holds. Pure; time comes with each call."""

    def __init__(self, ttl_s: float) -> None:
        self._ttl_s = ttl_s
        self._workers: dict[str, _Known] = {}

    def read(self, entries: list[Entry], now: float) -> frozenset[str]:
        """host:port of the workers after a read at `now`."""
        for entry in entries:
            known = self._workers.get(entry.worker_id)
            if known is None or entry.incarnation >= known.incarnation:
                self._workers[entry.worker_id] = _Known(entry.incarnation, entry.address, now + entry.left_s)
        self._workers = {name: known for name, known in self._workers.items() if known.until > now}
        return frozenset(known.address for known in self._workers.values() if known.address)

    def recovered(self, now: float) -> None:
        """Redis answers again: what it lacks may still be entered anew."""
        for known in self._workers.values():
            known.until = max(known.until, now + self._ttl_s)


class RedisDiscovery(AskingDiscovery):
    """See `router.discovery.base.Discovery`."""

    failures = FAILURES

    def __init__(self, config: RegistryConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises `ConfigError` for a URL that is none."""
        super().__init__()
        self._list = WorkerList(config)
        self._poll_s = min(POLL_S, config.ttl_s / 3)
        self._clock = clock
        self._known = LastKnown(config.ttl_s)

    async def _answers(self) -> AsyncGenerator[frozenset[str]]:
        async with aclosing(self._list.changes(self._poll_s)) as changes:
            async for _ in changes:
                yield await self._read()

    async def _read(self) -> frozenset[str]:
        entries = await self._list.read()
        if self._backoff.failing:
            log.info("Redis answers again")
            self._backoff.reset()
            self._known.recovered(self._clock())
        return self._known.read(entries, self._clock())

    def _note(self, error: Exception) -> None:
        if not self._backoff.failing:
            log.warning("Redis does not answer; the workers known so far stay", extra={"error": str(error)})

    async def _close(self) -> None:
        await self._list.close()
