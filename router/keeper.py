"""One worker's session, kept up: connect, greet, serve, back off, and again."""

from __future__ import annotations

import asyncio
import logging
import random
from typing import Protocol

from pdserve.errors import PdserveError, ProtocolMismatch, WorkerLost
from pdserve.rpc import Channel, Heartbeat, Tls
from pdserve.types import Role, WorkerInfo
from pdserve.wire import common_version
from pdserve.wire.session import SESSION, RouterHello
from router.session import Link, SessionStream

HELLO_TIMEOUT_S = 10.0
"""For a worker that accepted the stream to say who it is; as long as a worker waits for the router's."""
FIRST_BACKOFF_S = 0.05

log = logging.getLogger(__name__)


class LinkHolder(Protocol):
    """The fleet."""

    def add(self, link: Link) -> None: ...

    def remove(self, link: Link) -> None: ...

    def changed(self) -> None:
        """A link says something new of itself."""
        ...


class Keeper:
    """Keeps the session with the worker at one address until `retire` or `close`."""

    def __init__(
        self,
        address: str,
        holder: LinkHolder,
        hello: RouterHello,
        tls: Tls | None,
        max_backoff_s: float,
        heartbeat: Heartbeat | None = None,
    ) -> None:
        self._address = address
        self._holder = holder
        self._hello = hello
        self._channel = Channel(address, tls=tls)
        self._max_backoff_s = max_backoff_s
        self._heartbeat = heartbeat
        self._link: Link | None = None
        self._last: WorkerInfo | None = None
        """Who was connected last."""
        self._retired = False
        self.task = asyncio.create_task(self._keep())

    def retire(self) -> None:
        """The address is gone from discovery, as that of a worker that drains is: what runs there may finish."""
        self._retired = True
        if self._link is None:
            self.task.cancel()
        else:
            self._link.leave()

    def recall(self) -> bool:
        """The address is back, as that of a worker whose probe had failed. False: too late, its stream is ending."""
        if self.task.done() or self._link is None or not self._link.stay():
            return False
        self._retired = False
        return True

    def expects(self, model: str, role: Role) -> bool:
        """Nobody is connected, and who comes may be a worker of this model in this role, as far as can be known."""
        last = self._last
        return self._link is None and (last is None or (last.model.name, last.role) == (model, role))

    async def close(self) -> None:
        """End the stream; the worker cancels what is left on it."""
        self.task.cancel()
        await asyncio.wait([self.task])

    async def _keep(self) -> None:
        """The wait doubles up to its bound, with jitter so that routers don't march in step, and starts anew after
        each good connection."""
        backoff_s = FIRST_BACKOFF_S
        try:
            while not self._retired:
                try:
                    await self._serve()
                    backoff_s = FIRST_BACKOFF_S
                except PdserveError as error:
                    level = logging.WARNING if isinstance(error, ProtocolMismatch) else logging.INFO
                    log.log(level, "worker at %s: %s", self._address, error)
                    backoff_s = min(2 * backoff_s, self._max_backoff_s)
                except Exception:
                    log.exception("the session with the worker at %s broke", self._address)
                    backoff_s = self._max_backoff_s
                if not self._retired:
                    await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))
        finally:
            await self._channel.close()

    async def _serve(self) -> None:
        """One connection. Raises when it could not be made; returns when it has ended."""
        stream = self._channel.open(SESSION, self._heartbeat)
        try:
            link = await self._greet(stream)
        except BaseException:
            stream.cancel()
            raise
        self._link = link
        self._holder.add(link)
        try:
            await link.run()
        except PdserveError as error:
            level = logging.INFO if link.draining else logging.WARNING
            log.log(level, "worker %s at %s is gone: %s", link.info.worker_id, self._address, error)
        finally:
            self._link, self._last = None, link.info
            self._holder.remove(link)

    async def _greet(self, stream: SessionStream) -> Link:
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                update = await stream.read()
        except TimeoutError as error:
            raise WorkerLost(f"the worker sent no hello in {HELLO_TIMEOUT_S:g} s") from error
        if update is None or update.hello is None:
            raise ProtocolMismatch("the worker did not begin with a hello")
        common_version(update.hello.protocol_min, update.hello.protocol_max)
        link = Link(update.hello.worker, stream, self._hello, self._holder.changed)
        link.draining = update.draining
        log.info("worker %s (%s) at %s is connected", link.info.worker_id, link.info.role.value, self._address)
        return link
