"""Large pulls run in two threads, and in few calls: the counts of FlowKV, asserted on the real hand-over code."""

import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvstore.handover import verify
from kvstore.handover.verify import DigestPolicy, Digests, PoolDescriptor, digest_blocks, pull_blocks
from kvstore.transports.base import Arrived, Peer, Range, ignore
from kvstore.transports.registry import NAMES, make_transport
from kvstore.transports.shm import SharedMemoryPool
from pdserve.engine.base import ImportTarget
from pdserve.errors import DigestMismatch, PeerLost, RequestCancelled, StaleBlock
from pdserve.types import KVManifest

BLOCKS, BYTES = 48, 5_000


class Watched:
    """Passes reads on; counts calls and ranges of blocks; `before` runs in the reading thread."""

    def __init__(self, peer: Peer, generations_offset: int, before: Callable[[Range], object] = lambda r: None) -> None:
        self._peer, self._limit, self._before = peer, generations_offset, before
        self._lock = threading.Lock()
        self.calls = self.ranges = 0
        self.threads: set[str] = set()

    def read(self, ranges: Sequence[Range], into: NDArray[np.uint8], arrived: Arrived = ignore) -> None:
        if ranges[0].remote < self._limit:
            with self._lock:
                self.calls, self.ranges = self.calls + 1, self.ranges + len(ranges)
                self.threads.add(threading.current_thread().name)
            self._before(ranges[0])
        self._peer.read(ranges, into, arrived)

    def write(self, ranges: Sequence[Range], source: NDArray[np.uint8]) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self._peer.close()


class Pair:
    def __init__(self, transport: str, num_blocks: int, block_bytes: int) -> None:
        self.transport = make_transport(transport)
        self.source, self.target = (SharedMemoryPool(num_blocks, block_bytes) for _ in range(2))
        self.source.region[: num_blocks * block_bytes] = np.random.default_rng(6).integers(
            0, 256, num_blocks * block_bytes, dtype=np.uint8
        )
        self.descriptor = PoolDescriptor.of(self.source, self.transport.register(self.source.region))
        self.peer: Peer = self.transport.connect(self.descriptor.region)

    def watched(self, before: Callable[[Range], object] = lambda r: None) -> Watched:
        return Watched(self.peer, self.source.generations_offset, before)

    def manifest(self, blocks: Sequence[int]) -> KVManifest:
        generations = tuple(int(self.source.generations[b]) for b in blocks)
        return KVManifest(0, 0, 16, tuple(blocks), generations, digest_blocks(self.source, blocks), True)

    def pull(
        self,
        manifest: KVManifest,
        into: Sequence[int],
        peer: Peer | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        target = ImportTarget(tuple(into))
        pull_blocks(peer or self.peer, self.descriptor, manifest, self.target, target, DigestPolicy(), should_stop)

    def close(self) -> None:
        self.transport.close()
        self.source.close()
        self.target.close()


@pytest.fixture(params=NAMES)
def pair(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setattr(verify, "LANE_BYTES", 4 * BYTES)
    monkeypatch.setattr(verify, "BATCH_BYTES", 3 * BYTES // 2)  # batches end in the middle of blocks
    with closing(Pair(request.param, BLOCKS, BYTES)) as made:
        yield made


def shuffled(seed: int, count: int = 32) -> list[int]:
    return np.random.default_rng(seed).permutation(BLOCKS)[:count].tolist()


def test_two_threads_bring_every_block_to_its_place_and_touch_no_other(pair: Pair) -> None:
    pair.target.blocks[:] = 0xAB
    source, target, both = shuffled(1), shuffled(2), threading.Barrier(2)
    peer = pair.watched(lambda first: both.wait(60) if peer.calls <= 2 else None)
    pair.pull(pair.manifest(source), target, peer)
    assert len(peer.threads) == 2
    assert (pair.target.blocks[target] == pair.source.blocks[source]).all()
    rest = sorted(set(range(BLOCKS)) - set(target))
    assert (pair.target.blocks[rest] == 0xAB).all()


def test_a_small_pull_takes_no_second_thread(pair: Pair) -> None:
    peer = pair.watched()
    pair.pull(pair.manifest(range(7)), range(7), peer)
    assert peer.threads == {threading.current_thread().name}


@pytest.mark.parametrize("victim", [0, 15, 16, 31])
def test_corruption_and_reuse_are_found_in_either_half(pair: Pair, victim: int) -> None:
    source, target = shuffled(3), shuffled(4)
    manifest = pair.manifest(source)
    pair.source.blocks[source[victim], 7] ^= 4
    with pytest.raises(DigestMismatch, match=f"block {victim} of 32"):
        pair.pull(manifest, target)

    def reuse(first: Range) -> None:
        pair.source.generations[source[victim]] += 1

    with pytest.raises(StaleBlock, match="during the read"):
        pair.pull(manifest, target, pair.watched(reuse))


def test_the_first_failure_stops_the_other_thread_and_is_what_is_raised(pair: Pair) -> None:
    """When the pull has raised, no thread of it writes any more."""
    seen = threading.Barrier(2)

    def one_fails(first: Range) -> None:
        if peer.calls <= 2:
            seen.wait(60)
            if threading.current_thread().name.endswith("_1"):
                raise PeerLost("gone")

    peer = pair.watched(one_fails)
    with pytest.raises(PeerLost, match="gone"):
        pair.pull(pair.manifest(shuffled(5)), shuffled(6), peer)
    assert not [t for t in threading.enumerate() if t.name.startswith("pull-lane")]
    before = pair.target.blocks.copy()
    pair.source.blocks[:] = 1
    assert (pair.target.blocks == before).all()


def test_a_pull_in_two_threads_stops_when_told(pair: Pair) -> None:
    peer = pair.watched()
    with pytest.raises(RequestCancelled):
        pair.pull(pair.manifest(shuffled(7)), shuffled(8), peer, should_stop=lambda: peer.calls >= 2)
    assert peer.calls <= 4, "one batch each after the word"


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_digests_do_not_depend_on_how_the_bytes_come_in(data: st.DataObject) -> None:
    with closing(SharedMemoryPool(6, 1000)) as pool:
        pool.region[:6000] = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 256, 6000, np.uint8)
        order = data.draw(st.permutations(range(6)))
        chosen = frozenset(data.draw(st.sets(st.integers(0, 5))))
        digests = Digests(pool, order, chosen)
        cuts = sorted({0, 6000, *data.draw(st.sets(st.integers(1, 5999), max_size=20))})
        for start, end in pairwise(cuts):
            digests.arrived(Range(0, start, end - start))
        blocks = digest_blocks(pool, range(6))
        assert digests.found == {order[place]: blocks[place] for place in range(6) if order[place] in chosen}


# ---- the counts of FlowKV ----

PIECE, NUM_LAYERS, REQUEST_BLOCKS = 32 << 10, 32, 64
SCATTERED = [(i * 37) % REQUEST_BLOCKS for i in range(REQUEST_BLOCKS)]
"""A permutation without neighbours: as an allocator leaves them that does not look for runs."""


def count_ranges(num_blocks: int, block_bytes: int, source: Sequence[int], into: Sequence[int]) -> tuple[int, int]:
    """Ranges and calls that a pull of these blocks hands to the transport."""
    with closing(Pair("shm", num_blocks, block_bytes)) as pair:
        peer = pair.watched()
        pair.pull(pair.manifest(source), into, peer)
        assert (pair.target.blocks[list(into)] == pair.source.blocks[list(source)]).all()
        return peer.ranges, peer.calls


def layer_major(blocks: Sequence[int]) -> list[int]:
    """The pieces of these blocks where each layer's K, and its V, are arrays of their own."""
    return [part * REQUEST_BLOCKS + block for block in blocks for part in range(2 * NUM_LAYERS)]


def test_128_mb_fall_from_4096_ranges_to_64_to_4() -> None:
    """FlowKV (arXiv 2504.03775): 64 blocks of 32 layers, K and V, 32 KB each."""
    contiguous = range(REQUEST_BLOCKS)
    pieces = 2 * NUM_LAYERS * REQUEST_BLOCKS
    ranges, _ = count_ranges(pieces, PIECE, layer_major(contiguous), layer_major(SCATTERED))
    assert ranges == pieces == 4096
    ranges, calls = count_ranges(REQUEST_BLOCKS, pieces // REQUEST_BLOCKS * PIECE, contiguous, SCATTERED)
    assert ranges <= 64
    assert calls <= 4
    ranges, calls = count_ranges(REQUEST_BLOCKS, pieces // REQUEST_BLOCKS * PIECE, contiguous, contiguous)
    assert 1 <= ranges <= 4
    assert calls <= 4
