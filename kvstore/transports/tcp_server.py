"""The serving half of the tcp transport: threads that stream registered memory to authenticated peers.

One thread accepts, one thread serves each connection; all of them sleep in the kernel when there is nothing to do.
Whatever a peer sends, only bytes inside the region whose token it showed are ever touched: a request that is
malformed or leaves the region ends the connection.
"""

from __future__ import annotations

import hmac
import logging
import socket
import ssl
import threading
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np

from kvstore.transports.tcp_stream import (
    FEW_RANGES,
    HELLO,
    MAGIC,
    MAX_RANGES,
    OK,
    RANGE,
    RANGE_BYTES,
    READ,
    REFUSED,
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

_LOG = logging.getLogger(__name__)
MAX_CONNECTIONS = 1024
"""Connections a server: each is a thread. Beyond, new ones are closed at once and the peer retries elsewhere."""
_ACCEPT_PAUSE_S = 0.2
"""After a failed accept (out of descriptors): the next one would fail as well."""
_HELLO_TIMEOUT_S = 5.0
"""A stranger that connects and stays silent is dropped after this."""


@dataclass(eq=False)
class ServedRegion:
    """Memory, the secret that opens it, and who is reading it."""

    region_id: int
    token: bytes
    memory: memoryview
    open: bool = True
    connections: set[Stream] = field(default_factory=set)
    threads: set[threading.Thread] = field(default_factory=set)


class TcpServer:
    """Listens from construction to `close`."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        progress_timeout_s: float,
        buffer_bytes: int,
        tls: ssl.SSLContext | None,
        channel: int = 0,
        upgrade: Upgrade = plain,
    ) -> None:
        """Raises `OSError` when the address cannot be bound."""
        self._channel, self._upgrade = channel, upgrade
        self._progress_timeout_s, self._buffer_bytes, self._tls = progress_timeout_s, buffer_bytes, tls
        self._lock = threading.Lock()
        self._regions: dict[int, ServedRegion] = {}
        self._strangers: set[Stream] = set()
        self._num_connections = 0
        self._closing = threading.Event()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self._acceptor = threading.Thread(target=self._accept, name=f"kv-tcp-accept-{self.port}", daemon=True)
        self._acceptor.start()

    def add(self, region: ServedRegion) -> None:
        with self._lock:
            self._regions[region.region_id] = region

    def remove(self, region_id: int) -> None:
        """Returns when no thread touches the region any more. Idempotent."""
        with self._lock:
            region = self._regions.pop(region_id, None)
            if region is None:
                return
            region.open = False
            streams, threads = list(region.connections), list(region.threads)
        for stream in streams:
            stream.abort()
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join()

    def close(self) -> None:
        """Stop listening, abort transfers, join the threads. Idempotent."""
        with self._lock:
            self._closing.set()
            region_ids, strangers = list(self._regions), list(self._strangers)
        try:
            self._listener.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # closed before
        self._acceptor.join()
        self._listener.close()
        for stream in strangers:
            stream.abort()
        for region_id in region_ids:
            self.remove(region_id)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                if self._closing.is_set():
                    return
                _LOG.warning("kv tcp server cannot accept: %s", error)
                self._closing.wait(_ACCEPT_PAUSE_S)
                continue
            with self._lock:
                full = self._num_connections >= MAX_CONNECTIONS
                self._num_connections += not full
            if full:
                sock.close()
                continue
            threading.Thread(target=self._serve, args=(sock,), name=f"kv-tcp-{self.port}", daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        """The life of one connection."""
        try:
            with sock:
                self._greet_and_answer(sock)
        except (HandoverError, OSError) as error:
            _LOG.debug("kv tcp connection ended: %s", error)
        finally:
            with self._lock:
                self._num_connections -= 1

    def _greet_and_answer(self, sock: socket.socket) -> None:
        tune(sock, self._buffer_bytes, self._progress_timeout_s)
        sock.settimeout(_HELLO_TIMEOUT_S)
        wrapped = self._tls.wrap_socket(sock, server_side=True) if self._tls else sock
        with wrapped:
            region = self._authenticate(Stream(wrapped, _HELLO_TIMEOUT_S))
            stream = Stream(wrapped, self._progress_timeout_s)
            self._enter(region, stream)
            try:
                with closing(self._upgrade(stream, wrapped, True)) as channel:
                    while True:
                        _answer(stream, channel, region)
            finally:
                with self._lock:
                    region.connections.discard(stream)
                    region.threads.discard(threading.current_thread())

    def _authenticate(self, stream: Stream) -> ServedRegion:
        """The region whose token the peer shows. Raises `PeerLost` after a refusal."""
        with self._lock:
            if self._closing.is_set():
                raise PeerLost("the server is closed")
            self._strangers.add(stream)
        try:
            magic, version, channel, region_id, token = HELLO.unpack(stream.receive_bytes(HELLO.size))
            with self._lock:
                region = self._regions.get(region_id)
            expected = region.token if region else bytes(32)
            ours = magic == MAGIC and version == VERSION and channel == self._channel
            if not ours or not hmac.compare_digest(token, expected) or region is None:
                stream.send([STATUS.pack(MAGIC, REFUSED, 0)])
                raise PeerLost("a peer showed no valid token")
            return region
        finally:
            with self._lock:
                self._strangers.discard(stream)

    def _enter(self, region: ServedRegion, stream: Stream) -> None:
        """From here on `remove` aborts and awaits this thread. Then tell the peer that it is in."""
        with self._lock:
            if not region.open:
                raise PeerLost("the region was withdrawn")
            region.connections.add(stream)
            region.threads.add(threading.current_thread())
        stream.send([STATUS.pack(MAGIC, OK, region.memory.nbytes)])


def _answer(stream: Stream, channel: Channel, region: ServedRegion) -> None:
    """Await one request and answer it. Raises `PeerLost` when it is malformed: the connection ends."""
    operation, payload, table = _request(stream)
    if operation == WRITE and region.memory.readonly:
        raise PeerLost("a peer wants to write read-only memory")
    views = _views(region.memory, table, payload)
    if operation == READ:
        _send_answer(stream, channel, STATUS.pack(MAGIC, OK, payload), views)
    else:
        channel.receive(views)
        stream.send([STATUS.pack(MAGIC, OK, payload)])


def _request(stream: Stream) -> tuple[int, int, memoryview]:
    """Operation, payload and range table. The first call may bring header and one range: most requests have no more."""
    buffer = memoryview(bytearray(REQUEST.size + RANGE_BYTES))
    count = stream.await_bytes(buffer)
    if count < REQUEST.size:
        stream.receive([buffer[count : REQUEST.size]])
        count = REQUEST.size
    magic, operation, _, num_ranges, _, payload = REQUEST.unpack_from(buffer)
    if magic != MAGIC or operation not in (READ, WRITE) or num_ranges > MAX_RANGES:
        raise PeerLost("a peer sent a malformed request")
    table = memoryview(bytearray(num_ranges * RANGE_BYTES)) if num_ranges != 1 else buffer[REQUEST.size :]
    have = count - REQUEST.size
    if have > len(table):
        raise PeerLost("a peer sent more than its request says")
    if num_ranges != 1:
        table[:have] = buffer[REQUEST.size : count]
    stream.receive([table[have:]])
    return operation, payload, table


def _send_answer(stream: Stream, channel: Channel, status: bytes, views: list[memoryview]) -> None:
    if channel is stream:
        stream.send([status, *views])
    else:
        stream.send([status])
        channel.send(views)


def _views(memory: memoryview, table: memoryview, payload: int) -> list[memoryview]:
    """The ranges as slices of the region. Raises `PeerLost` if one leaves it or the sum is wrong."""
    size = memory.nbytes
    if len(table) <= FEW_RANGES * RANGE_BYTES:
        ranges = list(RANGE.iter_unpack(table))
        inside = all(offset + length <= size for offset, length in ranges)
        total = sum(length for _, length in ranges)
    else:
        columns = np.frombuffer(table, dtype="<u8").reshape(-1, 2)
        offsets, lengths = columns[:, 0], columns[:, 1]
        # no sum of two u64 here: it could wrap around
        inside = bool(np.all(lengths <= size) and np.all(offsets <= np.uint64(size) - lengths))
        ranges, total = list(map(tuple, columns.tolist())), int(lengths.sum())
    if not inside:
        raise PeerLost("a peer asked for bytes outside its region")
    if total != payload:
        raise PeerLost("a peer's request does not add up")
    return [memory[offset : offset + length] for offset, length in ranges]
