"""What every transport owes its callers: one suite, run over each."""

import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from peer_process import peer_process
from transport_tools import EVERY, make

from kvstore.transports.base import PIECE_BYTES, Peer, Range, Region, Transport
from kvstore.transports.registry import make_transport, select
from kvstore.transports.shm import SharedMemoryPool
from pdserve.errors import ConfigError, HandoverError, PeerLost

BLOCK = 10_000  # no multiple of a page, or of 8


@pytest.fixture(params=EVERY)
def transport(request: pytest.FixtureRequest) -> Iterator[Transport]:
    made = make(request.param)
    yield made
    made.close()


@pytest.fixture
def make_pool() -> Iterator[Callable[[int, int], SharedMemoryPool]]:
    pools: list[SharedMemoryPool] = []

    def make(num_blocks: int, block_bytes: int) -> SharedMemoryPool:
        pools.append(SharedMemoryPool(num_blocks, block_bytes))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


@pytest.fixture
def remote(make_pool: Callable[[int, int], SharedMemoryPool]) -> SharedMemoryPool:
    pool = make_pool(32, BLOCK)
    pool.blocks[:] = np.random.default_rng(1).integers(0, 256, pool.blocks.shape, dtype=np.uint8)
    pool.generations[:] = np.arange(32) + 1000
    return pool


@pytest.fixture
def region(transport: Transport, remote: SharedMemoryPool) -> Region:
    return transport.register(remote.region)


@pytest.fixture
def peer(transport: Transport, region: Region) -> Peer:
    return transport.connect(region.descriptor)


def test_reads_blocks_and_generations(peer: Peer, remote: SharedMemoryPool) -> None:
    local = np.zeros(3 * BLOCK + 16, dtype=np.uint8)
    peer.read(
        [
            Range(remote.block_offset(5), 0, BLOCK),
            Range(remote.block_offset(30), BLOCK, 2 * BLOCK),
            Range(remote.generation_offset(7), 3 * BLOCK, 16),
        ],
        local,
    )
    assert (local[:BLOCK] == remote.blocks[5]).all()
    assert (local[BLOCK : 3 * BLOCK].reshape(2, BLOCK) == remote.blocks[30:32]).all()
    assert local[3 * BLOCK :].view(np.uint64).tolist() == [1007, 1008]


def test_a_read_touches_nothing_but_its_ranges(peer: Peer) -> None:
    local = np.full(100, 0xAB, dtype=np.uint8)
    peer.read([Range(0, 10, 20), Range(50, 60, 0)], local)
    assert (local[:10] == 0xAB).all()
    assert (local[30:] == 0xAB).all()


def test_pieces_are_told_of_in_order_and_are_in_place_by_then(peer: Peer, remote: SharedMemoryPool) -> None:
    wanted = [Range(remote.block_offset(9), 5, 3 * BLOCK), Range(3, 3 * BLOCK + 5, 0), Range(40, 4 * BLOCK, 7)]
    local, told = np.zeros(5 * BLOCK, dtype=np.uint8), list[Range]()

    def arrived(piece: Range) -> None:
        assert (local[piece.local :][: piece.length] == remote.region[piece.remote :][: piece.length]).all()
        told.append(piece)

    peer.read(wanted, local, arrived)
    assert told == [r for r in wanted if r.length]


def test_large_ranges_are_told_of_in_pieces(
    transport: Transport, make_pool: Callable[[int, int], SharedMemoryPool]
) -> None:
    pool = make_pool(1, 5 * PIECE_BYTES // 2)
    peer = transport.connect(transport.register(pool.region).descriptor)
    told: list[Range] = []
    peer.read([Range(8, 0, pool.block_bytes - 8)], np.zeros(pool.block_bytes, dtype=np.uint8), told.append)
    assert [r.length for r in told] == [PIECE_BYTES, PIECE_BYTES, PIECE_BYTES // 2 - 8]
    assert [r.remote - 8 for r in told] == [r.local for r in told] == [0, PIECE_BYTES, 2 * PIECE_BYTES]


def test_what_the_listener_raises_ends_the_read_and_not_the_peer(peer: Peer, remote: SharedMemoryPool) -> None:
    def refuse(piece: Range) -> None:
        raise KeyError("seen enough")

    local = np.zeros(4 * BLOCK, dtype=np.uint8)
    with pytest.raises(KeyError, match="seen enough"):
        peer.read([Range(0, 0, BLOCK), Range(2 * BLOCK, BLOCK, BLOCK)], local, refuse)
    peer.read([Range(0, 0, BLOCK)], local)
    assert (local[:BLOCK] == remote.blocks[0]).all()


def test_writes_arrive(peer: Peer, remote: SharedMemoryPool) -> None:
    source = np.arange(256, dtype=np.uint8)
    peer.write([Range(3, 100, 50), Range(777, 0, 1)], source)
    assert (remote.region[3:53] == source[100:150]).all()
    assert remote.region[777] == 0


def test_thousands_of_small_unaligned_ranges(peer: Peer, remote: SharedMemoryPool) -> None:
    rng = np.random.default_rng(2)
    offsets = rng.integers(0, 32 * BLOCK - 13, 10_000)
    local = np.zeros(10_000 * 13 + 1, dtype=np.uint8)
    peer.read([Range(int(o), 1 + 13 * i, 13) for i, o in enumerate(offsets)], local)
    expected = np.concatenate([remote.region[o : o + 13] for o in offsets])
    assert (local[1:] == expected).all()


def test_an_empty_batch_moves_nothing(peer: Peer) -> None:
    local = np.full(1, 7, dtype=np.uint8)
    peer.read([], local)
    assert local[0] == 7


def test_many_threads_read_one_peer(peer: Peer, remote: SharedMemoryPool) -> None:
    """More threads than connections: the rest wait for their turn."""
    wrong: list[int] = []

    def work(block: int) -> None:
        local = np.zeros(BLOCK, dtype=np.uint8)
        for _ in range(20):
            peer.read([Range(remote.block_offset(block), 0, BLOCK)], local)
            if not (local == remote.blocks[block]).all():
                wrong.append(block)

    threads = [threading.Thread(target=work, args=(block,)) for block in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("bad", [Range(1 << 40, 0, 8), Range(0, 1 << 40, 8), Range(-8, 0, 8), Range(0, 0, -1)])
def test_ranges_outside_are_refused_and_the_peer_still_works(peer: Peer, bad: Range) -> None:
    local = np.zeros(64, dtype=np.uint8)
    for operation in (peer.read, peer.write):
        with pytest.raises(ValueError, match="Range"):
            operation([Range(0, 0, 8), bad], local)
    assert not local.any(), "nothing was read"
    peer.read([Range(0, 0, 8)], local)


def test_the_last_byte_is_inside_and_the_next_is_not(peer: Peer, region: Region) -> None:
    local = np.zeros(8, dtype=np.uint8)
    peer.read([Range(region.nbytes - 8, 0, 8)], local)
    with pytest.raises(ValueError, match="leaves"):
        peer.read([Range(region.nbytes - 7, 0, 8)], local)


def test_peers_come_and_go_at_run_time(transport: Transport, make_pool: Callable[[int, int], SharedMemoryPool]) -> None:
    local = np.zeros(8, dtype=np.uint8)
    for value in range(1, 6):
        pool = make_pool(1, 64)
        pool.blocks[:] = value
        region = transport.register(pool.region)
        peer = transport.connect(region.descriptor)
        peer.read([Range(0, 0, 8)], local)
        assert (local == value).all()
        peer.close()
        peer.close()
        with pytest.raises(PeerLost):
            peer.read([Range(0, 0, 8)], local)
        transport.deregister(region)
        transport.deregister(region)


def test_a_withdrawn_region_is_lost_for_old_and_new_peers(
    transport: Transport, peer: Peer, region: Region, remote: SharedMemoryPool
) -> None:
    transport.deregister(region)
    local = np.zeros(8, dtype=np.uint8)
    with pytest.raises(PeerLost):
        peer.read([Range(0, 0, 8)], local)
    with pytest.raises(PeerLost):
        transport.connect(region.descriptor)
    again = transport.connect(transport.register(remote.region).descriptor)
    again.read([Range(0, 0, 8)], local)


@pytest.mark.parametrize("garbage", [b"", b"\x00", b"nonsense", bytes(200), b"\x95\x01\x02\x03\x04\x05"])
def test_a_garbled_descriptor_is_a_lost_peer(transport: Transport, garbage: bytes) -> None:
    with pytest.raises(PeerLost):
        transport.connect(garbage)


def test_close_is_idempotent_and_ends_peers(transport: Transport, peer: Peer, region: Region) -> None:
    transport.close()
    transport.close()
    with pytest.raises(PeerLost):
        peer.read([Range(0, 0, 8)], np.zeros(8, dtype=np.uint8))
    with pytest.raises(PeerLost):
        transport.connect(region.descriptor)


def test_reads_from_another_process(transport: Transport) -> None:
    with peer_process(transport.name, 8, 4096) as child:
        child.tell("fill 77")
        local = np.zeros(8 * 4096, dtype=np.uint8)
        transport.connect(child.descriptor).read([Range(0, 0, local.size)], local)
        assert (local == 77).all()


def test_a_peer_killed_before_a_read_is_lost_at_once(transport: Transport) -> None:
    with peer_process(transport.name, 8, 4096) as child:
        peer = transport.connect(child.descriptor)
        local = np.zeros(8, dtype=np.uint8)
        peer.read([Range(0, 0, 8)], local)
        child.kill()
        with pytest.raises(PeerLost):
            peer.read([Range(0, 0, 8)], local)
        with pytest.raises(PeerLost):
            transport.connect(child.descriptor)


def test_a_peer_killed_in_the_middle_of_a_transfer_is_lost(transport: Transport) -> None:
    """Reads go on and on; the kill falls into one of them. No read may end well after the peer is dead."""
    with peer_process(transport.name, 64, 1 << 20) as child:
        peer = transport.connect(child.descriptor)
        local = np.zeros(64 << 20, dtype=np.uint8)
        began = threading.Event()
        ended: list[PeerLost] = []

        def pull() -> None:
            try:
                while True:
                    peer.read([Range(0, 0, local.size)], local)
                    began.set()
            except PeerLost as error:
                ended.append(error)

        thread = threading.Thread(target=pull)
        thread.start()
        assert began.wait(60)
        child.kill()
        thread.join(60)
        assert len(ended) == 1


def test_a_peer_that_ends_cleanly_is_lost_too(transport: Transport) -> None:
    with peer_process(transport.name, 1, 4096) as child:
        peer = transport.connect(child.descriptor)
        child.tell("stop")
        child.process.wait()
        with pytest.raises(PeerLost):
            peer.read([Range(0, 0, 8)], np.zeros(8, dtype=np.uint8))


def test_an_unknown_transport_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="shm, tcp") as caught:
        make_transport("carrier-pigeon")
    assert caught.value.key == "transports"


def test_selection_follows_the_offer_and_needs_one_host_for_shm() -> None:
    assert select(("shm", "tcp"), {"tcp", "shm"}, same_host=True) == "shm"
    assert select(("tcp", "shm"), {"tcp", "shm"}, same_host=True) == "tcp"
    assert select(("shm", "tcp"), {"tcp", "shm"}, same_host=False) == "tcp"
    with pytest.raises(HandoverError, match="no common transport"):
        select(("shm",), {"shm", "tcp"}, same_host=False)
