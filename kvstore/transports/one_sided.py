"""What transports on a one-sided library share: regions, the word that voids them, batches, an orderly end.

The library (`mooncake`, `nixl`) reads and writes a peer's memory without that process taking part. So nothing there
could refuse a reader whose region was withdrawn, and some libraries go on reading memory that was deregistered. Each
registration therefore has a word in a table of its owner, which is registered as long as the transport lives: random
while the region is open, zero afterwards. A peer reads it after every batch; without the right word the batch is void.
"""

from __future__ import annotations

import mmap
import queue
import secrets
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvstore.ranges import batches, check_ranges
from kvstore.transports.base import Arrived, Range, Region, ignore, pieces
from kvstore.transports.landing import Landing
from pdserve.errors import ConfigError, HandoverError, PeerLost

Operation = Literal["read", "write"]
WORD = 8
TABLE_WORDS = 512
"""Of a transport: half for its regions, half where peers' words are read to."""
MAX_REGIONS = TABLE_WORDS // 2
MAX_PIECES = 256
"""Ranges a library call: Mooncake refused a batch of 4,096 on tcp (its queue was full) and took 2,048."""
MAX_BATCH_BYTES = 32 << 20
"""A `close` waits for one batch at most."""


class Link(Protocol):
    """A peer's memory, as the library sees it. Thread-safe."""

    def move(self, operation: Operation, remote: Sequence[int], local: Sequence[int], lengths: Sequence[int]) -> None:
        """Addresses and lengths, none zero; blocks. Raises `PeerLost`, `TransferTimeout`."""
        ...

    def close(self) -> None: ...


class Library(Protocol):
    """One engine of a one-sided library."""

    landing_bytes: int
    """0: when `move` raises, nothing arrives any more. Else it may: give `move` only memory of this size of ours."""

    def register(self, address: int, nbytes: int) -> None: ...

    def deregister(self, address: int, nbytes: int) -> None: ...

    def endpoint(self) -> bytes:
        """What `connect` needs; complete for all that is registered now."""
        ...

    def connect(self, endpoint: bytes) -> Link:
        """Raises `PeerLost`."""
        ...

    def close(self) -> None: ...


class _Descriptor(msgspec.Struct, array_like=True, frozen=True):
    """Secret: whoever has it can reach the region by the library."""

    transport: str
    endpoint: bytes
    address: int
    nbytes: int
    word_address: int
    word: int


class OneSidedPeer:
    """See `kvstore.transports.base.Peer`."""

    def __init__(self, transport: OneSidedTransport, link: Link, where: _Descriptor) -> None:
        """Raises `PeerLost` when the region is void."""
        self._transport, self._link, self._where = transport, link, where
        self.closed = False
        with self._transport.busy():
            self._check_word()

    def read(self, ranges: Sequence[Range], into: NDArray[np.uint8], arrived: Arrived = ignore) -> None:
        self._transfer("read", ranges, into, arrived)

    def write(self, ranges: Sequence[Range], source: NDArray[np.uint8]) -> None:
        self._transfer("write", ranges, source, ignore)

    def close(self) -> None:
        """Transfers under way raise `PeerLost` after the batch that moves just now."""
        if not self.closed:
            self.closed = True
            self._link.close()

    def _transfer(
        self, operation: Operation, ranges: Sequence[Range], local: NDArray[np.uint8], arrived: Arrived
    ) -> None:
        check_ranges(ranges, self._where.nbytes, local.size)
        self._check_open()
        with self._transport.busy(), self._transport.reachable(local) as address:
            for batch in batches(ranges, MAX_BATCH_BYTES, MAX_PIECES):
                self._check_open()
                self._move(operation, batch, local, address)
                for piece in () if arrived is ignore else pieces(batch):
                    arrived(piece)
            self._check_word()

    def _move(self, operation: Operation, batch: Sequence[Range], local: NDArray[np.uint8], address: int) -> None:
        remote = [self._where.address + r.remote for r in batch]
        lengths = [r.length for r in batch]
        if self._transport.landing is None:
            self._link.move(operation, remote, [address + r.local for r in batch], lengths)
            return
        with self._transport.landing.take() as place:
            places = place.pack(lengths)
            if operation == "write":
                place.fill(batch, local)
            self._link.move(operation, remote, places, lengths)
            if operation == "read":
                place.empty(batch, local)

    def _check_open(self) -> None:
        if self.closed or self._transport.closed:
            raise PeerLost("this peer was closed")

    def _check_word(self) -> None:
        if self._transport.read_word(self._link, self._where.word_address) != self._where.word:
            raise PeerLost("the peer withdrew its memory")
        self._check_open()


class OneSidedTransport:
    """See `kvstore.transports.base.Transport`."""

    def __init__(self, name: str, library: Library) -> None:
        self.name = name
        self.closed = False
        self._library = library
        self._lock = threading.Condition()
        self._num_busy = 0
        self._table = np.frombuffer(mmap.mmap(-1, TABLE_WORDS * WORD), dtype=np.uint64)
        self._table_address: int = self._table.ctypes.data
        self._free_words = list(range(MAX_REGIONS))
        self._scratch: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in range(MAX_REGIONS, TABLE_WORDS):
            self._scratch.put(index)
        self._regions: dict[int, tuple[int, int]] = {}
        """Address and size, by region id, which is the index of its word."""
        self._registered: dict[tuple[int, int], int] = {}
        """How often each piece of memory is registered: the library takes it once."""
        self._peers: list[OneSidedPeer] = []
        library.register(self._table_address, self._table.nbytes)
        self.landing = Landing(library, library.landing_bytes) if library.landing_bytes else None

    # ---- what we own ----

    def register(self, memory: NDArray[np.uint8]) -> Region:
        """Raises `ValueError` unless `memory` is 1-D and contiguous, `ConfigError` beyond 256 regions."""
        if memory.ndim != 1 or not memory.flags.c_contiguous:
            raise ValueError(f"{self.name} registers 1-D contiguous memory")
        address: int = memory.ctypes.data
        with self._lock:
            if not self._free_words:
                raise ConfigError(f"{self.name} has no room for another region", key="transports")
            index = self._free_words.pop()
            self._hold(address, memory.nbytes)
            self._regions[index] = address, memory.nbytes
            word = secrets.randbits(63) | 1
            self._table[index] = word
            endpoint = self._library.endpoint()
        where = _Descriptor(self.name, endpoint, address, memory.nbytes, self._table_address + index * WORD, word)
        return Region(index, memory.nbytes, msgspec.msgpack.encode(where))

    def deregister(self, region: Region) -> None:
        """Peers can no longer trust it: their next batch is void, whatever the library lets them read."""
        with self._lock:
            found = self._regions.pop(region.region_id, None)
            if found is None:
                return
            self._table[region.region_id] = 0
            self._free_words.append(region.region_id)
            self._let_go(*found)

    def _hold(self, address: int, nbytes: int) -> None:
        count = self._registered.get((address, nbytes), 0)
        if not count:
            self._library.register(address, nbytes)
        self._registered[address, nbytes] = count + 1

    def _let_go(self, address: int, nbytes: int) -> None:
        self._registered[address, nbytes] -= 1
        if not self._registered[address, nbytes]:
            del self._registered[address, nbytes]
            self._library.deregister(address, nbytes)

    @contextmanager
    def reachable(self, memory: NDArray[np.uint8]) -> Iterator[int]:
        """The memory's address; the library may use it until the context ends. Registered regions cost nothing."""
        address: int = memory.ctypes.data
        end = address + memory.nbytes
        with self._lock:
            known = any(start <= address and end <= start + size for start, size in self._registered)
            borrow = not known and self.landing is None and memory.nbytes > 0
            if borrow:
                self._hold(address, memory.nbytes)
        try:
            yield address
        finally:
            if borrow:
                with self._lock:
                    self._let_go(address, memory.nbytes)

    # ---- what others own ----

    def connect(self, descriptor: bytes) -> OneSidedPeer:
        """Raises `PeerLost`."""
        try:
            where = msgspec.msgpack.decode(descriptor, type=_Descriptor)
        except msgspec.MsgspecError as error:
            raise PeerLost(f"the peer's {self.name} descriptor cannot be read: is it of another version?") from error
        if where.transport != self.name:
            raise PeerLost(f"the peer's descriptor is one of {where.transport!r}, not of {self.name}")
        with self.busy():
            link = self._library.connect(where.endpoint)
        try:
            peer = OneSidedPeer(self, link, where)
        except HandoverError:
            link.close()
            raise
        with self._lock:
            self._peers = [known for known in self._peers if not known.closed] + [peer]
        return peer

    def read_word(self, link: Link, address: int) -> int:
        """A word of a peer's table. Raises `PeerLost`, `TransferTimeout` (its place is not used again then: the
        answer may come yet)."""
        try:
            index = self._scratch.get_nowait()
        except queue.Empty:
            raise PeerLost("too many transfers never ended: this transport is not used any more") from None
        try:
            link.move("read", [address], [self._table_address + index * WORD], [WORD])
            word = int(self._table[index])
        except PeerLost:
            self._scratch.put(index)
            raise
        self._scratch.put(index)
        return word

    # ---- the end ----

    @contextmanager
    def busy(self) -> Iterator[None]:
        """While the library works for us; `close` waits for it. Raises `PeerLost` once closed."""
        with self._lock:
            if self.closed:
                raise PeerLost("this transport is closed")
            self._num_busy += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_busy -= 1
                self._lock.notify_all()

    def close(self) -> None:
        """Withdraw every region; return when the library has stopped: after the batches under way."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
            self._table[:MAX_REGIONS] = 0
            while self._num_busy:
                self._lock.wait()
            memory, peers = list(self._registered), self._peers
            self._regions.clear()
            self._registered.clear()
        for peer in peers:
            peer.close()
        for address, nbytes in memory:
            self._library.deregister(address, nbytes)
        self._library.deregister(self._table_address, self._table.nbytes)
        if self.landing is not None:
            self.landing.close()
        self._library.close()
