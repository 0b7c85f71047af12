"""A bidirectional gRPC call from the client's side, cheap enough for one message an engine step.

The server is an ordinary `pdserve.rpc.RpcServer`. What leaves and arrives are `pdserve.wire` values; every failure is a
`PdserveError`. A reader either awaits messages one by one (`read`) or has them all handed over as they arrive
(`deliver`), which costs no task switch a message.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar
from urllib.parse import unquote

import grpc

from pdserve.errors import PdserveError, ProtocolMismatch, WorkerLost
from pdserve.http2 import Headers, Heartbeat, Http2Call
from pdserve.rpc_errors import DETAILS_KEY, error_from_status
from pdserve.tls import Tls
from pdserve.wire import Method

ReqT = TypeVar("ReqT")
RespT = TypeVar("RespT")

CONNECT_TIMEOUT_S = 5.0
"""For one attempt, TLS included."""
MAX_MESSAGE_BYTES = 256 << 20
"""Of one message that arrives. The largest are a worker's whole prefix cache, 16 bytes a block."""
MAX_UNREAD = 64
"""Messages that wait for `read` before the peer has to."""
_CODES = {code.value[0]: code for code in grpc.StatusCode}


class ClientStream(Generic[ReqT, RespT]):
    """One call over a connection of its own, which is made at once in the background."""

    def __init__(
        self, address: str, method: Method[ReqT, RespT], tls: Tls | None = None, heartbeat: Heartbeat | None = None
    ) -> None:
        self._address = address
        self._method = method
        self._tls = tls
        self._encode = method.encode_request
        self._decode = method.decode_response
        self._loop = asyncio.get_running_loop()
        self._call = Http2Call(self._request_headers(), self, heartbeat)
        self._connecting = self._loop.create_task(self._connect())
        self._inbox: deque[bytes] = deque()
        self._paused = False
        self._partial = bytearray()
        self._take: Callable[[RespT], None] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._room_waiter: asyncio.Future[None] | None = None
        self._headers: dict[str, str] = {}
        self._over = False
        self._error: BaseException | None = None
        self.when_room: Callable[[], None] = lambda: None
        """Called when `room` has become true."""

    def _request_headers(self) -> Headers:
        return [
            (":method", "POST"),
            (":scheme", "http" if self._tls is None else "https"),
            (":path", self._method.path),
            (":authority", self._address),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            ("user-agent", "pdserve"),
        ]

    async def _connect(self) -> None:
        host, _, port = self._address.rpartition(":")
        host = host.strip("[]")
        try:
            context = None if self._tls is None else self._tls.client_context(("h2",))
            name = None if self._tls is None else self._tls.server_name or host
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await self._loop.create_connection(
                    lambda: self._call, host, int(port), ssl=context, server_hostname=name
                )
        except TimeoutError:
            self._finish(WorkerLost(f"UNAVAILABLE: no connection to {self._address} in {CONNECT_TIMEOUT_S:g} s"))
        except (OSError, ValueError) as error:
            self._finish(WorkerLost(f"UNAVAILABLE: cannot connect to {self._address}: {error}"))
        except PdserveError as error:
            self._finish(error)

    # ---- writing ----

    @property
    def room(self) -> bool:
        """Connected, and nothing waits for the peer's window."""
        return self._call.room

    def send(self, request: ReqT) -> None:
        """Hot path. Never waits: what the peer has no window for stays here, so look at `room`. Raises what ended the
        call."""
        if self._over:
            raise self._error or WorkerLost("the stream is closed")
        data = self._encode(request)
        self._call.send(b"\0" + len(data).to_bytes(4, "big") + data)

    async def write(self, request: ReqT) -> None:
        """Returns once the message has left. Raises what ended the call."""
        self.send(request)
        while not self._call.room and not self._over:
            self._room_waiter = self._loop.create_future()
            await self._room_waiter
        if self._error is not None:
            raise self._error

    async def done_writing(self) -> None:
        self._call.end()

    # ---- reading ----

    async def read(self) -> RespT | None:
        """The next message; None when the server has ended the call well. Raises what ended it else."""
        while not self._inbox:
            if self._over:
                if self._error is not None:
                    raise self._error
                return None
            self._waiter = self._loop.create_future()
            await self._waiter
        return self._next()

    def _next(self) -> RespT:
        message = self._inbox.popleft()
        if self._paused and len(self._inbox) < MAX_UNREAD // 2:
            self._paused = False
            self._call.resume()
        return self._decode(message)

    async def deliver(self, take: Callable[[RespT], None]) -> None:
        """Hand each message to `take`, straight from the transport, until the server ends the call. Raises what ends
        it else, and that may be what `take` or the decoding has raised."""
        while self._inbox:
            take(self._next())
        self._take = take
        while not self._over:
            self._waiter = self._loop.create_future()
            await self._waiter
        if self._error is not None:
            raise self._error

    # ---- the end ----

    def cancel(self) -> None:
        """Give the call up: reads and writes raise `WorkerLost`. Idempotent."""
        self._call.abort()
        self._finish(WorkerLost("the stream was cancelled"))

    def fail(self, error: BaseException) -> None:
        """Give it up for a reason: `read` and `deliver` raise this one."""
        self._finish(error)
        self._call.abort()

    def _finish(self, error: BaseException | None) -> None:
        if self._over:
            return
        self._over = True
        self._error = error
        if self._connecting is not asyncio.current_task(self._loop):
            self._connecting.cancel()
        self._wake()

    def _wake(self) -> None:
        for waiter in (self._waiter, self._room_waiter):
            if waiter is not None and not waiter.done():
                waiter.set_result(None)

    # ---- events of the connection ----

    def on_headers(self, headers: Headers) -> None:
        self._headers.update(headers)

    def on_data(self, data: bytes) -> None:
        """Hot path: mostly a frame is one message."""
        if not self._partial and len(data) >= 5 and len(data) - 5 == int.from_bytes(data[1:5], "big"):
            self._on_message(data[0], data[5:])
            return
        partial = self._partial
        partial += data
        while len(partial) >= 5:
            end = 5 + int.from_bytes(partial[1:5], "big")
            if end > MAX_MESSAGE_BYTES:
                self.fail(ProtocolMismatch(f"the peer announces a message of {end} bytes"))
                return
            if len(partial) < end:
                return
            flag, message = partial[0], bytes(partial[5:end])
            del partial[:end]
            self._on_message(flag, message)

    def _on_message(self, compressed: int, message: bytes) -> None:
        if self._over:
            return
        if compressed:
            self.fail(ProtocolMismatch("the peer compresses messages, though nobody asked for it"))
        elif self._take is None:
            self._keep(message)
        else:
            try:
                self._take(self._decode(message))
            except Exception as error:  # noqa: BLE001 - `deliver` raises it where the stream's owner awaits
                self.fail(error)

    def _keep(self, message: bytes) -> None:
        """For `read`. A reader that does not read makes the peer wait."""
        self._inbox.append(message)
        if len(self._inbox) >= MAX_UNREAD and not self._paused:
            self._paused = True
            self._call.pause()
        self._wake()

    def on_end(self) -> None:
        self._finish(self._status())

    def on_room(self) -> None:
        self._wake()
        self.when_room()

    def on_lost(self, reason: str) -> None:
        """A peer that refuses a call at once may close before all of ours is read: what it said still counts."""
        self._finish(self._status() if "grpc-status" in self._headers else WorkerLost(f"UNAVAILABLE: {reason}"))

    def _status(self) -> PdserveError | None:
        """What the trailers say; None: all went well."""
        headers = self._headers
        if "grpc-status" not in headers:
            return WorkerLost(f"UNAVAILABLE: no gRPC status came (HTTP {headers.get(':status', '?')})")
        code = _CODES.get(int(headers["grpc-status"]) if headers["grpc-status"].isdigit() else 2)
        if code is grpc.StatusCode.OK:
            return None
        details = b""
        with contextlib.suppress(binascii.Error, ValueError):
            details = _unbase64(headers.get(DETAILS_KEY, ""))
        return error_from_status(code or grpc.StatusCode.UNKNOWN, unquote(headers.get("grpc-message", "")), details)


def _unbase64(text: str) -> bytes:
    """gRPC leaves the padding out."""
    return base64.b64decode(text + "=" * (-len(text) % 4))
