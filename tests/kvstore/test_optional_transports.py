"""What is special about the optional transports: what is missing is named, who may join, what may arrive late."""

import ctypes
import socket
import sys
from pathlib import Path
from types import ModuleType

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transport_tools import make

from kvstore.ranges import batches
from kvstore.transports import mooncake
from kvstore.transports.base import Range
from kvstore.transports.landing import MAX_ABANDONED, PLACES, Landing
from kvstore.transports.mooncake import MooncakeOptions, make_mooncake
from kvstore.transports.one_sided import MAX_BATCH_BYTES, MAX_PIECES, MAX_REGIONS, OneSidedTransport
from kvstore.transports.registry import check_names, make_transport
from kvstore.transports.tcp import TcpTransport
from pdserve.errors import ConfigError, HandoverError, PeerLost, TransferTimeout


@pytest.mark.parametrize(
    ("name", "module", "advice"),
    [
        ("mooncake", "mooncake.engine", "pdserve\\[mooncake\\]"),
        ("nixl", "nixl._api", "make transports"),
        ("gloo", "kvstore.transports.process_group", "pdserve\\[torch\\]"),
    ],
)
def test_a_missing_package_is_a_config_error_that_says_how_to_get_it(
    name: str, module: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=advice) as caught:
        make_transport(name)
    assert caught.value.key == "transports"


def test_a_missing_system_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the loader says of libibverbs is an ImportError of a module that is there."""
    (tmp_path / "engine.py").write_text("raise ImportError('libibverbs.so.1: cannot open')")
    package = ModuleType("mooncake")
    package.__path__ = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, "mooncake", package)
    monkeypatch.delitem(sys.modules, "mooncake.engine", raising=False)
    with pytest.raises(ConfigError, match="apt-get install libibverbs1"):
        make_mooncake()


def test_rdma_without_a_device_is_refused_and_does_not_fall_back_to_tcp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mooncake, "RDMA_DEVICES", tmp_path / "infiniband")
    with pytest.raises(ConfigError, match="no RDMA device") as caught:
        make_mooncake(MooncakeOptions(protocol="rdma"))
    assert caught.value.key == "mooncake.protocol"
    with pytest.raises(ConfigError, match="choose tcp or rdma"):
        make_mooncake(MooncakeOptions(protocol="carrier"))


def test_unknown_names_are_refused_with_the_key() -> None:
    check_names(["shm", "tcp", "mooncake", "nixl", "nccl", "gloo"])
    with pytest.raises(ConfigError, match="carrier-pigeon") as caught:
        check_names(["shm", "carrier-pigeon"], "kv.transports")
    assert caught.value.key == "kv.transports"


@given(st.lists(st.tuples(st.integers(0, 3 * MAX_BATCH_BYTES)), max_size=20), st.integers(0, 2 * MAX_PIECES))
@settings(max_examples=60, deadline=None)
def test_batches_cover_all_bytes_once_within_what_a_library_takes(long: list[tuple[int]], num_small: int) -> None:
    lengths = [length for (length,) in long] + [7] * num_small
    starts = np.cumsum([0, *lengths])[:-1].tolist()
    ranges = [Range(start + 5, start, length) for start, length in zip(starts, lengths, strict=True)]
    seen = 0
    for batch in batches(ranges, MAX_BATCH_BYTES, MAX_PIECES):
        assert 0 < len(batch) <= MAX_PIECES
        assert sum(r.length for r in batch) <= MAX_BATCH_BYTES
        for r in batch:
            assert r.length > 0
            assert (r.local, r.remote) == (seen, seen + 5)
            seen += r.length
    assert seen == sum(lengths)


# ---- landing ----


class Recorder:
    def __init__(self) -> None:
        self.registered: set[int] = set()

    def register(self, address: int, nbytes: int) -> None:
        self.registered.add(address)

    def deregister(self, address: int, nbytes: int) -> None:
        self.registered.remove(address)


def fail_in(landing: Landing, error: HandoverError) -> int:
    """The address of the place whose transfer ended so."""
    try:
        with landing.take() as place:
            raise error
    except type(error):
        return place.address


def test_memory_of_a_transfer_that_timed_out_is_never_used_again() -> None:
    recorder = Recorder()
    landing = Landing(recorder, 4096)
    lost = set()
    for _ in range(MAX_ABANDONED):
        lost.add(fail_in(landing, TransferTimeout("late")))
    with pytest.raises(PeerLost, match="never ended"), landing.take():
        pass
    assert len(lost) == MAX_ABANDONED
    assert lost == recorder.registered
    landing.close()
    assert not recorder.registered


def test_memory_of_a_transfer_that_failed_outright_is_used_again() -> None:
    landing = Landing(Recorder(), 4096)
    assert len({fail_in(landing, PeerLost("gone")) for _ in range(5 * PLACES)}) == 1


# ---- process groups ----


@pytest.mark.transports
@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.one_of(st.integers(0, 1 << 18), st.integers(1 << 18, 40 << 20)), max_size=60))
def test_both_sides_of_a_pair_cut_a_payload_alike_and_completely(lengths: list[int]) -> None:
    group = pytest.importorskip("kvstore.transports.process_group")
    seen = dict.fromkeys(range(len(lengths)), 0)
    for message in group.plan(lengths):
        assert sum(stop - start for _, start, stop in message) <= group.PIECE_BYTES
        for index, start, stop in message:
            assert start == seen[index]
            seen[index] = stop
    assert list(seen.values()) == lengths


@pytest.mark.transports
def test_a_pair_listens_on_its_own_address_only_and_for_token_holders_only() -> None:
    transport = make("gloo")
    assert isinstance(transport, TcpTransport)
    memory = np.zeros(1 << 20, dtype=np.uint8)
    region = transport.register(memory)
    before = listening()
    peer = transport.connect(region.descriptor)
    assert all(host == "127.0.0.1" for host, _ in listening() - before)
    host, port, region_id, _, nbytes = msgspec.msgpack.decode(region.descriptor)
    forged = msgspec.msgpack.encode([host, port, region_id, bytes(32), nbytes])
    with pytest.raises(PeerLost, match="did not let us in"):
        transport.connect(forged)
    plain = TcpTransport()
    with pytest.raises(PeerLost, match="did not let us in"):  # tcp's payload would not go where gloo looks for it
        plain.connect(region.descriptor)
    peer.close()
    plain.close()
    transport.close()


def listening() -> set[tuple[str, int]]:
    """Every address that this machine's tcp sockets listen on."""
    found = set()
    for path, family in (("/proc/net/tcp", socket.AF_INET), ("/proc/net/tcp6", socket.AF_INET6)):
        for line in Path(path).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                address, port = fields[1].split(":")
                words = np.frombuffer(bytes.fromhex(address), ">u4").astype("<u4").tobytes()
                found.add((socket.inet_ntop(family, words), int(port, 16)))
    return found


# ---- one-sided transports over a library that tests control ----


class FakeLibrary:
    """Memory copies within this process; `stuck` makes every transfer time out."""

    landing_bytes = 0

    def __init__(self) -> None:
        self.stuck = False
        self.registered: list[tuple[int, int]] = []

    def register(self, address: int, nbytes: int) -> None:
        self.registered.append((address, nbytes))

    def deregister(self, address: int, nbytes: int) -> None:
        self.registered.remove((address, nbytes))

    def endpoint(self) -> bytes:
        return b"here"

    def connect(self, endpoint: bytes) -> "FakeLibrary":
        return self

    def move(self, operation: str, remote: list[int], local: list[int], lengths: list[int]) -> None:
        if self.stuck:
            raise TransferTimeout("stuck")
        for theirs, ours, length in zip(remote, local, lengths, strict=True):
            to, source = (ours, theirs) if operation == "read" else (theirs, ours)
            ctypes.memmove(to, source, length)

    def close(self) -> None:
        pass


def test_memory_that_nobody_registered_is_lent_to_the_library_for_one_transfer() -> None:
    library = FakeLibrary()
    transport = OneSidedTransport("fake", library)
    memory = np.arange(100, dtype=np.uint8)
    peer = transport.connect(transport.register(memory).descriptor)
    before, into = list(library.registered), np.zeros(50, dtype=np.uint8)
    peer.read([Range(10, 0, 50)], into)
    assert into.tolist() == list(range(10, 60))
    assert library.registered == before
    transport.close()
    assert library.registered == []


def test_a_word_that_was_never_answered_costs_its_place_and_in_the_end_a_typed_error() -> None:
    library = FakeLibrary()
    transport = OneSidedTransport("fake", library)
    peer = transport.connect(transport.register(np.zeros(8, dtype=np.uint8)).descriptor)
    library.stuck = True
    for _ in range(MAX_REGIONS):
        with pytest.raises(TransferTimeout):
            transport.read_word(library, 0)
    with pytest.raises(PeerLost, match="never ended"):
        transport.read_word(library, 0)
    peer.close()
    transport.close()


def test_closed_peers_are_forgotten_and_words_are_used_again() -> None:
    transport = OneSidedTransport("fake", FakeLibrary())
    memory = np.zeros(8, dtype=np.uint8)
    for _ in range(2 * MAX_REGIONS):
        region = transport.register(memory)
        transport.connect(region.descriptor).close()
        transport.deregister(region)
    regions = [transport.register(memory) for _ in range(MAX_REGIONS)]
    with pytest.raises(ConfigError, match="no room"):
        transport.register(memory)
    assert len({region.region_id for region in regions}) == MAX_REGIONS
    transport.close()
