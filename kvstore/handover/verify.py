"""The read itself: pull a chunk's blocks from a peer, and know that they are the blocks that were exported.

One-sided reads race with reuse: nothing stops the exporter from giving a block away in the middle of a read. Its
generation grows before the first byte changes, so generations that equal the manifest's before *and after* the read
prove that all bytes read were one owner's. Digests find corruption on the way. Only after `pull_blocks` returned
may the chunk be committed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from kvstore.ranges import batches, coalesce
from kvstore.transports.base import Peer, Region
from kvstore.transports.shm import SharedMemoryPool
from pdserve.engine.base import ImportTarget, KVMemory
from pdserve.errors import DigestMismatch, HandoverError, RequestCancelled, StaleBlock
from pdserve.types import KVManifest

BATCH_BYTES = 32 << 20
"""Bytes a transport call: an aborted pull ends after at most one of them, about 20 ms of tcp on loopback. Smaller ones
cost CPU (0.35 s/GB at 64 MiB, 0.38 at 16, 0.5 at 4): the peer idles between them."""


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
    for batch in batches(coalesce(remote, local, source.block_bytes), BATCH_BYTES):
        if should_stop():
            raise RequestCancelled("the pull was aborted", leg="transfer")
        peer.read(batch, target.region)
    _check_generations(peer, source, remote, expected, "during")
    _check_digests(target, local, manifest.digests[skip:], policy)
    return len(remote) * source.block_bytes


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
    if any(not 0 <= block < target.num_blocks for block in into.blocks):
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


def _check_digests(
    target: SharedMemoryPool, blocks: Sequence[int], digests: Sequence[bytes], policy: DigestPolicy
) -> None:
    chosen = policy.chosen(len(blocks))
    found = digest_blocks(target, [blocks[i] for i in chosen])
    for i, digest in zip(chosen, found, strict=True):
        if digest != digests[i]:
            raise DigestMismatch(f"block {i} of {len(blocks)} differs from what was exported: prefill again")
