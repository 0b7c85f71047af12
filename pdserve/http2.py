"""HTTP/2 as one gRPC call needs it: a connection with a single stream, on the event loop's own transport.

`pdserve.rpc_stream` builds the session stream on it. `grpc.aio` hands every message through a thread and a socket pair
of its own: 74 µs of CPU for each message that is read at 1,000 a second, where this takes 16 (Python 3.11, uvloop,
loopback). The peer may be any gRPC server. Frames and rules are RFC 9113's; headers are packed by `hpack`.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import hpack

Headers = Sequence[tuple[str, str]]

STREAM_ID = 1
"""Of our only stream: the first that a client may open."""
WINDOW_BYTES = 1 << 20
"""What a peer may send before we have taken it from the socket."""
MAX_FRAME_BYTES = 1 << 20
"""Of frames that we read (the protocol's own default is 16 KiB, and its limit 16 MiB)."""

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 5, 6, 7, 8, 9
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
ENABLE_PUSH, INITIAL_WINDOW_SIZE, PEER_MAX_FRAME_SIZE = 2, 4, 5
CANCEL = 8
_DEFAULT_WINDOW = 65_535
_DEFAULT_FRAME = 16_384
_U32 = struct.Struct(">I")
_SETTING = struct.Struct(">HI")


class Http2Error(Exception):
    """The peer breaks the protocol; the connection is of no more use."""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Whether a silent peer lives: it is asked after an interval without a word from it (in gRPC's servers a thread of
    the library's answers, so one that computes is not silent), and given up after `missed` of them in a row. Our own
    pauses cost one at most: the next interval begins when the last was looked at, and what came meanwhile counts."""

    interval_s: float = 5.0
    missed: int = 3


class CallEvents(Protocol):
    """What a call is told. Plain calls on the loop, in the order of the wire; after `on_end` or `on_lost` nothing."""

    def on_headers(self, headers: Headers) -> None:
        """The response's head, or its trailers."""
        ...

    def on_data(self, data: bytes) -> None:
        """Bytes of the response's body, as they were framed."""
        ...

    def on_end(self) -> None:
        """The peer has said all."""
        ...

    def on_room(self) -> None:
        """All that was sent has left; it had had to wait for the peer's window."""
        ...

    def on_lost(self, reason: str) -> None:
        """The connection or the stream broke."""
        ...


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    size = len(payload)
    return b"%c%c%c%c%c%b%b" % (size >> 16, size >> 8 & 255, size & 255, kind, flags, _U32.pack(stream_id), payload)


class Http2Call(asyncio.Protocol):
    """One request whose body goes on while its response comes: `send` until `end`, events until the end."""

    def __init__(self, headers: Headers, events: CallEvents, heartbeat: Heartbeat | None = None) -> None:
        self._headers = headers
        self._events = events
        self._heartbeat = heartbeat or Heartbeat()
        self._transport: asyncio.Transport | None = None
        self._rest = b""
        self._block: tuple[int, bytes] | None = None
        """Flags and bytes of a header block that goes on in CONTINUATION frames."""
        self._decoder = hpack.Decoder(max_header_list_size=1 << 16)
        self._num_unacknowledged = 0
        self._connection_window = _DEFAULT_WINDOW
        self._stream_window = _DEFAULT_WINDOW
        self._peer_initial_window = _DEFAULT_WINDOW
        self._peer_max_frame = _DEFAULT_FRAME
        self._unsent = bytearray()
        self._end_due = False
        self._over = False
        self._heard = True
        self._num_missed = 0
        self._timer: asyncio.TimerHandle | None = None
        self._goodbye = ""
        self._handlers: dict[int, Callable[[int, int, bytes], None]] = {
            HEADERS: self._on_headers_frame,
            CONTINUATION: self._on_continuation,
            RST_STREAM: self._on_reset,
            SETTINGS: self._on_settings,
            PUSH_PROMISE: self._on_push,
            PING: self._on_ping,
            GOAWAY: self._on_goaway,
            WINDOW_UPDATE: self._on_window,
        }

    # ---- what the owner asks for ----

    @property
    def room(self) -> bool:
        """Nothing waits: what is sent now leaves at once."""
        return not self._unsent and self._transport is not None

    def send(self, data: bytes) -> None:
        """Bytes of the request's body. They wait here while the peer's window is closed: see `room`."""
        size = len(data)
        if (
            not self._unsent
            and size <= self._peer_max_frame
            and size <= self._stream_window
            and size <= self._connection_window
            and self._transport is not None
        ):
            self._stream_window -= size
            self._connection_window -= size
            self._transport.write(frame(DATA, 0, STREAM_ID, data))
        else:
            self._unsent += data
            self._push()

    def pause(self) -> None:
        """Take nothing more from the peer for now: its window closes."""
        if self._transport is not None and not self._over:
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._transport is not None and not self._over:
            self._transport.resume_reading()

    def end(self) -> None:
        """The request is complete, once what waits has left."""
        self._end_due = True
        self._push()

    def abort(self) -> None:
        """End the stream and the connection. No event follows. Idempotent."""
        if self._over:
            return
        self._over = True
        if self._transport is not None:
            self._transport.write(frame(RST_STREAM, 0, STREAM_ID, _U32.pack(CANCEL)))
            self._transport.close()

    # ---- the transport's calls ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._over:
            self._transport.abort()
            return
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        settings = [(ENABLE_PUSH, 0), (INITIAL_WINDOW_SIZE, WINDOW_BYTES), (PEER_MAX_FRAME_SIZE, MAX_FRAME_BYTES)]
        block = hpack.Encoder().encode(self._headers)
        self._transport.write(
            PREFACE
            + frame(SETTINGS, 0, 0, b"".join(_SETTING.pack(*setting) for setting in settings))
            + frame(WINDOW_UPDATE, 0, 0, _U32.pack(WINDOW_BYTES - _DEFAULT_WINDOW))
            + frame(HEADERS, END_HEADERS, STREAM_ID, block)
        )
        self._arm()
        self._push()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        reason = f"the connection broke: {exc}" if exc is not None else "the connection was closed"
        self._lose(f"{reason} ({self._goodbye})" if self._goodbye else reason)

    def data_received(self, data: bytes) -> None:
        """Hot path: one call for what one read brought."""
        self._heard = True
        if self._rest:
            data = self._rest + data
        position, end = 0, len(data)
        try:
            while end - position >= 9 and not self._over:
                length = data[position] << 16 | data[position + 1] << 8 | data[position + 2]
                if length > MAX_FRAME_BYTES:
                    raise Http2Error(f"a frame of {length} bytes")
                start = position + 9
                if end - start < length:
                    break
                position = start + length
                self._on_frame(data[start - 6], data[start - 5], data[start - 4 : start], data[start:position])
        except (Http2Error, hpack.HPACKError, struct.error, IndexError) as error:
            self._lose(f"the peer breaks HTTP/2: {error}")
        self._rest = data[position:] if position < end else b""

    # ---- frames ----

    def _on_frame(self, kind: int, flags: int, stream_id: bytes, payload: bytes) -> None:
        if self._block is not None and kind != CONTINUATION:
            raise Http2Error("a header block is broken off")
        if kind == DATA:
            self._on_data(flags, payload)
        elif (handler := self._handlers.get(kind)) is not None:
            handler(flags, _U32.unpack(stream_id)[0] & 0x7FFFFFFF, payload)

    def _on_data(self, flags: int, payload: bytes) -> None:
        self._num_unacknowledged += len(payload)
        if self._num_unacknowledged > WINDOW_BYTES // 2:
            self._acknowledge()
        self._events.on_data(_unpadded(payload) if flags & PADDED else payload)
        if flags & END_STREAM:
            self._finish()

    def _acknowledge(self) -> None:
        if self._num_unacknowledged > WINDOW_BYTES:
            raise Http2Error("more data than the window allows")
        increment = _U32.pack(self._num_unacknowledged)
        self._num_unacknowledged = 0
        self._write(frame(WINDOW_UPDATE, 0, 0, increment) + frame(WINDOW_UPDATE, 0, STREAM_ID, increment))

    def _on_headers_frame(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id != STREAM_ID:
            raise Http2Error(f"headers on the stream {stream_id}")
        if flags & PADDED:
            payload = _unpadded(payload)
        self._on_block(flags, payload[5:] if flags & PRIORITY else payload)

    def _on_continuation(self, flags: int, _stream_id: int, payload: bytes) -> None:
        if self._block is None:
            raise Http2Error("a continuation of nothing")
        before, block = self._block
        if len(block) > MAX_FRAME_BYTES:
            raise Http2Error("a header block without end")
        self._block = None
        self._on_block(before | flags & END_HEADERS, block + payload)

    def _on_block(self, flags: int, block: bytes) -> None:
        if not flags & END_HEADERS:
            self._block = flags, block
            return
        headers = [(str(header[0]), str(header[1])) for header in self._decoder.decode(block)]
        self._events.on_headers(headers)
        if flags & END_STREAM:
            self._finish()

    def _on_reset(self, _flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id == STREAM_ID:
            self._lose(f"the peer reset the stream (code {_U32.unpack(payload)[0]})")

    def _on_settings(self, flags: int, _stream_id: int, payload: bytes) -> None:
        if flags & ACK:
            return
        for key, value in _SETTING.iter_unpack(payload):
            if key == INITIAL_WINDOW_SIZE:
                self._stream_window += value - self._peer_initial_window
                self._peer_initial_window = value
            elif key == PEER_MAX_FRAME_SIZE:
                self._peer_max_frame = value
        self._write(frame(SETTINGS, ACK, 0))
        self._push()

    def _on_push(self, _flags: int, _stream_id: int, _payload: bytes) -> None:
        raise Http2Error("a push, though we allow none")

    def _on_ping(self, flags: int, _stream_id: int, payload: bytes) -> None:
        if not flags & ACK:
            self._write(frame(PING, ACK, 0, payload))

    def _on_goaway(self, _flags: int, _stream_id: int, payload: bytes) -> None:
        """A peer that drains says so and lets the stream run; one that never took it up does not."""
        self._goodbye = payload[8:].decode("utf-8", "replace")
        if _U32.unpack(payload[:4])[0] & 0x7FFFFFFF < STREAM_ID:
            self._lose(f"the peer refused the call ({self._goodbye})")

    def _on_window(self, _flags: int, stream_id: int, payload: bytes) -> None:
        increment = _U32.unpack(payload)[0] & 0x7FFFFFFF
        if stream_id == 0:
            self._connection_window += increment
        elif stream_id == STREAM_ID:
            self._stream_window += increment
        if self._unsent:
            self._push()

    # ---- sending what waits ----

    def _push(self) -> None:
        if self._transport is None or self._over:
            return
        waited = bool(self._unsent)
        while self._unsent:
            size = min(len(self._unsent), self._peer_max_frame, self._stream_window, self._connection_window)
            if size <= 0:
                return
            self._write(frame(DATA, 0, STREAM_ID, bytes(self._unsent[:size])))
            del self._unsent[:size]
            self._stream_window -= size
            self._connection_window -= size
        if self._end_due:
            self._end_due = False
            self._write(frame(DATA, END_STREAM, STREAM_ID))
        if waited:
            self._events.on_room()

    def _write(self, data: bytes) -> None:
        if self._transport is not None and not self._over:
            self._transport.write(data)

    # ---- the end ----

    def _finish(self) -> None:
        if not self._over:
            self._over = True
            self._close()
            self._events.on_end()

    def _lose(self, reason: str) -> None:
        if not self._over:
            self._over = True
            self._close()
            self._events.on_lost(reason)

    def _close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    # ---- a peer that is silent ----

    def _arm(self) -> None:
        self._heard = False
        self._timer = asyncio.get_running_loop().call_later(self._heartbeat.interval_s, self._check_alive)

    def _check_alive(self) -> None:
        reading = self._transport is not None and self._transport.is_reading()
        self._num_missed = 0 if self._heard or not reading else self._num_missed + 1
        if self._num_missed < self._heartbeat.missed:
            if self._num_missed == 1:  # TCP repeats it; several at once, when the peer wakes, are taken for an attack
                self._write(frame(PING, 0, 0, bytes(8)))
            self._arm()
        else:
            self._lose(f"the peer was silent for {self._num_missed * self._heartbeat.interval_s:g} s")
            if self._transport is not None:
                self._transport.abort()


def _unpadded(payload: bytes) -> bytes:
    padding = payload[0]
    if padding >= len(payload):
        raise Http2Error("more padding than payload")
    return payload[1 : len(payload) - padding]
