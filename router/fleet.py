"""All workers of a router: one session each, kept up for as long as discovery names the address.

Connecting, greeting and backing off happen here; a connected worker is a `router.session.Link`, and `links` is what
the scheduler chooses from.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterator

from pdserve.errors import PdserveError, ProtocolMismatch, WorkerLost
from pdserve.rpc import Channel, Tls
from pdserve.types import ModelInfo, Role
from pdserve.wire import common_version
from pdserve.wire.session import SESSION, RouterHello
from router.discovery import Discovery
from router.scheduling.filters import compatible
from router.session import Link, SessionStream

HELLO_TIMEOUT_S = 10.0
"""For a worker that accepted the stream to say who it is; as long as a worker waits for the router's."""
FIRST_BACKOFF_S = 0.05

log = logging.getLogger(__name__)


class Fleet:
    """Keeps the sessions. `on_change` is called whenever a worker has come, gone, begun to drain or changed its role;
    `on_lost` when one has gone without having told so."""

    def __init__(
        self,
        discovery: Discovery,
        hello: RouterHello,
        *,
        tls: Tls | None,
        max_backoff_s: float,
        on_change: Callable[[], None] = lambda: None,
        on_lost: Callable[[Link], None] = lambda link: None,
    ) -> None:
        self._discovery = discovery
        self._hello = hello
        self._tls = tls
        self._max_backoff_s = max_backoff_s
        self._on_change = on_change
        self._on_lost = on_lost
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._watcher: asyncio.Task[None] | None = None
        self.links: list[Link] = []
        self.version = 0
        """Grows with every change of `links` and of what a worker says of itself."""

    def start(self) -> None:
        self._watcher = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """End every stream; the workers cancel what is left on them."""
        tasks = [*self._keepers.values(), *([self._watcher] if self._watcher else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ---- what is there ----

    def of_model(self, model: str, role: Role) -> list[Link]:
        """Connected workers that take new requests for a model in a role."""
        return [
            link
            for link in self.links
            if link.info.role is role and link.info.model.name == model and not link.draining
        ]

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

    def _changed(self) -> None:
        self.version += 1
        self._on_change()

    # ---- sessions ----

    async def _watch(self) -> None:
        async for addresses in self._discovery.watch():
            for address in self._keepers.keys() - addresses:
                self._keepers.pop(address).cancel()
            for address in sorted(addresses - self._keepers.keys()):
                self._keepers[address] = asyncio.create_task(self._keep(address))

    async def _keep(self, address: str) -> None:
        """Connect, serve, and again; the wait doubles up to its bound, with jitter so that routers don't march in
        step, and starts anew after each good connection."""
        channel = Channel(address, tls=self._tls)
        backoff = FIRST_BACKOFF_S
        try:
            while True:
                try:
                    await self._serve(channel)
                except PdserveError as error:
                    level = logging.WARNING if isinstance(error, ProtocolMismatch) else logging.INFO
                    log.log(level, "worker at %s: %s", address, error)
                    backoff = min(2 * backoff, self._max_backoff_s)
                except Exception:
                    log.exception("the session with the worker at %s broke", address)
                    backoff = self._max_backoff_s
                else:
                    backoff = FIRST_BACKOFF_S
                await asyncio.sleep(backoff * random.uniform(0.5, 1.0))
        finally:
            await channel.close()

    async def _serve(self, channel: Channel) -> None:
        """One connection. Raises when it could not be made; returns when it has ended."""
        stream = channel.open(SESSION)
        try:
            link = await self._greet(stream, channel.address)
        except BaseException:
            stream.cancel()
            raise
        self.links.append(link)
        self._changed()
        log.info("worker %s (%s) at %s is connected", link.info.worker_id, link.info.role.value, channel.address)
        try:
            await link.run()
        except PdserveError as error:
            log.warning("worker %s at %s is lost: %s", link.info.worker_id, channel.address, error)
        finally:
            self.links.remove(link)
            if not link.draining:
                self._on_lost(link)
            self._changed()

    async def _greet(self, stream: SessionStream, address: str) -> Link:
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                update = await stream.read()
        except TimeoutError as error:
            raise WorkerLost(f"the worker at {address} sent no hello in {HELLO_TIMEOUT_S:g} s") from error
        if update is None or update.hello is None:
            raise ProtocolMismatch(f"the worker at {address} did not begin with a hello")
        common_version(update.hello.protocol_min, update.hello.protocol_max)
        link = Link(update.hello.worker, stream, self._hello, self._changed)
        if update.draining:
            link.draining = True
        return link
