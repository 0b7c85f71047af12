"""Moving lists of buffers over a blocking socket, and the frames of the tcp transport.

One connection serves one region. The client opens with a `HELLO` that carries the region's secret token; then it
sends requests one at a time: header, ranges, and for a write the bytes. The server answers each with a status, and
for a read the bytes, in the order of the ranges. All integers are little-endian.

    HELLO    magic 4s, version u16, channel u16, region id u64, token 32s
    REQUEST  magic 4s, operation u16, zero u16, number of ranges u32, zero u32, payload bytes u64
    RANGE    offset u64, length u64
    STATUS   magic 4s, status u32, payload bytes u64
"""

from __future__ import annotations

import socket
import ssl
import struct
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from pdserve.errors import PeerLost, TransferTimeout

MAGIC = b"PDKV"
VERSION = 1
HELLO = struct.Struct("<4sHHQ32s")
REQUEST = struct.Struct("<4sHHIIQ")
STATUS = struct.Struct("<4sIQ")
RANGE_BYTES = 16
FEW_RANGES = 8
"""Up to here plain Python is faster than numpy."""
READ, WRITE = 1, 2
OK, REFUSED = 0, 1
CHANNELS = {"tcp": 0, "gloo": 1, "nccl": 2}
"""By what the payload goes: both sides must mean the same one."""
RANGE = struct.Struct("<QQ")
MAX_RANGES = 4096
"""Ranges a request: bounds what a server allocates for one (64 KiB)."""
_IOV = 512
"""Buffers a system call; Linux allows 1,024 (IOV_MAX)."""


class Channel(Protocol):
    """What carries a connection's payload: the stream itself, or something that was made by it."""

    def send(self, buffers: Sequence[memoryview | bytes]) -> None: ...

    def receive(self, buffers: Sequence[memoryview]) -> None: ...

    def close(self) -> None: ...


class Stream:
    """A socket that sends and fills whole buffers, and fails when nothing moves for `progress_timeout_s`.

    Plain sockets block in the kernel with SO_RCVTIMEO / SO_SNDTIMEO, so that one call moves megabytes; TLS sockets
    use Python's own timeout. Any other thread may `abort` it.
    """

    def __init__(self, sock: socket.socket, progress_timeout_s: float) -> None:
        self._sock = sock
        self._tls = isinstance(sock, ssl.SSLSocket)
        self._timeout_s = progress_timeout_s
        self.aborted = False
        if self._tls:
            sock.settimeout(progress_timeout_s)
        else:
            sock.settimeout(None)
            interval = struct.pack("@ll", int(progress_timeout_s), int(progress_timeout_s % 1 * 1e6))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, interval)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, interval)

    def send(self, buffers: Sequence[memoryview | bytes]) -> None:
        """Send all of them. Raises `PeerLost`, `TransferTimeout`."""
        views = [memoryview(b) for b in buffers if len(b)]
        first = 0
        while first < len(views):
            first = _advance(views, first, self._call(self._send_some, views, first))

    def receive(self, buffers: Sequence[memoryview]) -> None:
        """Fill all of them. Raises `PeerLost`, `TransferTimeout`."""
        views = [b for b in buffers if len(b)]
        first = 0
        while first < len(views):
            count = self._call(self._receive_some, views, first)
            if not count:
                raise PeerLost("the peer closed the connection")
            first = _advance(views, first, count)

    def receive_bytes(self, count: int) -> memoryview:
        """Exactly `count` bytes."""
        view = memoryview(bytearray(count))
        self.receive([view])
        return view

    def await_bytes(self, buffer: memoryview) -> int:
        """Sleep without a limit until something comes, then take what is there, up to the buffer's size; returns how
        much. Wakes once a time-out for nothing. Raises `PeerLost`."""
        while True:
            try:
                if self.aborted:
                    raise PeerLost("the connection was closed here")
                count = self._sock.recv_into(buffer)
            except (BlockingIOError, TimeoutError):
                continue
            except OSError as error:
                raise PeerLost(f"the connection to the peer broke: {error}") from error
            if not count:
                raise PeerLost("the peer closed the connection")
            return count

    def abort(self) -> None:
        """Wake and fail whoever uses the stream; the socket itself is closed by `close`."""
        self.aborted = True
        try:
            # not SSLSocket's own shutdown: it would let a call under way go on in plain text
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)
        except OSError:
            pass  # not connected any more

    def peer_gone(self) -> bool:
        """The peer has closed its side, or is dead; bytes that came before are left where they are."""
        try:
            return not socket.socket.recv(self._sock, 1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        self._sock.close()

    def _send_some(self, views: list[memoryview], first: int) -> int:
        if self._tls:
            return self._sock.send(views[first])
        return self._sock.sendmsg(views[first : first + _IOV])

    def _receive_some(self, views: list[memoryview], first: int) -> int:
        if self._tls:
            return self._sock.recv_into(views[first])
        if len(views) - first == 1:
            return self._sock.recv_into(views[first], 0, socket.MSG_WAITALL)
        return self._sock.recvmsg_into(views[first : first + _IOV], 0, socket.MSG_WAITALL)[0]

    def _call(self, operation: Callable[[list[memoryview], int], int], views: list[memoryview], first: int) -> int:
        started = time.monotonic()
        try:
            if self.aborted:
                raise PeerLost("the connection was closed here")
            return operation(views, first)
        except (BlockingIOError, TimeoutError) as error:
            waited = time.monotonic() - started
            raise TransferTimeout(f"the peer moved no byte for {waited:.1f} s (limit {self._timeout_s} s)") from error
        except OSError as error:
            raise PeerLost(f"the connection to the peer broke: {error}") from error


Upgrade = Callable[[Stream, socket.socket, bool], Channel]
"""Makes a connection's channel once the peer was let in; true on the serving side. Raises `PeerLost`,
`TransferTimeout`."""


def plain(stream: Stream, sock: socket.socket, serving: bool) -> Channel:
    """The payload goes by the connection."""
    return stream


def _advance(views: list[memoryview], first: int, count: int) -> int:
    """Drop `count` bytes from the front; returns the first buffer that is not done."""
    while first < len(views) and count >= len(views[first]):
        count -= len(views[first])
        first += 1
    if count:
        views[first] = views[first][count:]
    return first


def tune(sock: socket.socket, buffer_bytes: int, user_timeout_s: float) -> None:
    """No Nagle, large buffers, and a dead host noticed within the timeout although nothing is sent."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(user_timeout_s * 1000))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    if buffer_bytes:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
