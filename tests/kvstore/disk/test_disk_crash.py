"""A writer that dies at any moment leaves a folder of which every served block is right."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from disk_blocks import block_id, options, put, served

from kvstore.disk import DiskTier
from pdserve.errors import ConfigError

ROUNDS = 7
ROOMY, TIGHT = 1 << 28, 1 << 21
BATCH = 16


class Writers:
    """The process that forks writers."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("disk_writer_process.py")
        self._writer: int | None = None
        root = str(Path(__file__).parents[3])
        self._process = subprocess.Popen(
            [sys.executable, script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": root},
        )

    def start(self, folder: Path, seed: int, capacity: int, mode: str) -> None:
        """Returns once the writer's tier is open."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{folder} {seed} {capacity} {mode}\n".encode())
        self._process.stdin.flush()
        word, pid = self.read()
        assert word == "pid"
        self._writer = int(pid)

    def read(self) -> list[str]:
        assert self._process.stdout is not None
        return self._process.stdout.readline().decode().split()

    def kill(self) -> list[list[str]]:
        """Ends the writer; returns what it said that was not read yet."""
        assert self._writer is not None
        os.kill(self._writer, signal.SIGKILL)
        self._writer = None
        lines = []
        while (line := self.read()) != ["dead"]:
            assert line, "the writers' process died"
            lines.append(line)
        return lines

    def close(self) -> None:
        if self._writer is not None:
            self.kill()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="module")
def writers() -> Iterator[Writers]:
    writers = Writers()
    yield writers
    writers.close()


def run_and_kill(writers: Writers, folder: Path, seed: int, capacity: int, mode: str) -> tuple[set[int], set[int]]:
    """A writer's life up to a random moment: the blocks it stored, and those it removed, as far as it said so."""
    rng = random.Random(seed)
    writers.start(folder, seed, capacity, mode)
    said = [writers.read() for _ in range(rng.randint(1, 30))]
    moment = time.perf_counter() + rng.random() * 0.004
    while time.perf_counter() < moment:
        pass
    said += writers.kill()
    stored = {int(n) for words in said if words[0] == "put" for n in words[1:]}
    removed = {int(words[1]) for words in said if words[0] == "removed"}
    return stored, removed


@pytest.mark.parametrize("mode", ["buffered", "direct"])
@pytest.mark.parametrize("capacity", [ROOMY, TIGHT], ids=["roomy", "tight"])
def test_after_a_kill_everything_served_is_right(
    writers: Writers, tmp_path: Path, mode: str, capacity: int, request: pytest.FixtureRequest
) -> None:
    """The same folder through many lives. Where nothing has to leave, what was said to be stored is there."""
    base = random.Random(request.node.name).randrange(1000)
    said: set[int] = set()
    gone: set[int] = set()
    unsaid: set[int] = set()
    for seed in range(base, base + ROUNDS):
        print(f"seed {seed}")
        stored, removed = run_and_kill(writers, tmp_path, seed, capacity, mode)
        said |= stored
        gone |= removed
        last = max(stored) // BATCH * BATCH
        heads = {last} - removed  # it may have been removed, or be on its way
        unsaid |= heads | set(range(last + BATCH, last + 2 * BATCH))
        tier = DiskTier(tmp_path, options(capacity=capacity, direct=mode == "direct"))
        tier.check_integrity()
        kept = {n for n in said | unsaid if block_id(n) in tier}
        assert len(kept) == len(tier)
        assert all(served(tier, n) for n in kept), "a torn record was listed"
        assert not kept & gone
        if capacity == ROOMY:
            assert kept >= said - gone - unsaid
        tier.close()


@pytest.mark.parametrize("num_writes", [0, 1, 2])
def test_a_removal_cut_off_after_any_of_its_writes_lists_no_block_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_writes: int
) -> None:
    tier = DiskTier(tmp_path, options())
    put(tier, range(4))
    tier.close()
    tier = DiskTier(tmp_path, options())
    left = iter(range(num_writes))
    write = os.pwrite

    def dies(fd: int, data: bytes, offset: int) -> int:
        if next(left, None) is None:
            raise OSError(errno.EIO, "the process died here")
        return write(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", dies)
    assert tier.remove(block_id(1))
    monkeypatch.undo()
    tier.close()
    again = DiskTier(tmp_path, options())
    listed = {n for n in range(4) if block_id(n) in again}
    assert listed == ({0, 2, 3} if num_writes else {0, 1, 2, 3})
    assert all(served(again, n) for n in listed)
    again.close()


def test_two_processes_do_not_share_a_folder(writers: Writers, tmp_path: Path) -> None:
    writers.start(tmp_path, 1, 1 << 24, "buffered")
    with pytest.raises(ConfigError, match="in use by another process"):
        DiskTier(tmp_path, options())
    writers.kill()
    free_again(tmp_path).close()


def free_again(folder: Path) -> DiskTier:
    """The kernel drops a dead process's lock by itself: whoever else still looks at its files may delay that."""
    while True:
        try:
            return DiskTier(folder, options())
        except ConfigError:
            time.sleep(0.01)  # bounded by the test's own time


def test_two_tiers_of_one_process_do_not_share_a_folder(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, options())
    with pytest.raises(ConfigError, match="in use by another process"):
        DiskTier(tmp_path, options())
    tier.close()
    DiskTier(tmp_path, options()).close()
