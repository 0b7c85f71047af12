"""Shared memory between processes of one host: hand-over memory, and a transport with one copy.

`SharedMemoryPool` is the memory that a worker's engine keeps its KV blocks in; `ShmTransport` reads another
worker's pool by mapping it. Layout of a segment: blocks, then the table of generations, then one page of header;
each part starts on a page. The mapping outlives its owner, so a read that succeeded says nothing of the owner's
health: `ShmPeer` looks at the owner's lock and at the header's closed flag before and after each batch.
"""

from __future__ import annotations

import os
import struct
import threading
import time
import weakref
from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvstore.ranges import check_ranges
from kvstore.transports.base import Arrived, Range, Region, ignore, pieces
from kvstore.transports.segment import (
    Segment,
    create_segment,
    destroy_segment,
    host_id,
    open_segment,
    owner_alive,
    populate,
    segment_of,
)
from pdserve.errors import ConfigError, PeerLost

_PAGE = 4096
_MAGIC = b"PDKVSHM1"
_HEADER = struct.Struct("<8s6Q")  # magic, incarnation, segment bytes, number of blocks, bytes a block, and these two:
_CLOSED_WORD = 5
_REGISTRATION_WORD = 6
"""Grows when the owner deregisters the segment: descriptors made before are void."""


class SharedMemoryPool:
    """A `pdserve.engine.base.KVMemory` that other processes of this host can map.

    The owner makes it and closes it; `attach` maps another's. After `close` the arrays stay valid for their holder,
    but no other process can reach or trust them any more.
    """

    def __init__(self, num_blocks: int, block_bytes: int, name: str | None = None) -> None:
        """Raises `ConfigError` if the host has too little shared memory, `FileExistsError` if `name` is in use."""
        if num_blocks < 1 or block_bytes < 1:
            raise ConfigError("a pool needs at least one block of at least one byte", key="kv.num_blocks")
        size = _header_offset(num_blocks, block_bytes) + _PAGE
        segment, fd = create_segment(size, name)
        incarnation = time.time_ns()
        _HEADER.pack_into(segment, size - _PAGE, _MAGIC, incarnation, size, num_blocks, block_bytes, 0, 0)
        self._init_views(segment, fd)
        self._finalizer: weakref.finalize[..., SharedMemoryPool] = weakref.finalize(
            self, _close_owned, os.getpid(), self._header, segment.name, fd
        )

    @classmethod
    def attach(cls, name: str) -> SharedMemoryPool:
        """Map a pool that another process made. Raises `PeerLost` if it is gone or is no pool of ours."""
        segment, fd = open_segment(name)
        try:
            _check_header(segment)
        except PeerLost:
            os.close(fd)
            raise
        pool = cls.__new__(cls)
        pool._init_views(segment, fd)
        pool._finalizer = weakref.finalize(pool, os.close, fd)
        return pool

    def _init_views(self, segment: Segment, fd: int) -> None:
        self._segment, self._fd = segment, fd
        self.incarnation: int
        self.num_blocks: int
        self.block_bytes: int
        size = len(segment)
        _, self.incarnation, _, self.num_blocks, self.block_bytes, *_ = _HEADER.unpack_from(segment, size - _PAGE)
        self.region: NDArray[np.uint8] = np.frombuffer(segment, dtype=np.uint8)
        """The whole segment, 1-D: what a transport registers."""
        self._header = header_of(segment)
        blocks = self.region[: self.num_blocks * self.block_bytes]
        self._blocks = blocks.reshape(self.num_blocks, self.block_bytes)
        first = self.generations_offset
        self._generations = self.region[first : first + 8 * self.num_blocks].view(np.uint64)

    @property
    def name(self) -> str:
        return self._segment.name

    @property
    def blocks(self) -> NDArray[np.uint8]:
        return self._blocks

    @property
    def generations(self) -> NDArray[np.uint64]:
        return self._generations

    @property
    def generations_offset(self) -> int:
        return _round_up(self.num_blocks * self.block_bytes)

    def block_offset(self, block: int) -> int:
        """Offset of a block in `region`."""
        return block * self.block_bytes

    def generation_offset(self, block: int) -> int:
        """Offset of a block's generation, a little-endian u64, in `region`."""
        return self.generations_offset + 8 * block

    @property
    def closed(self) -> bool:
        """Whether the owner has closed it."""
        return bool(self._header[_CLOSED_WORD])

    @property
    def registration(self) -> int:
        """Which descriptors are valid: see `ShmTransport.deregister`."""
        return int(self._header[_REGISTRATION_WORD])

    def check_alive(self) -> None:
        """For a mapped pool. Raises `PeerLost` when the owner closed it or died."""
        if self.closed or not self._finalizer.alive or not owner_alive(self._fd):
            raise PeerLost(f"the owner of shared memory {self.name} closed it or died")

    def populate(self) -> None:
        """Map its pages ahead of their first use, in the background: for whoever writes to it soon."""
        populate(self.region)

    def close(self) -> None:
        """Owner: mark it closed, unlink it. Else: stop using it. Idempotent."""
        self._finalizer()


def _close_owned(owner_pid: int, header: NDArray[np.uint64], name: str, fd: int) -> None:
    if os.getpid() != owner_pid:
        return  # a forked child's copy
    header[_CLOSED_WORD] = 1
    destroy_segment(name, fd)


def header_of(segment: Segment) -> NDArray[np.uint64]:
    """The header page as words."""
    return np.frombuffer(segment, dtype=np.uint64, offset=len(segment) - _PAGE)


def _round_up(nbytes: int) -> int:
    return -(-nbytes // _PAGE) * _PAGE


def _header_offset(num_blocks: int, block_bytes: int) -> int:
    return _round_up(num_blocks * block_bytes) + _round_up(8 * num_blocks)


def _check_header(segment: Segment) -> None:
    size = len(segment)
    if size < 3 * _PAGE or size % _PAGE:
        raise PeerLost(f"shared memory {segment.name} is no KV pool: {size} bytes")
    magic, _, claimed, num_blocks, block_bytes, closed, _ = _HEADER.unpack_from(segment, size - _PAGE)
    if magic != _MAGIC or claimed != size or _header_offset(num_blocks, block_bytes) + _PAGE != size:
        raise PeerLost(f"shared memory {segment.name} is no KV pool, or one of another version")
    if closed:
        raise PeerLost(f"shared memory {segment.name} was closed by its owner")


class _Descriptor(msgspec.Struct, array_like=True, frozen=True):
    """What a peer needs to map a region: the segment, and which part of it."""

    host: str
    segment: str
    incarnation: int
    registration: int
    offset: int
    nbytes: int


class ShmPeer:
    """Another process's region, mapped here. See `kvstore.transports.base.Peer`."""

    def __init__(self, pool: SharedMemoryPool, registration: int, memory: NDArray[np.uint8]) -> None:
        self._pool = pool
        self._registration = registration
        self._memory = memory
        self._closed = False

    def read(self, ranges: Sequence[Range], into: NDArray[np.uint8], arrived: Arrived = ignore) -> None:
        check_ranges(ranges, self._memory.size, into.size)
        self.check()
        for r in ranges if arrived is ignore else pieces(ranges):
            into[r.local : r.local + r.length] = self._memory[r.remote : r.remote + r.length]
            arrived(r)
            self._check_open()
        self.check()

    def write(self, ranges: Sequence[Range], source: NDArray[np.uint8]) -> None:
        check_ranges(ranges, self._memory.size, source.size)
        self.check()
        for r in ranges:
            self._memory[r.remote : r.remote + r.length] = source[r.local : r.local + r.length]
            self._check_open()
        self.check()

    def close(self) -> None:
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise PeerLost("this peer was closed")

    def check(self) -> None:
        """Raises `PeerLost` unless the region can still be trusted."""
        self._check_open()
        self._pool.check_alive()
        if self._pool.registration != self._registration:
            raise PeerLost(f"the owner of shared memory {self._pool.name} withdrew it")


class ShmTransport:
    """Moves bytes between segments of one host. See `kvstore.transports.base.Transport`."""

    name = "shm"

    def __init__(self) -> None:
        self._host = host_id()
        self._lock = threading.Lock()
        self._next_region = 1
        self._registered: dict[int, NDArray[np.uint64]] = {}
        self._mapped: weakref.WeakValueDictionary[tuple[str, int], SharedMemoryPool] = weakref.WeakValueDictionary()
        self._peers: weakref.WeakSet[ShmPeer] = weakref.WeakSet()
        self._closed = False

    def register(self, memory: NDArray[np.uint8]) -> Region:
        """Nothing to set up: the segment is reachable for those who know its name. Raises `ConfigError` for memory
        that is no contiguous view of a `SharedMemoryPool`."""
        segment = segment_of(memory)
        if segment is None or memory.ndim != 1 or not memory.flags.c_contiguous:
            raise ConfigError(
                "shm can only share memory of a SharedMemoryPool (1-D, contiguous): let the engine take its "
                "hand-over memory from the worker, or use tcp",
                key="kv.transports",
            )
        whole, header = np.frombuffer(segment, dtype=np.uint8), header_of(segment)
        offset = memory.ctypes.data - whole.ctypes.data
        incarnation, registration = int(header[1]), int(header[_REGISTRATION_WORD])
        descriptor = _Descriptor(self._host, segment.name, incarnation, registration, offset, memory.size)
        with self._lock:
            region_id, self._next_region = self._next_region, self._next_region + 1
            self._registered[region_id] = header
        return Region(region_id, memory.size, msgspec.msgpack.encode(descriptor))

    def deregister(self, region: Region) -> None:
        """Void every descriptor of its segment. Peers have it mapped all the same: their next batch tells them."""
        with self._lock:
            header = self._registered.pop(region.region_id, None)
        if header is not None:
            header[_REGISTRATION_WORD] += 1

    def connect(self, descriptor: bytes) -> ShmPeer:
        """Map a region of this host. Raises `PeerLost`."""
        try:
            where = msgspec.msgpack.decode(descriptor, type=_Descriptor)
        except msgspec.MsgspecError as error:
            raise PeerLost("the peer's shm descriptor cannot be read: is it of another version?") from error
        if where.host != self._host:
            raise PeerLost("the peer's memory is on another host, or in another /dev/shm: use tcp")
        pool = self._attach(where)
        if where.offset < 0 or where.nbytes < 0 or where.offset + where.nbytes > pool.region.size:
            raise PeerLost(f"the peer's descriptor leaves its segment {where.segment}")
        peer = ShmPeer(pool, where.registration, pool.region[where.offset : where.offset + where.nbytes])
        peer.check()
        with self._lock:
            self._peers.add(peer)
        return peer

    def _attach(self, where: _Descriptor) -> SharedMemoryPool:
        """One mapping a segment, shared by its peers."""
        with self._lock:
            if self._closed:
                raise PeerLost("this transport is closed")
            pool = self._mapped.get((where.segment, where.incarnation))
            if pool is None:
                pool = SharedMemoryPool.attach(where.segment)
                self._mapped[where.segment, where.incarnation] = pool
        if pool.incarnation != where.incarnation:
            raise PeerLost(f"the owner of shared memory {where.segment} restarted")
        return pool

    def close(self) -> None:
        """Withdraw every region, close every peer. Idempotent."""
        with self._lock:
            self._closed = True
            peers, headers = list(self._peers), list(self._registered.values())
            self._registered.clear()
        for header in headers:
            header[_REGISTRATION_WORD] += 1
        for peer in peers:
            peer.close()
