"""Whatever happens to the files, and in whatever order calls come, a block is served as stored or not at all."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import pytest
from disk_blocks import BLOCK, FP, Recorder, block_id, content, files, options, put, served
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.disk import DiskTier
from kvstore.types import BlockId
from pdserve.errors import DiskBlockCorrupt

SMALL = 3000
BLOCKS = 24


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three segments, one of them without a footer, and a few blocks removed."""
    folder = tmp_path_factory.mktemp("written")
    tier = DiskTier(folder / "open", options(block=SMALL, segment=100_000))
    put(tier, range(BLOCKS), SMALL)
    for n in (3, 20):
        tier.remove(block_id(n))
    shutil.copytree(folder / "open", folder / "dead")
    tier.close()
    assert len(files(folder / "dead")) == 3
    return folder / "dead"


def alter(data: bytearray, how: str, rng: random.Random) -> None:
    """Damage a file as disks, file systems and people do."""
    at = rng.randrange(len(data))
    size = rng.randrange(1, 20_000)
    page = rng.randrange(len(data) // 4096) * 4096
    if how == "flip":
        data[at] ^= 1 << rng.randrange(8)
    elif how == "zero":
        data[at : at + size] = bytes(len(data[at : at + size]))
    elif how == "noise":
        data[at : at + size] = rng.randbytes(len(data[at : at + size]))
    elif how == "truncate":
        del data[at:]
    elif how == "grow":
        data += rng.randbytes(size)
    elif how == "swap":
        data[page : page + 4096] = data[at // 4096 * 4096 :][:4096].ljust(4096, b"\0")
    elif how == "shift":
        data[at:at] = rng.randbytes(rng.choice((1, 4096)))


HOW = st.sampled_from(["flip", "flip", "zero", "noise", "truncate", "grow", "swap", "shift"])


@settings(max_examples=120, deadline=None, derandomize=True)
@given(damage=st.lists(st.tuples(st.integers(0, 2), HOW), min_size=1, max_size=6), seed=st.integers(0, 2**32))
def test_damaged_files_serve_right_bytes_or_none(written: Path, damage: list[tuple[int, str]], seed: int) -> None:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "tier"
        shutil.copytree(written, folder)
        for which, how in damage:
            path = files(folder)[which]
            data = bytearray(path.read_bytes())
            if len(data) >= 4096:
                alter(data, how, rng)
            path.write_bytes(data)
        tier = DiskTier(folder, options(block=SMALL, segment=100_000))
        tier.check_integrity()
        assert set(tier.ids()) <= {block_id(n) for n in range(BLOCKS)}
        assert put(tier, range(BLOCKS, BLOCKS + 8), SMALL) == 8
        for n in range(BLOCKS):
            served(tier, n, SMALL)
        assert all(served(tier, n, SMALL) for n in range(BLOCKS, BLOCKS + 8))
        tier.check_integrity()
        tier.close()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32))
def test_a_flip_anywhere_costs_one_block_at_most(written: Path, seed: int) -> None:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "tier"
        shutil.copytree(written, folder)
        path = rng.choice(files(folder))
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        tier = DiskTier(folder, options(block=SMALL, segment=100_000))
        lost = {n for n in range(BLOCKS) if not served(tier, n, SMALL)} - {3, 20}
        assert len(lost) <= 1
        tier.close()


class DiskMachine(RuleBasedStateMachine):
    """Against a dictionary of what must be there: every call, eviction told by events, clean restarts and crashes."""

    numbers = st.integers(0, 40)

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.lives = 0
        self.model: dict[BlockId, tuple[int, int]] = {}
        self.versions: dict[int, int] = {}

    @initialize(direct=st.booleans())
    def begin(self, direct: bool) -> None:
        self.direct = direct
        self.open()

    def open(self) -> None:
        self.recorder = Recorder()
        self.tier = DiskTier(
            self.root / str(self.lives),
            options(capacity=1 << 19, block=BLOCK, segment=1 << 17, direct=self.direct),
            observer=self.recorder,
        )
        assert set(self.tier.ids()) == set(self.model)
        self.recorder.removed_ids.clear()

    def hear(self) -> None:
        for block, reason in self.recorder.removed_ids:
            assert reason in ("evicted", "removed")
            self.model.pop(block, None)
        self.recorder.removed_ids.clear()

    @rule(ns=st.lists(numbers, min_size=1, max_size=12, unique=True))
    def put(self, ns: list[int]) -> None:
        fresh = {n: self.versions.get(n, 0) + 1 for n in ns if block_id(n) not in self.model}
        data = [content(n, BLOCK, fresh.get(n, 0)) for n in ns]
        assert self.tier.put_many([block_id(n) for n in ns], data) == len(fresh)
        self.versions |= fresh
        self.model |= {block_id(n): (n, version) for n, version in fresh.items()}
        self.hear()

    @rule(ns=st.lists(numbers, min_size=1, max_size=12))
    def get(self, ns: list[int]) -> None:
        into = [np.zeros(BLOCK, dtype=np.uint8) for _ in ns]
        reads = self.tier.get_many([block_id(n) for n in ns], into)
        assert reads.errors == ()
        for n, found, data in zip(ns, reads.found, into, strict=True):
            assert found == (block_id(n) in self.model)
            if found:
                assert np.array_equal(data, content(n, BLOCK, self.model[block_id(n)][1]))

    @rule(n=numbers)
    def get_of_another_layout(self, n: int) -> None:
        assert not self.tier.get(block_id(n, FP[:-1] + b"!"), np.zeros(BLOCK, dtype=np.uint8))

    @rule(n=numbers)
    def remove(self, n: int) -> None:
        assert self.tier.remove(block_id(n)) == (block_id(n) in self.model)
        self.hear()

    @rule()
    def restart(self) -> None:
        self.tier.close()
        self.open()

    @rule()
    def die_and_restart(self) -> None:
        """The folder as the kernel has it at this moment is what a killed process leaves."""
        shutil.copytree(self.root / str(self.lives), self.root / str(self.lives + 1))
        self.tier.close()
        self.lives += 1
        self.open()

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def corrupt(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.model, key=lambda b: b.key)))
        record = self.tier._catalog.find(block)
        assert record is not None
        path = self.root / str(self.lives) / f"{record.segment:016x}.kvseg"
        at = record.offset + 4096 + data.draw(st.integers(0, BLOCK - 1))
        with path.open("r+b") as file:
            file.seek(at)
            [byte] = file.read(1)
            file.seek(at)
            file.write(bytes([byte ^ 4]))
        with pytest.raises(DiskBlockCorrupt):
            self.tier.get(block, np.zeros(BLOCK, dtype=np.uint8))
        del self.model[block]
        self.recorder.removed_ids.clear()

    @invariant()
    def the_books_are_right(self) -> None:
        if not hasattr(self, "tier"):
            return
        assert set(self.tier.ids()) == set(self.model)
        self.tier.check_integrity()
        sizes = [path.stat().st_size for path in files(self.root / str(self.lives))]
        assert sum(sizes) <= 1 << 19
        assert max(sizes, default=0) <= 1 << 17

    def teardown(self) -> None:
        if hasattr(self, "tier"):
            self.tier.close()
        shutil.rmtree(self.root)


DiskMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=30, deadline=None, derandomize=True)
test_against_a_dictionary = DiskMachine.TestCase


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
def test_readers_writers_removers_and_compaction_at_once(tmp_path: Path, direct: bool) -> None:
    """Small enough that blocks leave and segments are compacted all the time."""
    before = len(os.listdir("/proc/self/fd"))
    tier = DiskTier(tmp_path, options(capacity=1 << 20, direct=direct))
    written = threading.Event()

    def write(rng: random.Random) -> None:
        for _ in range(60):
            put(tier, rng.sample(range(80), 6))

    def read(rng: random.Random) -> None:
        while not written.is_set():
            read_some(tier, rng.sample(range(80), 8))

    def remove(rng: random.Random) -> None:
        while not written.is_set():
            tier.remove(block_id(rng.randrange(80)))
            tier.check_integrity()

    with ThreadPoolExecutor(5) as threads:
        others = [threads.submit(work, random.Random(seed)) for seed, work in enumerate((read, read, remove))]
        writers = [threads.submit(write, random.Random(seed)) for seed in range(10, 12)]
        wait(writers)
        written.set()
        for future in writers + others:
            future.result()
    tier.check_integrity()
    left = set(tier.ids())
    tier.close()
    assert len(os.listdir("/proc/self/fd")) == before
    again = DiskTier(tmp_path, options(capacity=1 << 20, direct=direct))
    assert set(again.ids()) == left
    assert sum(served(again, n) for n in range(80)) == len(left)
    again.close()


def read_some(tier: DiskTier, ns: Sequence[int]) -> None:
    """Reads those blocks in one call: each right, or a miss."""
    into = [np.zeros(BLOCK, dtype=np.uint8) for _ in ns]
    reads = tier.get_many([block_id(n) for n in ns], into)
    assert reads.errors == ()
    for n, found, data in zip(ns, reads.found, into, strict=True):
        assert not found or np.array_equal(data, content(n))


def test_closing_under_readers_serves_right_bytes_or_none(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for attempt in range(10):
        tier = DiskTier(tmp_path / str(attempt), options())
        put(tier, range(30))
        begun = threading.Barrier(3)

        def read(tier: DiskTier = tier, begun: threading.Barrier = begun) -> None:
            begun.wait()
            for _ in range(10):
                read_some(tier, range(30))

        with ThreadPoolExecutor(2) as threads:
            readers = [threads.submit(read) for _ in range(2)]
            begun.wait()
            tier.close()
            for future in readers:
                future.result()
    assert len(os.listdir("/proc/self/fd")) == before
