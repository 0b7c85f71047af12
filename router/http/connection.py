"""HTTP/1.1 over one transport: parses requests, has them answered one at a time and in order, and bounds the client.

No task belongs to a connection: everything is a callback of the event loop, and deadlines are looked at by the
server's one sweep. A client may pipeline; a request that is broken as HTTP is answered in its turn and ends the
connection.
"""

from __future__ import annotations

import asyncio
import math
import socket
from collections import deque
from collections.abc import Callable
from typing import Protocol, cast

import httptools

from pdserve.errors import InvalidRequest, NotSupported, PayloadTooLarge, PdserveError
from router.http.exchange import Exchange
from router.http.limits import HttpLimits


class Host(Protocol):
    """What a connection needs of its server."""

    limits: HttpLimits
    connections: set[Connection]
    draining: bool
    date_line: bytes

    def dispatch(self, exchange: Exchange) -> None: ...

    def answered(self, exchange: Exchange) -> None: ...

    def gone(self, connection: Connection) -> None: ...


class Connection(asyncio.Protocol):
    """One client. `_active` is being answered, `_queue` waits behind it."""

    write: Callable[[bytes], None]
    """The transport's own `write`: the hot path has no call in between."""
    _fault: tuple[int, PdserveError] | None
    """What is wrong with the request being read, and the status that says so."""

    def __init__(self, host: Host, loop: asyncio.AbstractEventLoop) -> None:
        self._host = host
        self._limits = host.limits
        self._loop = loop
        self._parser = httptools.HttpRequestParser(self)
        self._queue: deque[Exchange] = deque()
        self._queued_bytes = 0
        self._active: Exchange | None = None
        self._lost = False
        self._discarding = False
        self._closing = False
        self._writes_paused = False
        self._reads_paused = False
        self._read_deadline = math.inf
        self._write_deadline = math.inf
        self._in_request = False
        self._fresh = True
        self._continue_due = False
        self._begun_in_feed = False
        self._reset_request()

    # transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.write = self._transport.write
        if len(self._host.connections) >= self._limits.max_connections:
            self._transport.abort()
            return
        self._host.connections.add(self)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._transport.set_write_buffer_limits(high=self._limits.max_unsent_bytes)
        self._wait_idle()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        self._host.connections.discard(self)
        self._drop()
        self._host.gone(self)

    def eof_received(self) -> bool | None:
        """A client that stops sending has gone: half-closed clients are not waited for (nginx does the same)."""
        self._drop()
        return None

    def pause_writing(self) -> None:
        """The client leaves more than `max_unsent_bytes` unread."""
        self._writes_paused = True
        if self._active is not None and self._active.streaming:
            self._loop.call_soon(self._overflow)
        else:
            self._write_deadline = min(self._write_deadline, self._loop.time() + self._limits.write_stall_s)

    def resume_writing(self) -> None:
        self._writes_paused = False
        if not self._closing:
            self._write_deadline = math.inf
        self._advance()

    def _overflow(self) -> None:
        """Not from within `write`: it was called by a sink, and cancelling would call back into the core."""
        self._drop()
        self._transport.abort()

    def _drop(self) -> None:
        self._queue.clear()
        active, self._active = self._active, None
        if active is not None and active.responder is not None:
            active.responder.cancel()

    # parsing

    def data_received(self, data: bytes) -> None:
        if self._discarding:
            return
        if not self._in_request:
            self._begin_request()
        self._begun_in_feed = False
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._discarding = True
        except httptools.HttpParserError as error:
            self._fault = self._fault or (400, InvalidRequest(f"The request is not valid HTTP/1.1: {error}"))
        if self._in_request and not self._begun_in_feed and self._fault is None:
            self._count_overhead(len(data))
        if self._fault is not None:
            self._refuse(*self._fault)
        self._pause_if_full()
        self._advance()

    def _begin_request(self) -> None:
        self._in_request = True
        self._fresh = False
        self._read_deadline = self._loop.time() + self._limits.header_timeout_s

    def _count_overhead(self, num_bytes: int) -> None:
        """Bounds what the parser holds back of an unfinished header or trailer, from the second read on. Chunked
        framing costs at most 7 bytes for each byte of body."""
        self._fed_bytes += num_bytes
        if self._fed_bytes - 8 * self._body_bytes > self._limits.max_header_bytes:
            self._head_too_large()

    def _head_too_large(self) -> None:
        self._fault = (431, InvalidRequest(f"Request line and headers exceed {self._limits.max_header_bytes} bytes"))

    def _reset_request(self) -> None:
        self._url = b""
        self._headers: dict[bytes, bytes] = {}
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._head_bytes = 0
        self._fed_bytes = 0
        self._fault = None

    def on_message_begin(self) -> None:
        if self._fault is None:
            self._reset_request()
            self._begin_request()
            self._begun_in_feed = True

    def on_url(self, url: bytes) -> None:
        self._url += url
        self._head_bytes += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value
        self._head_bytes += len(name) + len(value) + 4
        if self._head_bytes > self._limits.max_header_bytes and self._fault is None:
            self._head_too_large()

    def on_headers_complete(self) -> None:
        if self._fault is not None:
            return
        self._read_deadline = self._loop.time() + self._limits.body_timeout_s
        self._fault = self._head_fault()
        if self._fault is None and b"expect" in self._headers:
            self._continue_due = True
            self._send_continue()

    def _head_fault(self) -> tuple[int, PdserveError] | None:
        headers = self._headers
        if b"host" not in headers and self._parser.get_http_version() != "1.0":
            return 400, InvalidRequest("The Host header is missing")
        if headers.get(b"expect", b"100-continue").lower() != b"100-continue":
            return 417, NotSupported("The only expectation that is met is 100-continue")
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            return 415, NotSupported("Encoded bodies are not supported: send the JSON as it is")
        length = headers.get(b"content-length", b"")
        if length.isdigit() and (len(length) > 18 or int(length) > self._limits.max_body_bytes):
            return self._body_too_large()
        return None

    def _body_too_large(self) -> tuple[int, PdserveError]:
        return 413, PayloadTooLarge(f"The body exceeds {self._limits.max_body_bytes} bytes")

    def on_body(self, body: bytes) -> None:
        if self._fault is not None:
            return
        self._body_bytes += len(body)
        self._body.append(body)
        if self._body_bytes > self._limits.max_body_bytes:
            self._body.clear()
            self._fault = self._body_too_large()

    def on_message_complete(self) -> None:
        if self._fault is not None:
            return
        exchange = self._exchange(keep_alive=self._parser.should_keep_alive() and not self._parser.should_upgrade())
        exchange.started_s = self._loop.time()
        self._queue.append(exchange)
        self._queued_bytes += len(exchange.body)
        self._in_request = False
        self._continue_due = False
        self._read_deadline = math.inf
        self._body = []

    def _exchange(self, *, keep_alive: bool, refusal: tuple[int, PdserveError] | None = None) -> Exchange:
        return Exchange(
            self,
            self._parser.get_method().decode() if self._url else "GET",
            self._target(),
            self._headers,
            b"".join(self._body),
            persistent=self._parser.get_http_version() != "1.0",
            keep_alive=keep_alive,
            refusal=refusal,
        )

    def _target(self) -> bytes:
        """Path and query; the absolute form that proxies send is cut to it."""
        if self._url.startswith(b"/") or b"://" not in self._url:
            return self._url
        return b"/" + self._url.split(b"://", 1)[1].partition(b"/")[2]

    def _refuse(self, status: int, error: PdserveError) -> None:
        """Answer in its turn with this error, take no further input."""
        self._discarding = True
        self._in_request = False
        self._continue_due = False
        self._read_deadline = math.inf
        self._body.clear()
        self._queue.append(self._exchange(keep_alive=False, refusal=(status, error)))

    def _pause_if_full(self) -> None:
        full = len(self._queue) >= self._limits.max_pipelined or self._queued_bytes > self._limits.max_body_bytes
        if full and not self._reads_paused:
            self._reads_paused = True
            self._transport.pause_reading()

    # answering

    @property
    def closing(self) -> bool:
        return self._host.draining

    def head_lines(self) -> bytes:
        return self._host.date_line

    def _advance(self) -> None:
        """Start on the next request if it is its turn."""
        if self._active is not None or self._writes_paused or self._lost or self._closing:
            return
        if not self._queue:
            self._send_continue()
            return
        exchange = self._active = self._queue.popleft()
        self._queued_bytes -= len(exchange.body)
        if self._reads_paused:
            self._reads_paused = False
            self._transport.resume_reading()
        self._host.dispatch(exchange)

    def _send_continue(self) -> None:
        if self._continue_due and self._active is None and not self._queue:
            self._continue_due = False
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def finished(self, exchange: Exchange) -> None:
        """The answer is written. The next request starts from the loop: this may have been called by a sink."""
        if self._active is not exchange:
            return
        self._active = None
        self._host.answered(exchange)
        if exchange.refusal is not None:
            self._linger()
        elif not exchange.keep_alive or (self._host.draining and not self._queue):
            self._close()
        elif self._queue or self._continue_due:
            self._loop.call_soon(self._advance)
        elif not self._in_request:
            self._wait_idle()

    def _wait_idle(self) -> None:
        self._read_deadline = self._loop.time() + self._limits.keep_alive_s

    def _close(self) -> None:
        self._closing = True
        self._discarding = True
        self._queue.clear()
        self._read_deadline = math.inf
        self._write_deadline = self._loop.time() + self._limits.write_stall_s
        self._transport.close()

    def _linger(self) -> None:
        """Closing with input unread would reset the connection, and the client might never see the refusal."""
        self._closing = True
        self._queue.clear()
        self._write_deadline = self._loop.time() + self._limits.linger_s
        if self._transport.can_write_eof():
            self._transport.write_eof()

    # the server's calls

    def check_deadlines(self, now: float) -> None:
        if now >= self._write_deadline:
            self._drop()
            self._transport.abort()
        elif now >= self._read_deadline:
            self._too_slow()

    def _too_slow(self) -> None:
        if self._in_request:
            self._refuse(408, InvalidRequest("The request did not arrive in time"))
            self._advance()
        elif self._active is None and not self._queue:
            self._close()

    def drain(self) -> None:
        """Close if nothing is under way here. Who has only just connected gets a moment more: the first request may
        be on its way, and its 503 says more than a reset."""
        if self._active is not None or self._queue or self._in_request or self._closing:
            return
        if self._fresh:
            self._read_deadline = min(self._read_deadline, self._loop.time() + self._limits.linger_s)
        else:
            self._close()

    def kill(self, error: PdserveError) -> None:
        """Give what runs this error, then close."""
        self._queue.clear()
        active = self._active
        if active is not None and active.responder is not None:
            active.responder.fail(error)
        if not self._lost and not self._closing:
            self._close()

    def abort(self) -> None:
        self._drop()
        self._transport.abort()
