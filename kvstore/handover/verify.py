"""The read itself: pull a chunk's blocks from a peer, and know that they are the blocks that were exported.

One-sided reads race with reuse: nothing stops the exporter from giving a block away in the middle of a read. Its
generation grows before the first byte changes, so generations that equal the manifest's before *and after* the read
prove that all bytes read were one owner's. Digests find corruption on the way. Only after `pull_blocks` returned
may the chunk be committed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from kvstore.ranges import batches, coalesce
from kvstore.transports.base import Peer, Range, Region
from kvstore.transports.shm import SharedMemoryPool
from pdserve.engine.base import ImportTarget, KVMemory
from pdserve.errors import DigestMismatch, HandoverError, RequestCancelled, StaleBlock
from pdserve.types import KVManifest

BATCH_BYTES = 32 << 20
"""Bytes a transport call: an aborted pull ends after at most one of them, about 20 ms of tcp on loopback. Smaller ones
cost CPU (0.35 s/GB at 64 MiB, 0.38 at 16, 0.5 at 4): the peer idles between them."""


LANE_BYTES = 16 << 20
"""From twice this on a pull runs in two threads: over tcp one core can't receive and hash as fast as another sends
(0.70 of plain sockets with one, 0.95 with two). Below, the threads cost more than they bring."""


class PoolDescriptor(msgspec.Struct, array_like=True, frozen=True):
    """A peer's hand-over memory: its geometry, and the transport's own descriptor. Secret, as that one is."""

    num_blocks: int
    block_bytes: int
    generations_offset: int
    """Of the u64 table, in the region; blocks start at 0."""
    region: bytes

    @classmethod
    def of(cls, pool: SharedMemoryPool, region: Region) -> PoolDescriptor:
        return cls(pool.num_blocks, pool.block_bytes, pool.generations_offset, region.descriptor)

    @classmethod
    def decode(cls, data: bytes) -> PoolDescriptor:
        """Raises `HandoverError` for bytes that are no descriptor."""
        try:
            return msgspec.msgpack.decode(data, type=cls)
        except msgspec.MsgspecError as error:
            raise HandoverError("the peer's memory descriptor cannot be read: is it of another version?") from error

    def encode(self) -> bytes:
        """The bytes that a `BindResponse` carries as `memory`."""
        return msgspec.msgpack.encode(self)


@dataclass(frozen=True, slots=True)
class DigestPolicy:
    """Which of the pulled blocks have their digest compared: every `every`-th, and the last."""

    every: int = 1

    def chosen(self, count: int) -> list[int]:
        return sorted({*range(0, count, self.every), count - 1}) if count else []


DIGEST_POLICIES = {"shm": DigestPolicy(every=16)}
"""Memory of the same host does not corrupt bytes on the way: a sample finds a wrong address. Others: every block."""


def digest_policy(transport: str) -> DigestPolicy:
    return DIGEST_POLICIES.get(transport, DigestPolicy())


def digest_blocks(memory: KVMemory, blocks: Sequence[int]) -> tuple[bytes, ...]:
    """xxh3-128 of each whole block, 16 bytes each; about 16 GB/s."""
    return tuple(xxhash.xxh3_128_digest(memory.blocks[block]) for block in blocks)


def pull_blocks(
    peer: Peer,
    source: PoolDescriptor,
    manifest: KVManifest,
    target: SharedMemoryPool,
    into: ImportTarget,
    policy: DigestPolicy,
    should_stop: Callable[[], bool] = lambda: False,
) -> int:
    """Fill `into` with the manifest's blocks but those that are cached; returns the bytes moved.

    Blocks the calling thread. When it raises, the target blocks' content is undefined: `StaleBlock`,
    `DigestMismatch`, `PeerLost`, `TransferTimeout`, `HandoverError` (the manifest does not fit the pools), or
    `RequestCancelled` after `should_stop` turned true.
    """
    _check_fit(source, manifest, target, into)
    skip = into.num_cached_blocks
    remote, local = manifest.blocks[skip:], into.blocks[skip:]
    expected = np.array(manifest.generations[skip:], dtype=np.uint64)
    _check_generations(peer, source, remote, expected, "before")
    order: list[int] = np.argsort(np.asarray(remote, dtype=np.int64), kind="stable").tolist()
    chosen = frozenset(policy.chosen(len(order)))
    lanes = [
        _Lane(peer, source, target, [(i, remote[i], local[i]) for i in part], chosen) for part in _parts(order, source)
    ]
    _run_lanes(lanes, should_stop)
    _check_generations(peer, source, remote, expected, "during")
    _check_digests(
        {i: found for lane in lanes for i, found in lane.digests.found.items()}, chosen, manifest.digests[skip:]
    )
    return len(remote) * source.block_bytes


def _parts(order: list[int], source: PoolDescriptor) -> list[list[int]]:
    """One part, or halves that are both worth a thread."""
    if len(order) * source.block_bytes < 2 * LANE_BYTES or len(order) < 2:
        return [order]
    middle = len(order) // 2
    return [order[:middle], order[middle:]]


class _Lane:
    """Part of a pull, read by one thread. `blocks`: (index, exporter's number, our number), in the exporter's order."""

    def __init__(
        self,
        peer: Peer,
        source: PoolDescriptor,
        target: SharedMemoryPool,
        blocks: Sequence[tuple[int, int, int]],
        chosen: frozenset[int],
    ) -> None:
        self._peer, self._target = peer, target
        self._ranges = coalesce([b[1] for b in blocks], [b[2] for b in blocks], source.block_bytes)
        self.digests = Digests(target, [b[0] for b in blocks], chosen)

    def run(self, should_stop: Callable[[], bool]) -> None:
        """Raises what the transport does, and `RequestCancelled`."""
        for batch in batches(self._ranges, BATCH_BYTES):
            if should_stop():
                raise RequestCancelled("the pull was aborted", leg="transfer")
            self._peer.read(batch, self._target.region, self.digests.arrived)


def _run_lanes(lanes: Sequence[_Lane], should_stop: Callable[[], bool]) -> None:
    """All at once; returns when none writes any more. The first that fails stops the others at their next batch."""
    if len(lanes) == 1:
        lanes[0].run(should_stop)
        return
    failed = threading.Event()

    def run(lane: _Lane) -> None:
        try:
            lane.run(lambda: failed.is_set() or should_stop())
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(len(lanes), "pull-lane") as threads:
        running = [threads.submit(run, lane) for lane in lanes]
    errors = [error for lane in running if (error := lane.exception()) is not None]
    if errors:
        raise min(errors, key=lambda error: isinstance(error, RequestCancelled))  # the cause, not who was stopped by it


def _check_fit(source: PoolDescriptor, manifest: KVManifest, target: SharedMemoryPool, into: ImportTarget) -> None:
    if source.block_bytes != target.block_bytes:
        raise HandoverError(
            f"blocks of {source.block_bytes} bytes do not fit a pool of {target.block_bytes} bytes each"
        )
    counts = {len(manifest.blocks), len(manifest.generations), len(manifest.digests), len(into.blocks)}
    if len(counts) != 1:
        raise HandoverError(f"manifest and target of chunk {manifest.chunk_index} differ in their number of blocks")
    if any(not 0 <= block < source.num_blocks for block in manifest.blocks):
        raise HandoverError(f"the manifest names a block outside the exporter's pool of {source.num_blocks}")
    if any(not 0 <= block < target.num_blocks for block in into.blocks[into.num_cached_blocks :]):
        raise HandoverError(f"the target names a block outside the pool of {target.num_blocks}")


def _check_generations(
    peer: Peer, source: PoolDescriptor, blocks: Sequence[int], expected: NDArray[np.uint64], when: str
) -> None:
    found = np.empty(len(blocks), dtype=np.uint64)
    ranges = coalesce(blocks, range(len(blocks)), 8, remote_base=source.generations_offset)
    peer.read(ranges, found.view(np.uint8))
    stale = np.flatnonzero(found != expected)
    if stale.size:
        raise StaleBlock(
            f"{stale.size} of {len(blocks)} blocks were reused {when} the read (first: block {blocks[stale[0]]}): "
            "prefill again"
        )


def _check_digests(found: Mapping[int, bytes], chosen: frozenset[int], digests: Sequence[bytes]) -> None:
    for index in sorted(chosen):
        if found.get(index) != digests[index]:
            raise DigestMismatch(f"block {index} of {len(digests)} differs from what was exported: prefill again")


class Digests:
    """Digests of what arrives, computed piece by piece: it is in the cache then (16 GB/s; 3 to 10 from memory), and
    over tcp the peer sends on meanwhile."""

    def __init__(self, target: SharedMemoryPool, order: Sequence[int], chosen: frozenset[int]) -> None:
        """`order`: the indexes of the blocks as they arrive; `chosen`: those that are wanted."""
        self._memory: memoryview = target.region.data
        self._block_bytes = target.block_bytes
        self._order, self._chosen = order, chosen
        self._num_bytes = 0
        self._hasher = xxhash.xxh3_128()
        """Of the block that has come in part."""
        self.found: dict[int, bytes] = {}

    def arrived(self, piece: Range) -> None:
        """The next bytes are in place."""
        at, end = piece.local, piece.local + piece.length
        while at < end:
            done, offset = divmod(self._num_bytes, self._block_bytes)
            take = min(self._block_bytes - offset, end - at)
            if (index := self._order[done]) in self._chosen:
                self._add(index, offset, self._memory[at : at + take])
            at += take
            self._num_bytes += take

    def _add(self, index: int, offset: int, data: memoryview) -> None:
        if len(data) == self._block_bytes:
            self.found[index] = xxhash.xxh3_128_digest(data)
            return
        if not offset:
            self._hasher.reset()
        self._hasher.update(data)
        if offset + len(data) == self._block_bytes:
            self.found[index] = self._hasher.digest()
