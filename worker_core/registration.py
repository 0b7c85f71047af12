"""A worker's place in the list of workers (`pdserve.registry`): entered when it serves, left when it drains.

Redis is never waited for: while it is away the worker serves on, and enters itself again once it answers.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from pdserve.config import RegistryConfig
from pdserve.errors import ConfigError
from pdserve.tasks import end_task
from pdserve.types import WorkerInfo

if TYPE_CHECKING:
    from pdserve.registry import WorkerList

RENEWALS = 3
"""In a time to live: two may be lost."""
FIRST_RETRY_S = 0.2

log = logging.getLogger("pdserve.worker")


def make_registration(config: RegistryConfig, info: WorkerInfo) -> Registration:
    """Raises `ConfigError` for a URL that is none, and where Redis's client is not installed."""
    try:
        from pdserve.registry import FAILURES, WorkerList
    except ImportError as error:
        raise ConfigError("registry needs the extra: pip install 'pdserve[redis]'", key="registry.url") from error
    return Registration(WorkerList(config), info, config.ttl_s / RENEWALS, FAILURES)


class Registration:
    """`start` once the worker serves, `leave` when it drains, `close` in any case."""

    def __init__(
        self, workers: WorkerList, info: WorkerInfo, every_s: float, failures: tuple[type[Exception], ...]
    ) -> None:
        self._list = workers
        self._entry = (info.worker_id, info.incarnation)
        self._address = info.address
        self._every_s = every_s
        self._failures = failures
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._renew())

    async def leave(self) -> None:
        """Routers hear of it before a new request could come; they also do on their streams. Never raises."""
        await self._stop()
        try:
            await self._list.write(*self._entry, "")
        except self._failures as error:
            log.warning("could not leave the list of workers", extra={"error": str(error)})

    async def close(self) -> None:
        await self._stop()
        await self._list.close()

    async def _stop(self) -> None:
        if self._task is not None:
            await end_task(self._task)
            self._task = None

    async def _renew(self) -> None:
        retry_s = FIRST_RETRY_S
        failing = superseded = False
        while True:
            try:
                ours = await self._list.write(*self._entry, self._address)
            except self._failures as error:
                if not failing:
                    log.warning("the list of workers can't be reached", extra={"error": str(error)})
                failing = True
                await asyncio.sleep(retry_s)
                retry_s = min(2 * retry_s, self._every_s)
                continue
            if not ours and not superseded:
                log.error("another worker has this one's name: give each a worker_id of its own")
            failing, superseded, retry_s = False, not ours, FIRST_RETRY_S
            await asyncio.sleep(self._every_s)
