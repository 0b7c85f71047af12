"""One request and its answer on a connection: either one complete reply, or a stream of server-sent events.

A stream's head is held back until its first event, so that an error before it still has its own HTTP status.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from http import HTTPStatus
from typing import Protocol

from pdserve.errors import PdserveError
from router.http.errors import error_body, error_headers

_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}", re.ASCII)
_PHRASES = {status.value: status.phrase for status in HTTPStatus} | {499: "Client Closed Request"}


_STREAM_HEADERS = (
    ("content-type", "text/event-stream; charset=utf-8"),
    ("cache-control", "no-cache"),
    ("x-accel-buffering", "no"),
)
_STREAM_LINES = "".join(f"{name}: {value}\r\n" for name, value in _STREAM_HEADERS).encode()


class Responder(Protocol):
    """Whoever is producing the answer."""

    def cancel(self) -> None:
        """The client is gone: free everything; nothing more is written."""
        ...

    def fail(self, error: PdserveError) -> None:
        """End the answer with this error, and free everything."""
        ...


class Wire(Protocol):
    """What an exchange needs of its connection."""

    def write(self, data: bytes) -> None: ...

    def head_lines(self) -> bytes:
        """Header lines that every answer has (date)."""
        ...

    @property
    def closing(self) -> bool:
        """The connection takes no further request after this answer."""
        ...

    def finished(self, exchange: Exchange) -> None: ...


class Exchange:
    """A parsed request, and the only way to answer it. `reply*`, `end_stream` and `break_stream` end it."""

    __slots__ = (
        "body",
        "headers",
        "keep_alive",
        "method",
        "path",
        "persistent",
        "query",
        "refusal",
        "request_id",
        "responder",
        "started_s",
        "status",
        "streaming",
        "wire",
    )

    def __init__(
        self,
        wire: Wire,
        method: str,
        target: bytes,
        headers: Mapping[bytes, bytes],
        body: bytes = b"",
        *,
        persistent: bool = True,
        keep_alive: bool = True,
        refusal: tuple[int, PdserveError] | None = None,
    ) -> None:
        self.wire = wire
        self.method = method
        path, _, query = target.partition(b"?")
        self.path = path.decode("latin-1")
        self.query = query
        self.headers = headers
        self.body = body
        self.persistent = persistent
        """HTTP/1.1: chunked answers are understood."""
        self.keep_alive = keep_alive
        self.refusal = refusal
        """What is wrong with the request as HTTP: it is answered, and the connection closed."""
        self.request_id = self._request_id()
        self.responder: Responder | None = None
        self.streaming = False
        self.status = 0
        self.started_s = 0.0

    def header(self, name: bytes) -> str:
        """A header's value by its lower-case name; empty if it is absent."""
        value = self.headers.get(name)
        return value.decode("latin-1") if value else ""

    def _request_id(self) -> str:
        """The client's own id if it can be used in logs and ids, else a new one."""
        given = self.header(b"x-request-id")
        return given if given and _SANE_ID.fullmatch(given) else os.urandom(16).hex()

    # one complete reply

    def reply(
        self,
        status: int,
        body: bytes,
        content_type: str = "application/json",
        headers: Iterable[tuple[str, str]] = (),
    ) -> None:
        """Send a complete answer, and end the exchange."""
        lines = [("content-type", content_type), ("content-length", str(len(body))), *headers]
        head = self._head(status, lines)
        self.wire.write(head if self.method == "HEAD" else head + body)
        self.wire.finished(self)

    def reply_error(
        self, error: PdserveError, status: int | None = None, headers: Iterable[tuple[str, str]] = ()
    ) -> None:
        """Send an error as OpenAI does. `status` replaces the error's own where HTTP has a finer one."""
        status = status or error.http_status
        self.reply(status, error_body(error), headers=[*error_headers(error), *headers])

    # a stream

    def open_stream(self) -> bytes:
        """The head of a stream, to be written together with the first event."""
        self.streaming = True
        if self.persistent and self.keep_alive and not self.wire.closing:
            self.status = 200
            return b"HTTP/1.1 200 OK\r\nx-request-id: %b\r\n%btransfer-encoding: chunked\r\n%b\r\n" % (
                self.request_id.encode("latin-1"),
                _STREAM_LINES,
                self.wire.head_lines(),
            )
        lines = list(_STREAM_HEADERS)
        if self.persistent:
            lines.append(("transfer-encoding", "chunked"))
        else:
            self.keep_alive = False
        return self._head(200, lines)

    @property
    def framing(self) -> Callable[[bytes], bytes]:
        """Wraps events for the wire: one HTTP chunk, or for HTTP/1.0 nothing."""
        return _chunk if self.persistent else bytes

    def end_stream(self, data: bytes) -> None:
        """Write what is left (framed already), and end the exchange."""
        self.wire.write(data + b"0\r\n\r\n" if self.persistent else data)
        self.wire.finished(self)

    def break_stream(self, data: bytes) -> None:
        """Write what is left, and close the connection with the answer visibly incomplete."""
        self.keep_alive = False
        self.wire.write(data)
        self.wire.finished(self)

    def _head(self, status: int, lines: Iterable[tuple[str, str]]) -> bytes:
        self.status = status
        parts = [f"HTTP/1.1 {status} {_PHRASES.get(status, 'Unknown')}\r\nx-request-id: {self.request_id}\r\n"]
        parts += [f"{name}: {value}\r\n" for name, value in lines]
        if self.wire.closing:
            self.keep_alive = False
        if not self.keep_alive:
            parts.append("connection: close\r\n")
        elif not self.persistent:
            parts.append("connection: keep-alive\r\n")
        return "".join(parts).encode("latin-1") + self.wire.head_lines() + b"\r\n"


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)
