"""The verified read, over real transports: reuse under the read, corruption, misfits."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from kvstore.handover.verify import DigestPolicy, PoolDescriptor, digest_blocks, digest_policy, pull_blocks
from kvstore.transports.base import Arrived, Peer, Range, ignore
from kvstore.transports.registry import NAMES, make_transport
from kvstore.transports.shm import SharedMemoryPool
from pdserve.engine.base import ImportTarget
from pdserve.errors import DigestMismatch, HandoverError, RequestCancelled, StaleBlock
from pdserve.types import KVManifest

BLOCKS, BYTES = 64, 5000
SOURCE = tuple(range(8, 40))
TARGET = ImportTarget(tuple(range(20, 52)))


class Recorder:
    """Passes reads on range by range; `between` runs before each, and every call is counted."""

    def __init__(self, peer: Peer, between: Callable[[int], None] = lambda n: None) -> None:
        self.peer, self.between = peer, between
        self.calls: list[list[Range]] = []
        self.num_ranges = 0

    def read(self, ranges: Sequence[Range], into: NDArray[np.uint8], arrived: Arrived = ignore) -> None:
        self.calls.append(list(ranges))
        for r in ranges:
            self.between(self.num_ranges)
            self.num_ranges += 1
            self.peer.read([r], into, arrived)

    def write(self, ranges: Sequence[Range], source: NDArray[np.uint8]) -> None:
        self.peer.write(ranges, source)

    def close(self) -> None:
        self.peer.close()


class Pair:
    """An exporter's and an importer's pool with a real transport between them."""

    def __init__(self, transport: str) -> None:
        self.transport = make_transport(transport)
        self.source, self.target = SharedMemoryPool(BLOCKS, BYTES), SharedMemoryPool(BLOCKS, BYTES)
        self.source.blocks[:] = np.random.default_rng(4).integers(0, 256, (BLOCKS, BYTES), dtype=np.uint8)
        self.source.generations[:] = np.arange(BLOCKS) * 7 + 1
        region = self.transport.register(self.source.region)
        self.descriptor = PoolDescriptor.decode(PoolDescriptor.of(self.source, region).encode())
        self.peer = self.transport.connect(self.descriptor.region)
        self.policy = digest_policy(transport)

    def manifest(self, blocks: Sequence[int] = SOURCE) -> KVManifest:
        generations = tuple(int(self.source.generations[b]) for b in blocks)
        digests = digest_blocks(self.source, blocks)
        return KVManifest(0, 0, 16 * len(blocks), tuple(blocks), generations, digests, True)

    def reuse(self, block: int) -> None:
        """What an engine does: the generation first, then the bytes."""
        self.source.generations[block] += 1
        self.source.blocks[block] = 0xEE

    def pull(self, manifest: KVManifest, target: ImportTarget = TARGET, peer: Peer | None = None) -> int:
        return pull_blocks(peer or self.peer, self.descriptor, manifest, self.target, target, self.policy)

    def close(self) -> None:
        self.transport.close()
        self.source.close()
        self.target.close()


@pytest.fixture(params=NAMES)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    made = Pair(request.param)
    yield made
    made.close()


def test_a_pull_brings_every_block_and_only_those(pair: Pair) -> None:
    pair.target.blocks[:] = 0xAB
    assert pair.pull(pair.manifest()) == 32 * BYTES
    assert (pair.target.blocks[20:52] == pair.source.blocks[8:40]).all()
    assert (pair.target.blocks[:20] == 0xAB).all()
    assert (pair.target.blocks[52:] == 0xAB).all()


def test_contiguous_blocks_are_one_range(pair: Pair) -> None:
    recorder = Recorder(pair.peer)
    pair.pull(pair.manifest(), peer=recorder)
    assert [len(call) for call in recorder.calls] == [1, 1, 1], "generations, blocks, generations"


def test_cached_blocks_are_not_pulled(pair: Pair) -> None:
    pair.target.blocks[20:30] = 0xAB
    assert pair.pull(pair.manifest(), replace(TARGET, num_cached_blocks=10)) == 22 * BYTES
    assert (pair.target.blocks[20:30] == 0xAB).all()
    assert (pair.target.blocks[30:52] == pair.source.blocks[18:40]).all()


def test_scattered_blocks_land_in_their_places(pair: Pair) -> None:
    rng = np.random.default_rng(5)
    source = tuple(int(b) for b in rng.permutation(BLOCKS)[:32])
    target = ImportTarget(tuple(int(b) for b in rng.permutation(BLOCKS)[:32]))
    pair.pull(pair.manifest(source), target)
    assert (pair.target.blocks[list(target.blocks)] == pair.source.blocks[list(source)]).all()


def test_a_block_reused_before_the_pull_is_stale(pair: Pair) -> None:
    manifest = pair.manifest()
    pair.reuse(17)
    with pytest.raises(StaleBlock, match="before the read"):
        pair.pull(manifest)


@pytest.mark.parametrize("victim", [8, 15, 38])
@pytest.mark.parametrize("when", range(1, 6))
def test_a_block_reused_in_the_middle_of_a_pull_is_stale(pair: Pair, victim: int, when: int) -> None:
    """Four ranges of blocks follow the generations; the victim is reused before, between or after them."""
    target = ImportTarget((*range(8), *range(10, 18), *range(20, 28), *range(30, 38)))
    manifest = pair.manifest()
    pair.policy = DigestPolicy(every=1 << 30)  # generations have to tell
    recorder = Recorder(pair.peer, lambda n: pair.reuse(victim) if n == when else None)
    with pytest.raises(StaleBlock, match="during the read"):
        pair.pull(manifest, target, recorder)


def test_corruption_of_a_digested_block_is_found(pair: Pair) -> None:
    manifest = pair.manifest()
    pair.source.blocks[SOURCE[-1], 123] ^= 1
    with pytest.raises(DigestMismatch, match="block 31 of 32"):
        pair.pull(manifest)


def test_tcp_digests_every_block_and_shm_a_sample() -> None:
    assert digest_policy("tcp").chosen(40) == list(range(40))
    assert digest_policy("shm").chosen(40) == [0, 16, 32, 39]
    assert digest_policy("anything-new").chosen(3) == [0, 1, 2]
    assert digest_policy("shm").chosen(0) == []


def test_corruption_of_any_block_is_found_on_tcp() -> None:
    pair = Pair("tcp")
    for block in SOURCE[::5]:
        manifest = pair.manifest()
        pair.source.blocks[block, -1] ^= 0x80
        with pytest.raises(DigestMismatch):
            pair.pull(manifest)
    pair.close()


def test_what_does_not_fit_is_refused_before_a_byte_moves(pair: Pair) -> None:
    manifest = pair.manifest()
    pair.target.blocks[:] = 0xAB
    misfits = [
        (replace(manifest, blocks=(*SOURCE[:-1], BLOCKS)), TARGET),
        (replace(manifest, digests=manifest.digests[:-1]), TARGET),
        (replace(manifest, generations=manifest.generations[:-1]), TARGET),
        (manifest, ImportTarget(TARGET.blocks[:-1])),
        (manifest, ImportTarget((*TARGET.blocks[:-1], BLOCKS))),
    ]
    for bad_manifest, target in misfits:
        with pytest.raises(HandoverError):
            pair.pull(bad_manifest, target)
    pair.descriptor = PoolDescriptor(BLOCKS, BYTES + 1, 0, b"")
    with pytest.raises(HandoverError, match="do not fit"):
        pair.pull(manifest)
    assert (pair.target.blocks == 0xAB).all()


def test_a_pull_stops_when_told(pair: Pair) -> None:
    with pytest.raises(RequestCancelled):
        pull_blocks(
            pair.peer, pair.descriptor, pair.manifest(), pair.target, TARGET, pair.policy, should_stop=lambda: True
        )
    assert not pair.target.blocks.any()


def test_a_garbled_pool_descriptor_is_refused() -> None:
    with pytest.raises(HandoverError, match="cannot be read"):
        PoolDescriptor.decode(b"\x00garbage")
