"""What every transport owes its callers when much happens at once, or a peer stalls or dies in the middle."""

import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peer_process import peer_process
from transport_tools import EVERY, make

from kvstore.handover.verify import DigestPolicy, PoolDescriptor, digest_blocks, pull_blocks
from kvstore.transports.base import Peer, Range, Transport
from kvstore.transports.shm import SharedMemoryPool
from pdserve.engine.base import ImportTarget
from pdserve.errors import DigestMismatch, HandoverError, PeerLost, StaleBlock
from pdserve.types import KVManifest

SIZE = 300_007  # no multiple of anything
MB = 1 << 20


@pytest.fixture(scope="module", params=EVERY)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def near(name: str) -> Iterator[Transport]:
    made = make(name)
    yield made
    made.close()


@pytest.fixture(scope="module")
def far(name: str) -> Iterator[Transport]:
    """Another one of the kind: what the other process has."""
    made = make(name)
    yield made
    made.close()


@pytest.fixture(scope="module")
def memory() -> Iterator[SharedMemoryPool]:
    pool = SharedMemoryPool(1, SIZE)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def peer(near: Transport, far: Transport, memory: SharedMemoryPool) -> Iterator[Peer]:
    connected = near.connect(far.register(memory.region).descriptor)
    yield connected
    connected.close()


def cut(data: st.DataObject, limit: int) -> list[tuple[int, int]]:
    """Disjoint (start, end) pieces in [0, limit), in any order."""
    points = sorted(data.draw(st.sets(st.integers(0, limit), min_size=2, max_size=40)))
    pieces = [(a, b) for a, b in pairwise(points) if data.draw(st.booleans())]
    return data.draw(st.permutations(pieces))


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_ranges_at_any_alignment_arrive_and_nothing_else(
    peer: Peer, memory: SharedMemoryPool, data: st.DataObject
) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 20)))
    theirs, ours = memory.region[:SIZE], rng.integers(0, 256, SIZE, dtype=np.uint8)
    theirs[:] = rng.integers(0, 256, SIZE, dtype=np.uint8)
    pieces = cut(data, SIZE)
    shift = data.draw(st.integers(0, 9))
    ranges = [Range(a, max(0, a - shift), b - a) for a, b in pieces]
    if data.draw(st.booleans()):
        expected = theirs.copy()
        for r in ranges:
            expected[r.remote : r.remote + r.length] = ours[r.local : r.local + r.length]
        peer.write(ranges, ours)
        assert np.array_equal(theirs, expected)
    else:
        into, expected = ours.copy(), ours.copy()
        ranges = [Range(r.remote, r.remote, r.length) for r in ranges]
        for r in ranges:
            expected[r.local : r.local + r.length] = theirs[r.remote : r.remote + r.length]
        peer.read(ranges, into)
        assert np.array_equal(into, expected)


def run_all(work: list[Callable[[], None]]) -> list[BaseException]:
    """Each in a thread of its own; what they raised."""
    raised: list[BaseException] = []

    def guarded(one: Callable[[], None]) -> None:
        try:
            one()
        except BaseException as error:  # noqa: BLE001 (handed to the test)
            raised.append(error)

    threads = [threading.Thread(target=guarded, args=(one,)) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
        assert not thread.is_alive(), "a transfer never ended"
    return raised


def test_more_large_transfers_than_it_does_at_a_time_wait_for_their_turn(near: Transport, far: Transport) -> None:
    """Ten reads and writes of 12 MB at once, to disjoint places: back-pressure, never a mix-up."""
    pool = SharedMemoryPool(10, 12 * MB)
    for i in range(10):
        pool.blocks[i] = i
    region = far.register(pool.region)
    peer = near.connect(region.descriptor)
    into = np.zeros((10, 12 * MB), dtype=np.uint8)

    def move(i: int) -> None:
        if i % 2:
            peer.read([Range(pool.block_offset(i), 0, 12 * MB)], into[i])
        else:
            into[i] = 100 + i
            peer.write([Range(pool.block_offset(i), 0, 12 * MB)], into[i])

    raised = run_all([lambda i=i: move(i) for i in range(10)])
    assert raised == []
    for i in range(10):
        wanted = i if i % 2 else 100 + i
        assert (into[i] == wanted).all()
        assert (pool.blocks[i] == wanted).all()
    peer.close()
    far.deregister(region)
    pool.close()


def test_closing_a_peer_ends_its_transfers_and_no_others(near: Transport, far: Transport) -> None:
    pool = SharedMemoryPool(4, 8 * MB)
    region = far.register(pool.region)
    closed, kept = near.connect(region.descriptor), near.connect(region.descriptor)
    began = threading.Event()

    def read_until_lost() -> None:
        into = np.zeros(pool.num_blocks * pool.block_bytes, dtype=np.uint8)
        while True:
            closed.read([Range(0, 0, into.size)], into)
            began.set()

    def close_it() -> None:
        assert began.wait(60)
        closed.close()

    raised = run_all([read_until_lost, close_it])
    assert [type(error) for error in raised] == [PeerLost]
    kept.read([Range(0, 0, 8)], np.zeros(8, dtype=np.uint8))
    kept.close()
    far.deregister(region)
    pool.close()


def test_withdrawing_memory_under_a_reader_is_seen_by_it(near: Transport, far: Transport) -> None:
    pool = SharedMemoryPool(4, 8 * MB)
    region = far.register(pool.region)
    peer = near.connect(region.descriptor)
    began = threading.Event()

    def read_until_lost() -> None:
        into = np.zeros(pool.num_blocks * pool.block_bytes, dtype=np.uint8)
        while True:
            peer.read([Range(0, 0, into.size)], into)
            began.set()

    def withdraw() -> None:
        assert began.wait(60)
        far.deregister(region)

    raised = run_all([read_until_lost, withdraw])
    assert [type(error) for error in raised] == [PeerLost]
    peer.close()
    pool.close()


def test_a_stalled_peer_costs_one_typed_error_and_nothing_arrives_afterwards(name: str) -> None:
    """The peer is stopped, not dead. Who could read it all the same may; else the read ends in time, and when the peer
    wakes up, no byte of it may reach memory that has another use by then."""
    transport = make(name, progress_timeout_s=3.0)
    with peer_process(name, 4, MB) as child:
        child.tell("fill 77")
        peer = transport.connect(child.descriptor)
        into = np.zeros(4 * MB, dtype=np.uint8)
        peer.read([Range(0, 0, 8)], into)
        into[:] = 5
        child.process.send_signal(signal.SIGSTOP)
        try:
            peer.read([Range(0, 0, into.size)], into)
            assert (into == 77).all()
        except HandoverError:
            into[:] = 5  # somebody else's by now
            child.process.send_signal(signal.SIGCONT)
            child.tell("fill 78")
            again = transport.connect(child.descriptor)
            other = np.zeros(4 * MB, dtype=np.uint8)
            again.read([Range(0, 0, other.size)], other)  # whatever was on its way came before this
            assert (other == 78).all()
            assert (into == 5).all()
    transport.close()


def test_a_peer_killed_under_a_write_is_lost(near: Transport) -> None:
    with peer_process(near.name, 32, MB) as child:
        peer = near.connect(child.descriptor)
        source = np.zeros(32 * MB, dtype=np.uint8)
        began = threading.Event()

        def write_until_lost() -> None:
            while True:
                peer.write([Range(0, 0, source.size)], source)
                began.set()

        def kill() -> None:
            assert began.wait(60)
            child.kill()

        raised = run_all([write_until_lost, kill])
        assert [type(error) for error in raised] == [PeerLost]
    with peer_process(near.name, 1, 4096) as child:  # and the transport goes on with others
        child.tell("fill 9")
        into = np.zeros(4096, dtype=np.uint8)
        near.connect(child.descriptor).read([Range(0, 0, 4096)], into)
        assert (into == 9).all()


# ---- a hand-over of real blocks ----

NUM, BLOCK = 24, 48_000
TARGET = ImportTarget((3, 4, 5, 20, 19, 0, 7, 8))
SOURCE = (10, 11, 12, 13, 2, 3, 4, 5)


@dataclass
class HandOver:
    exporter: SharedMemoryPool
    importer: SharedMemoryPool
    source: PoolDescriptor
    peer: Peer


@pytest.fixture
def pair(near: Transport, far: Transport) -> Iterator[HandOver]:
    exporter, importer = SharedMemoryPool(NUM, BLOCK), SharedMemoryPool(NUM, BLOCK)
    exporter.blocks[:] = np.random.default_rng(5).integers(0, 256, exporter.blocks.shape, dtype=np.uint8)
    exporter.generations[:] = np.arange(NUM) + 7
    regions = far.register(exporter.region), near.register(importer.region)
    source = PoolDescriptor.of(exporter, regions[0])
    peer = near.connect(source.region)
    yield HandOver(exporter, importer, source, peer)
    peer.close()
    far.deregister(regions[0])
    near.deregister(regions[1])
    exporter.close()
    importer.close()


def manifest_of(pool: SharedMemoryPool) -> KVManifest:
    generations = tuple(int(pool.generations[block]) for block in SOURCE)
    return KVManifest(0, 0, 16 * len(SOURCE), SOURCE, generations, digest_blocks(pool, SOURCE), True)


def test_a_hand_over_moves_the_blocks_and_touches_no_other(pair: HandOver) -> None:
    manifest = manifest_of(pair.exporter)
    moved = pull_blocks(pair.peer, pair.source, manifest, pair.importer, TARGET, DigestPolicy(1))
    assert moved == len(SOURCE) * BLOCK
    for theirs, ours in zip(SOURCE, TARGET.blocks, strict=True):
        assert (pair.importer.blocks[ours] == pair.exporter.blocks[theirs]).all()
    untouched = sorted(set(range(NUM)) - set(TARGET.blocks))
    assert not pair.importer.blocks[untouched].any()


def test_a_hand_over_refuses_blocks_that_were_reused_or_altered(pair: HandOver) -> None:
    manifest = manifest_of(pair.exporter)
    pair.exporter.blocks[SOURCE[2], 77] ^= 1
    with pytest.raises(DigestMismatch):
        pull_blocks(pair.peer, pair.source, manifest, pair.importer, TARGET, DigestPolicy(1))
    pair.exporter.generations[SOURCE[4]] += 1
    with pytest.raises(StaleBlock):
        pull_blocks(pair.peer, pair.source, manifest, pair.importer, TARGET, DigestPolicy(1))
