"""Our own bulk transport over tcp: the default between hosts without RDMA.

Blocking sockets in the callers' threads: `sendmsg` straight from the registered memory, `recv_into` straight into
the target array, one request and one status a batch. No event loop, no copy in user space, no CPU while idle. See
`tcp_stream` for the frames and `tcp_server` for the other half.
"""

from __future__ import annotations

import itertools
import secrets
import socket
import ssl
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvstore.ranges import check_ranges
from kvstore.transports.base import Arrived, Range, Region, ignore, pieces
from kvstore.transports.tcp_server import ServedRegion, TcpServer
from kvstore.transports.tcp_stream import (
    CHANNELS,
    FEW_RANGES,
    HELLO,
    MAGIC,
    MAX_RANGES,
    OK,
    RANGE,
    READ,
    REQUEST,
    STATUS,
    VERSION,
    WRITE,
    Channel,
    Stream,
    Upgrade,
    plain,
    tune,
)
from pdserve.errors import HandoverError, PeerLost


@dataclass(frozen=True, slots=True)
class TcpOptions:
    """How a worker's tcp transport listens and waits."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 0
    """0: any free one."""
    advertise_host: str = ""
    """What peers connect to; empty: `host`."""
    progress_timeout_s: float = 10.0
    """A transfer that moves no byte for this long has failed: far above a retransmission, well under a lease (30 s)."""
    connect_timeout_s: float = 5.0
    max_connections_per_peer: int = 4
    """Batches to one peer that may run side by side; on two cores more than two did not pay."""
    buffer_bytes: int = 4 << 20
    """SO_SNDBUF and SO_RCVBUF; 0: the kernel tunes them. The kernel caps it at net.core.[rw]mem_max."""
    server_tls: ssl.SSLContext | None = None
    client_tls: ssl.SSLContext | None = None
    """Both or none: encrypts the bulk path. The token alone authorises, so set it wherever the network is shared."""


class _Descriptor(msgspec.Struct, array_like=True, frozen=True):
    """Secret: whoever has it can read and write the region."""

    host: str
    port: int
    region_id: int
    token: bytes
    nbytes: int


@dataclass(frozen=True, slots=True, eq=False)
class _Connection:
    """What requests go by, and what payload goes by: mostly the same."""

    stream: Stream
    channel: Channel

    def close(self) -> None:
        self.channel.close()
        self.stream.close()


class TcpPeer:
    """A region behind a socket. See `kvstore.transports.base.Peer`."""

    def __init__(self, where: _Descriptor, options: TcpOptions, channel: int = 0, upgrade: Upgrade = plain) -> None:
        """Raises `PeerLost`."""
        self._where, self._options = where, options
        self._channel, self._upgrade = channel, upgrade
        self._lock = threading.Lock()
        self._idle: list[_Connection] = []
        self._all: set[_Connection] = set()
        self._slots = threading.BoundedSemaphore(options.max_connections_per_peer)
        self._closed = False
        with self._connection():
            pass

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def read(self, ranges: Sequence[Range], into: NDArray[np.uint8], arrived: Arrived = ignore) -> None:
        check_ranges(ranges, self._where.nbytes, into.nbytes)
        with self._connection() as connection:
            for start in range(0, len(ranges), MAX_RANGES):
                _read(connection, ranges[start : start + MAX_RANGES], into.data, arrived)

    def write(self, ranges: Sequence[Range], source: NDArray[np.uint8]) -> None:
        check_ranges(ranges, self._where.nbytes, source.nbytes)
        with self._connection() as connection:
            for start in range(0, len(ranges), MAX_RANGES):
                _write(connection, ranges[start : start + MAX_RANGES], source.data)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            connections, idle = list(self._all), list(self._idle)
            self._idle.clear()
        for connection in connections:
            connection.stream.abort()
        for connection in idle:
            self._discard(connection)

    @contextmanager
    def _connection(self) -> Iterator[_Connection]:
        """An idle connection or a new one; after an error it is not used again."""
        with self._slots:
            connection = self._take()
            try:
                yield connection
            except BaseException:
                self._discard(connection)
                raise
            self._put_back(connection)

    def _take(self) -> _Connection:
        with self._lock:
            if self._closed:
                raise PeerLost("this peer was closed")
            if self._idle:
                return self._idle.pop()
        connection = self._open()
        with self._lock:
            self._all.add(connection)
            closed = self.closed
        if closed:
            self._discard(connection)
            raise PeerLost("this peer was closed")
        return connection

    def _put_back(self, connection: _Connection) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(connection)
                return
        self._discard(connection)

    def _discard(self, connection: _Connection) -> None:
        with self._lock:
            self._all.discard(connection)
        connection.close()

    def _open(self) -> _Connection:
        """Connect, show the token. Raises `PeerLost`."""
        where, options = self._where, self._options
        try:
            sock = socket.create_connection((where.host, where.port), timeout=options.connect_timeout_s)
            tune(sock, options.buffer_bytes, options.progress_timeout_s)
            if options.client_tls is not None:
                sock = options.client_tls.wrap_socket(sock, server_hostname=where.host)
        except OSError as error:
            raise PeerLost(f"cannot connect to {where.host}:{where.port}: {error}") from error
        stream = Stream(sock, options.progress_timeout_s)
        try:
            stream.send([HELLO.pack(MAGIC, VERSION, self._channel, where.region_id, where.token)])
            _expect_ok(stream, where.nbytes)
            return _Connection(stream, self._upgrade(stream, sock, False))
        except HandoverError as error:
            stream.close()
            raise PeerLost(f"{where.host}:{where.port} did not let us in: {error.message}") from error


def _read(connection: _Connection, ranges: Sequence[Range], into: memoryview, arrived: Arrived) -> None:
    """One request and its answer. What a peer sent instead of a status and bytes may be in `into` when this raises."""
    stream, channel = connection.stream, connection.channel
    payload = sum(r.length for r in ranges)
    stream.send(_request(READ, ranges, payload))
    views = [into[r.local : r.local + r.length] for r in ranges]
    if channel is stream and arrived is ignore:
        status = bytearray(STATUS.size)
        stream.receive([memoryview(status), *views])  # one system call: half the cost of a small read
        _check_ok(status, payload)
        return
    _expect_ok(stream, payload)
    if channel is not stream:
        channel.receive(views)
    for piece in pieces(ranges):
        if channel is stream:
            stream.receive([into[piece.local : piece.local + piece.length]])
        arrived(piece)


def _write(connection: _Connection, ranges: Sequence[Range], source: memoryview) -> None:
    stream, channel = connection.stream, connection.channel
    payload = sum(r.length for r in ranges)
    request = _request(WRITE, ranges, payload)
    views = [source[r.local : r.local + r.length] for r in ranges]
    if channel is stream:
        stream.send([*request, *views])
    else:
        stream.send(request)
        channel.send(views)
    _expect_ok(stream, payload)


def _request(operation: int, ranges: Sequence[Range], payload: int) -> list[memoryview | bytes]:
    if len(ranges) <= FEW_RANGES:
        table = b"".join(RANGE.pack(r.remote, r.length) for r in ranges)
    else:
        table = np.array([(r.remote, r.length) for r in ranges], dtype="<u8").tobytes()
    return [REQUEST.pack(MAGIC, operation, 0, len(ranges), 0, payload), table]


def _expect_ok(stream: Stream, payload: int) -> None:
    _check_ok(stream.receive_bytes(STATUS.size), payload)


def _check_ok(answer: bytearray | memoryview, payload: int) -> None:
    magic, status, count = STATUS.unpack(answer)
    if magic != MAGIC:
        raise PeerLost("the peer does not speak our protocol")
    if status != OK or count != payload:
        raise PeerLost("the peer refused: its region was withdrawn, or the token is wrong")


class TcpTransport:
    """Serves registered regions and reaches others'. See `kvstore.transports.base.Transport`."""

    def __init__(self, options: TcpOptions | None = None, name: str = "tcp", upgrade: Upgrade = plain) -> None:
        """Listens at once. `upgrade` makes what carries the payload. Raises `OSError` when the address cannot be
        bound."""
        self.name, self._channel, self._upgrade = name, CHANNELS[name], upgrade
        self._options = options = options or TcpOptions()
        self._server = TcpServer(
            options.host,
            options.port,
            progress_timeout_s=options.progress_timeout_s,
            buffer_bytes=options.buffer_bytes,
            tls=options.server_tls,
            channel=self._channel,
            upgrade=upgrade,
        )
        self._region_ids = itertools.count(1)
        self._peers: set[TcpPeer] = set()
        self._lock = threading.Lock()
        self._closed = False

    @property
    def port(self) -> int:
        return self._server.port

    def register(self, memory: NDArray[np.uint8]) -> Region:
        """Raises `ValueError` unless `memory` is 1-D and contiguous."""
        if memory.ndim != 1 or not memory.flags.c_contiguous:
            raise ValueError("tcp registers 1-D contiguous memory")
        region_id, token = next(self._region_ids), secrets.token_bytes(32)
        self._server.add(ServedRegion(region_id, token, memory.data))
        host = self._options.advertise_host or self._options.host
        descriptor = _Descriptor(host, self._server.port, region_id, token, memory.nbytes)
        return Region(region_id, memory.nbytes, msgspec.msgpack.encode(descriptor))

    def deregister(self, region: Region) -> None:
        """When it returns, no thread of ours touches the memory any more."""
        self._server.remove(region.region_id)

    def connect(self, descriptor: bytes) -> TcpPeer:
        try:
            where = msgspec.msgpack.decode(descriptor, type=_Descriptor)
        except msgspec.MsgspecError as error:
            raise PeerLost("the peer's tcp descriptor cannot be read: is it of another version?") from error
        if len(where.token) != 32:
            raise PeerLost("the peer's tcp descriptor has no valid token")
        with self._lock:
            if self._closed:
                raise PeerLost("this transport is closed")
        peer = TcpPeer(where, self._options, self._channel, self._upgrade)
        with self._lock:
            self._peers = {p for p in self._peers if not p.closed} | {peer}
        return peer

    def close(self) -> None:
        with self._lock:
            self._closed = True
            peers = list(self._peers)
        for peer in peers:
            peer.close()
        self._server.close()
