"""Workers as Kubernetes knows them: a list of EndpointSlices, then a watch that goes on where the last one ended.

A watch that breaks, hangs or is refused is resumed from the last version seen; where the API server has forgotten that
version (410 Gone), and every `resync_s` in any case, everything is listed anew. While the API server is away the last
set stays: a worker that dies meanwhile is noticed by its own stream, one that drains says so on it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Protocol

from pdserve.config import KubernetesConfig
from router.discovery.base import AskingDiscovery, DiscoveryError
from router.discovery.slice_api import Expired
from router.discovery.slices import Slice, SliceList, worker_addresses

log = logging.getLogger(__name__)


class Api(Protocol):
    """`router.discovery.slice_api.SliceApi`, or a script in a test."""

    async def list(self) -> SliceList: ...

    def watch(self, version: str) -> AsyncGenerator[tuple[str, Slice]]: ...

    async def close(self) -> None: ...


class KubernetesDiscovery(AskingDiscovery):
    """See `router.discovery.base.Discovery`."""

    failures = (DiscoveryError,)

    def __init__(self, config: KubernetesConfig, api: Api, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._config = config
        self._api = api
        self._clock = clock
        self._slices: dict[str, Slice] = {}
        self._version = ""
        """Where the next watch begins; empty: nowhere, list first."""
        self._list_at = 0.0

    async def _answers(self) -> AsyncGenerator[frozenset[str]]:
        """One list if it is due, one watch."""
        if not self._version or self._clock() >= self._list_at:
            await self._list()
            yield self._addresses()
        async with aclosing(self._api.watch(self._version)) as events:
            async for kind, each in events:
                self._apply(kind, each)
                self._healthy()
                yield self._addresses()
        self._healthy()

    async def _list(self) -> None:
        listed = await self._api.list()
        self._slices = {each.metadata.name: each for each in listed.items}
        self._version = listed.metadata.resourceVersion
        self._list_at = self._clock() + self._config.resync_s

    def _apply(self, kind: str, each: Slice) -> None:
        self._version = each.metadata.resourceVersion
        if kind == "DELETED":
            self._slices.pop(each.metadata.name, None)
        elif kind in ("ADDED", "MODIFIED"):
            self._slices[each.metadata.name] = each

    def _addresses(self) -> frozenset[str]:
        return worker_addresses(self._slices.values(), self._config.port_name, self._told or frozenset())

    def _healthy(self) -> None:
        """Not after a list alone: a server that lists but can't watch must not be asked in a tight loop."""
        if self._backoff.failing:
            log.info("the Kubernetes API answers again")
        self._backoff.reset()

    def _note(self, error: Exception) -> None:
        if isinstance(error, Expired):
            self._version = ""
        elif not self._backoff.failing:
            log.warning("%s; the workers known so far stay", error)

    async def _close(self) -> None:
        await self._api.close()
