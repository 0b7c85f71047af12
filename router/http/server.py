"""The HTTP server: sockets, connections, deadlines and drain. What is served is `routes`' business.

server = HttpServer(core, limits, metrics=render, version="0.1.0")
port = await server.start("127.0.0.1", 8000)
...
await server.drain(grace_s=30)
await server.close()
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import formatdate

from pdserve.errors import Draining
from router.base import Core
from router.http.connection import Connection
from router.http.exchange import Exchange
from router.http.limits import HttpLimits
from router.http.routes import Routes

_BACKLOG = 2048
"""Connections that the kernel holds before we accept them; it caps this at `net.core.somaxconn`."""


@dataclass(frozen=True, slots=True)
class AccessRecord:
    """One answered request. Holds nothing that a prompt or an answer contained."""

    request_id: str
    method: str
    path: str
    status: int
    duration_s: float
    streamed: bool


class HttpServer:
    """Serves OpenAI's HTTP API over a core. `access_log`, if given, is called once an answer is written."""

    def __init__(
        self,
        core: Core,
        limits: HttpLimits | None = None,
        *,
        metrics: Callable[[], bytes] = bytes,
        version: str = "",
        tls: ssl.SSLContext | None = None,
        access_log: Callable[[AccessRecord], None] | None = None,
    ) -> None:
        self.limits = limits or HttpLimits()
        self.connections: set[Connection] = set()
        self.draining = False
        self.date_line = b""
        self.dispatch: Callable[[Exchange], None] = _answer_refusals(
            Routes(core, self.limits, metrics=metrics, version=version).dispatch
        )
        self._tls = tls
        self._access_log = access_log
        self._server: asyncio.Server | None = None
        self._sweep: asyncio.TimerHandle | None = None
        self._leaving: set[Connection] = set()
        self._all_gone = asyncio.Event()

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port, which matters when 0 was asked for. Raises `OSError` when it is taken."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: Connection(self, loop), host, port, ssl=self._tls, backlog=_BACKLOG
        )
        self._run_sweep(loop)
        bound: int = self._server.sockets[0].getsockname()[1]
        return bound

    async def drain(self, grace_s: float) -> None:
        """Let what runs finish; then, or after `grace_s`, stop accepting and end the rest with `Draining` (flushed for
        at most `linger_s`). Newcomers are answered until then (the core refuses their requests): a 503 tells probes
        and balancers more than a reset."""
        self.draining = True
        for connection in list(self.connections):
            connection.drain()
        await self._wait_gone(set(self.connections), grace_s)
        if self._server is not None:
            self._server.close()
        for connection in list(self.connections):
            connection.kill(Draining("The server is going away; send the request again"))
        await self._wait_gone(set(self.connections), self.limits.linger_s)

    async def close(self) -> None:
        """Drop every connection. Idempotent."""
        self.draining = True
        if self._server is not None:
            self._server.close()
        for connection in list(self.connections):
            connection.abort()
        await self._wait_gone(set(self.connections), None)
        if self._sweep is not None:
            self._sweep.cancel()

    async def _wait_gone(self, leaving: set[Connection], timeout_s: float | None) -> None:
        """Until these have been lost, or for as long as allowed."""
        self._leaving = leaving
        self._all_gone.clear()
        if not leaving:
            return
        try:
            await asyncio.wait_for(self._all_gone.wait(), timeout_s)
        except TimeoutError:
            return

    def _run_sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        """The one timer of all connections."""
        now = loop.time()
        self.date_line = f"date: {formatdate(usegmt=True)}\r\n".encode()
        for connection in list(self.connections):
            connection.check_deadlines(now)
        self._sweep = loop.call_later(self.limits.sweep_s, self._run_sweep, loop)

    # the connections' calls

    def answered(self, exchange: Exchange) -> None:
        if self._access_log is None:
            return
        duration_s = asyncio.get_running_loop().time() - exchange.started_s
        self._access_log(
            AccessRecord(
                exchange.request_id, exchange.method, exchange.path, exchange.status, duration_s, exchange.streaming
            )
        )

    def gone(self, connection: Connection) -> None:
        self._leaving.discard(connection)
        if not self._leaving:
            self._all_gone.set()


def _answer_refusals(dispatch: Callable[[Exchange], None]) -> Callable[[Exchange], None]:
    def answer(exchange: Exchange) -> None:
        if exchange.refusal is None:
            dispatch(exchange)
        else:
            status, error = exchange.refusal
            exchange.reply_error(error, status)

    return answer
