"""`/healthz`, `/readyz` and `/metrics` over plain HTTP: what kubelet and Prometheus ask of a worker or a store.

The router has a real HTTP stack; this is a dozen lines over `asyncio.start_server`, one answer a connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from pdserve.errors import ConfigError

REQUEST_TIMEOUT_S = 5.0
"""A client that has not sent its request by then is cut off."""
MAX_REQUEST_BYTES = 16 << 10
_PHRASES = {200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed", 503: "Service Unavailable"}


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: bytes
    content_type: str = "text/plain; charset=utf-8"

    def encode(self) -> bytes:
        head = (
            f"HTTP/1.1 {self.status} {_PHRASES[self.status]}\r\nContent-Type: {self.content_type}\r\n"
            f"Content-Length: {len(self.body)}\r\nConnection: close\r\n\r\n"
        )
        return head.encode() + self.body


class StatusServer:
    """Serves fixed paths, each by a plain call."""

    def __init__(self, host: str, port: int, paths: dict[str, Callable[[], Answer]]) -> None:
        self._host = host
        self._port = port
        self._paths = paths
        self._server: asyncio.Server | None = None

    async def start(self) -> int:
        """The bound port. Raises `ConfigError` when the address is taken."""
        try:
            self._server = await asyncio.start_server(self._serve, self._host, self._port, limit=MAX_REQUEST_BYTES)
        except OSError as error:
            where = f"{self._host}:{self._port}"
            raise ConfigError(f"cannot listen on {where}: {error.strerror}", key="http_listen") from error
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(self._answer(head).encode())
                await writer.drain()
        except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
            pass  # a probe that gave up: nobody is left to tell
        finally:
            writer.close()

    def _answer(self, head: bytes) -> Answer:
        parts = head.split(b"\r\n", 1)[0].split(b" ")
        if len(parts) != 3:
            return Answer(400, b"bad request\n")
        if parts[0] != b"GET":
            return Answer(405, b"only GET\n")
        handler = self._paths.get(parts[1].split(b"?", 1)[0].decode("latin-1"))
        return handler() if handler is not None else Answer(404, b"not found\n")
