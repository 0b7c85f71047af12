"""All workers of a router: a keeper for each address that discovery names, and what the connected ones can serve.

A connected worker is a `router.session.Link`; `links` is what the scheduler chooses from.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import aclosing

from pdserve.rpc import Heartbeat, Tls
from pdserve.tasks import end_task
from pdserve.types import ModelInfo, Role
from pdserve.wire.session import RouterHello
from router.discovery import Discovery
from router.keeper import Keeper
from router.scheduling.filters import compatible
from router.session import Link

DISCOVERY_RETRY_S = 5.0

log = logging.getLogger(__name__)


class Fleet:
    """`on_change` is called whenever a worker has come, gone, begun to drain or changed its role; `on_lost` when one
    has gone without having told so."""

    def __init__(
        self,
        discovery: Discovery,
        hello: RouterHello,
        *,
        tls: Tls | None,
        max_backoff_s: float,
        heartbeat: Heartbeat | None = None,
        on_change: Callable[[], None] = lambda: None,
        on_lost: Callable[[Link], None] = lambda link: None,
    ) -> None:
        self._discovery = discovery
        self._hello = hello
        self._tls = tls
        self._max_backoff_s = max_backoff_s
        self._heartbeat = heartbeat
        self._on_change = on_change
        self._on_lost = on_lost
        self._keepers: dict[str, Keeper] = {}
        self._retired: dict[str, Keeper] = {}
        self._watcher: asyncio.Task[None] | None = None
        self.links: list[Link] = []
        self._listeners: list[Callable[[], None]] = []
        self.version = 0
        """Grows with every change of `links` and of what a worker says of itself."""

    def subscribe(self, listener: Callable[[], None]) -> None:
        """`listener` is called at each change, before a new worker's stream is read."""
        self._listeners.append(listener)

    def start(self) -> None:
        self._watcher = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """End every stream; the workers cancel what is left on them."""
        if self._watcher is not None:
            await end_task(self._watcher)
        for keeper in [*self._keepers.values(), *self._retired.values()]:
            await keeper.close()

    async def _watch(self) -> None:
        """Discovery lives through what fails around it; should it break itself, the workers known so far stay."""
        while True:
            try:
                async with aclosing(self._discovery.watch()) as changes:
                    async for addresses in changes:
                        self._follow(addresses)
                return
            except Exception:
                log.exception("discovery broke; it begins anew in %g s", DISCOVERY_RETRY_S)
            await asyncio.sleep(DISCOVERY_RETRY_S)

    def _follow(self, addresses: frozenset[str]) -> None:
        for address in self._keepers.keys() - addresses:
            self._retire(address, self._keepers.pop(address))
        for address in sorted(addresses - self._keepers.keys()):
            retired = self._retired.pop(address, None)
            if retired is not None and retired.recall():
                self._keepers[address] = retired
            else:
                self._keepers[address] = Keeper(
                    address, self, self._hello, self._tls, self._max_backoff_s, self._heartbeat
                )

    def _retire(self, address: str, keeper: Keeper) -> None:
        self._retired[address] = keeper
        keeper.task.add_done_callback(lambda _: self._forget(address, keeper))
        keeper.retire()

    def _forget(self, address: str, keeper: Keeper) -> None:
        if self._retired.get(address) is keeper:
            del self._retired[address]

    # ---- what is there ----

    def of_model(self, model: str, role: Role) -> list[Link]:
        """Connected workers that take new requests for a model in a role."""
        return [
            link
            for link in self.links
            if link.info.role is role and link.info.model.name == model and not link.draining
        ]

    def awaits(self, model: str, role: Role) -> bool:
        """A worker of this role may come soon: one is known and not connected, or one drains, as those do that are to
        be replaced."""
        leaving = (link.info.role is role and link.draining for link in self.links if link.info.model.name == model)
        return any(leaving) or any(keeper.expects(model, role) for keeper in self._keepers.values())

    def pairs(self, model: str) -> Iterator[tuple[Link, Link]]:
        """(prefill, decode) that can hand KV over."""
        for prefill in self.of_model(model, Role.PREFILL):
            for decode in self.of_model(model, Role.DECODE):
                if compatible(prefill.info, decode.info):
                    yield prefill, decode

    def model(self, name: str) -> ModelInfo | None:
        """A model's bounds, the tightest of its workers'; None while nobody serves it."""
        infos = [link.info for link in self.links if link.info.model.name == name]
        return min((info.model for info in infos), key=lambda model: model.max_model_len, default=None)

    # ---- from the keepers ----

    def add(self, link: Link) -> None:
        self.links.append(link)
        self.changed()

    def remove(self, link: Link) -> None:
        self.links.remove(link)
        if not link.draining:
            self._on_lost(link)
        self.changed()

    def changed(self) -> None:
        self.version += 1
        for listener in self._listeners:
            listener()
        self._on_change()
