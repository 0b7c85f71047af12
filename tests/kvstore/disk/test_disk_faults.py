"""Disks that are full, read-only or gone, and files that are not what was written."""

from __future__ import annotations

import mmap
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from disk_blocks import BLOCK, Recorder, block_id, content, files, options, put, served

from kvstore.disk import DiskState, DiskTier
from kvstore.disk.footer import _TAIL
from kvstore.disk.record import HEADER_BYTES, PAGE, digest, record_bytes
from pdserve.errors import ConfigError, DiskBlockCorrupt, DiskError, DiskFull, DiskReadOnly

RECORD = record_bytes(BLOCK)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def mount(*args: str) -> None:
    done = subprocess.run(["mount", *args], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB of its own."""
    path = tmp_path / "disk"
    path.mkdir()
    mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path))
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def flip(path: Path, offset: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        [byte] = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ (1 << bit)]))


# -- disks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
def test_a_full_disk_refuses_puts_serves_on_and_recovers(small_disk: Path, direct: bool) -> None:
    clock, recorder = Clock(), Recorder()
    folder = small_disk / "tier"
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(600_000))
    tier = DiskTier(folder, options(direct=direct, retry_s=5.0), observer=recorder, clock=clock)
    with pytest.raises(DiskFull, match="free space") as caught:
        put(tier, range(100))
    assert caught.value.retry_after_s == 5.0
    assert tier.health.state is DiskState.READ_ONLY
    assert "full" in tier.health.reason
    kept = [n for n in range(100) if served(tier, n)]
    assert len(kept) == len(tier)
    tier.check_integrity()
    ballast.unlink()
    assert not tier.ready
    with pytest.raises(DiskFull):  # not tried again so soon
        put(tier, range(100, 110))
    clock.now = 5.0
    assert tier.ready
    assert put(tier, range(100, 110)) == 10
    assert tier.health.state is DiskState.ON
    assert [health.state for health in recorder.states] == [DiskState.READ_ONLY, DiskState.ON]
    assert all(served(tier, n) for n in (*kept, *range(100, 110)))
    tier.close()
    again = DiskTier(folder, options(direct=direct))
    assert all(served(again, n) for n in (*kept, *range(100, 110)))
    assert len(again) == len(kept) + 10
    again.close()


def test_a_disk_that_fills_up_gives_what_a_failed_put_took_back(small_disk: Path) -> None:
    tier = DiskTier(small_disk / "tier", options(block=300_000))
    put(tier, [1], 300_000)
    free = shutil.disk_usage(small_disk).free
    big = [content(n, 300_000) for n in range(10, 15)]
    for _ in range(3):
        with pytest.raises(DiskFull):
            tier.put_many([block_id(n) for n in range(10, 15)], big)
    stored = len(tier) - 1
    assert shutil.disk_usage(small_disk).free >= free - stored * record_bytes(300_000) - PAGE
    tier.close()


def test_a_disk_smaller_than_the_capacity_keeps_taking_new_blocks(small_disk: Path) -> None:
    clock, recorder = Clock(), Recorder()
    tier = DiskTier(small_disk / "tier", options(segment=1 << 18), observer=recorder, clock=clock)
    for start in range(0, 300, 5):
        try:
            put(tier, range(start, start + 5))
        except DiskFull:
            clock.now += 5.0
            put(tier, range(start, start + 5))
        assert all(served(tier, n) for n in range(start, start + 5))
    assert len(tier) > 30
    assert {reason for _, reason in recorder.removed_ids} == {"evicted"}
    assert recorder.resident == set(tier.ids())
    tier.check_integrity()
    tier.close()


@pytest.fixture
def file_limit() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20 * RECORD + 1000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_quota_that_cuts_a_write_off_leaves_no_torn_block(tmp_path: Path, file_limit: None) -> None:
    tier = DiskTier(tmp_path, options())
    with pytest.raises(DiskFull):
        put(tier, range(30))
    kept = [n for n in range(30) if served(tier, n)]
    assert len(kept) == len(tier)
    assert tier.verify() == ()
    tier.close()


def test_a_read_only_disk_is_read_and_takes_writes_once_it_can(small_disk: Path) -> None:
    clock = Clock()
    folder = small_disk / "tier"
    tier = DiskTier(folder, options())
    put(tier, range(10))
    tier.close()
    mount("-o", "remount,ro", str(small_disk))
    tier = DiskTier(folder, options(), clock=clock)
    assert all(served(tier, n) for n in range(10))
    with pytest.raises(DiskReadOnly, match="takes no writes"):
        put(tier, [11])
    assert tier.health.state is DiskState.READ_ONLY
    assert tier.remove(block_id(0))
    assert not served(tier, 0)
    assert served(tier, 1)
    mount("-o", "remount,rw", str(small_disk))
    clock.now = 5.0
    assert put(tier, [11]) == 1
    assert tier.health.state is DiskState.ON
    assert served(tier, 11)
    assert served(tier, 1)
    tier.close()


def test_a_read_only_disk_without_a_folder_leaves_the_tier_off_until_it_can(small_disk: Path) -> None:
    clock = Clock()
    mount("-o", "remount,ro", str(small_disk))
    tier = DiskTier(small_disk / "tier", options(), clock=clock)
    assert not served(tier, 1)
    with pytest.raises(DiskReadOnly):
        put(tier, [1])
    mount("-o", "remount,rw", str(small_disk))
    clock.now = 5.0
    assert put(tier, [1]) == 1
    assert served(tier, 1)
    tier.close()


def test_a_folder_that_vanishes_switches_the_tier_off_until_it_can_be_made(tmp_path: Path) -> None:
    clock, recorder = Clock(), Recorder()
    folder = tmp_path / "tier"
    tier = DiskTier(folder, options(), observer=recorder, clock=clock)
    put(tier, range(10))
    shutil.rmtree(folder)
    folder.write_text("in the way")
    with pytest.raises(DiskError, match="off"):
        put(tier, [10])
    assert tier.health.state is DiskState.OFF
    assert len(tier) == 0
    assert {reason for _, reason in recorder.removed_ids} == {"off"}
    clock.now = 5.0
    with pytest.raises(DiskError, match="off"):
        put(tier, [10])
    folder.unlink()
    clock.now = 10.0
    assert put(tier, [10]) == 1
    assert tier.health.state is DiskState.ON
    assert served(tier, 10)
    assert not served(tier, 1)
    tier.check_integrity()
    tier.close()


def test_a_folder_that_comes_back_brings_its_blocks(tmp_path: Path) -> None:
    """As a disk that was mounted late, or again."""
    clock = Clock()
    folder = tmp_path / "tier"
    tier = DiskTier(folder, options(), clock=clock)
    put(tier, range(10))
    folder.rename(tmp_path / "aside")
    with pytest.raises(DiskError, match="off"):
        put(tier, [10])
    (tmp_path / "aside").rename(folder)
    clock.now = 5.0
    assert put(tier, [1]) == 0
    assert tier.health.state is DiskState.ON
    assert all(served(tier, n) for n in range(10))
    tier.close()


def test_a_folder_that_another_tier_took_meanwhile_stays_its(tmp_path: Path) -> None:
    clock = Clock()
    folder = tmp_path / "tier"
    tier = DiskTier(folder, options(), clock=clock)
    put(tier, [1])
    folder.rename(tmp_path / "aside")
    other = DiskTier(folder, options())
    with pytest.raises(DiskError, match="off"):
        put(tier, [2])
    clock.now = 5.0
    with pytest.raises(DiskError, match="in use by another process"):
        put(tier, [2])
    assert put(other, [2]) == 1
    other.close()
    tier.close()


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is no folder"):
        DiskTier(tmp_path / "file", options())


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    for name in ("notes.txt", "zz.kvseg", "000000000000000g.kvseg"):
        (tmp_path / name).write_text("mine")
    tier = DiskTier(tmp_path, options())
    put(tier, [1])
    tier.close()
    assert [(tmp_path / n).read_text() for n in ("notes.txt", "zz.kvseg", "000000000000000g.kvseg")] == ["mine"] * 3


def test_a_segment_that_is_no_file_is_stepped_over(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, options())
    put(tier, [1])
    tier.close()
    os.symlink("/dev/null", tmp_path / f"{99:016x}.kvseg")
    recorder = Recorder()
    again = DiskTier(tmp_path, options(), observer=recorder)
    assert served(again, 1)
    assert recorder.corrupt_reasons == ["unreadable"]
    assert put(again, [2]) == 1
    again.close()


# -- records --------------------------------------------------------------------------------------------------------


def test_a_record_torn_by_a_crash_is_not_even_listed(tmp_path: Path) -> None:
    """Its header came through, the end of its payload did not; the records after it did."""
    tier = DiskTier(tmp_path / "alive", options())
    put(tier, range(6))
    shutil.copytree(tmp_path / "alive", tmp_path / "dead")
    tier.close()
    [path] = files(tmp_path / "dead")
    data = bytearray(path.read_bytes())
    data[2 * RECORD + PAGE + 5000 : 3 * RECORD] = bytes(RECORD - PAGE - 5000)
    path.write_bytes(data[: 6 * RECORD - PAGE])
    recorder = Recorder()
    again = DiskTier(tmp_path / "dead", options(), observer=recorder)
    assert {n for n in range(6) if block_id(n) in again} == {0, 1, 3, 4}
    assert recorder.corrupt_reasons == ["payload_digest", "truncated"]
    assert all(served(again, n) for n in (0, 1, 3, 4))
    again.close()


def test_each_flipped_byte_of_a_header_and_of_a_payload_is_caught(tmp_path: Path) -> None:
    """While the tier is open: the read finds it, drops the record, and says so."""
    offsets = [*range(HEADER_BYTES), *range(PAGE, PAGE + BLOCK, 97), PAGE + BLOCK - 1]
    recorder = Recorder()
    tier = DiskTier(tmp_path, options(capacity=1 << 26), observer=recorder)
    path = tmp_path / f"{1:016x}.kvseg"
    for at, offset in enumerate(offsets):
        put(tier, [at])
        flip(path, at * RECORD + offset, bit=at % 8)
        with pytest.raises(DiskBlockCorrupt, match="recompute"):
            tier.get(block_id(at), np.zeros(BLOCK, dtype=np.uint8))
        assert block_id(at) not in tier
    assert len(recorder.corrupt_reasons) == len(offsets)
    assert {reason for _, reason in recorder.removed_ids} == {"corrupt"}
    tier.check_integrity()
    tier.close()


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
@pytest.mark.parametrize("nbytes", [3 << 20, (3 << 20) + 5000])
def test_large_blocks_are_checked_to_their_last_byte(tmp_path: Path, direct: bool, nbytes: int) -> None:
    tier = DiskTier(tmp_path, options(capacity=1 << 28, block=nbytes, direct=direct))
    into = np.frombuffer(mmap.mmap(-1, nbytes), dtype=np.uint8)
    put(tier, range(4), nbytes)
    assert tier.get(block_id(0), into)
    assert np.array_equal(into, content(0, nbytes))
    [path] = files(tmp_path)
    for n, offset in enumerate((HEADER_BYTES - 1, PAGE, PAGE + (2 << 20), PAGE + nbytes - 1)):
        flip(path, n * record_bytes(nbytes) + offset)
        with pytest.raises(DiskBlockCorrupt, match="digest"):
            tier.get(block_id(n), into)
    for n, end in enumerate((PAGE // 2, PAGE + (1 << 20), record_bytes(nbytes) - PAGE), start=10):
        put(tier, [n], nbytes)
        os.truncate(path, path.stat().st_size - record_bytes(nbytes) + end)
        with pytest.raises(DiskBlockCorrupt, match="truncated"):
            tier.get(block_id(n), into)
    tier.close()


def test_one_corrupt_block_of_a_request_does_not_cost_the_others(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, options())
    put(tier, range(5))
    flip(files(tmp_path)[0], 2 * RECORD + PAGE + 5)
    reads = tier.get_many([block_id(n) for n in range(5)], [np.zeros(BLOCK, dtype=np.uint8) for _ in range(5)])
    assert reads.found == (True, True, False, True, True)
    assert [type(error) for error in reads.errors] == [DiskBlockCorrupt]
    assert put(tier, range(5)) == 1  # it can be stored again
    assert all(served(tier, n) for n in range(5))
    tier.close()


def test_flips_in_padding_do_no_harm(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, options())
    put(tier, [0])
    flip(files(tmp_path)[0], HEADER_BYTES)
    flip(files(tmp_path)[0], PAGE + BLOCK)
    assert served(tier, 0)
    tier.close()


def test_every_hundredth_block_corrupted_on_disk_is_caught(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, options(segment=1 << 20))
    put(tier, range(300))
    for path in files(tmp_path):
        for record in tier._catalog.segments[int(path.stem, 16)].records:
            if record.sequence % 100 == 0:
                flip(path, record.offset + PAGE + record.sequence)
    tier.close()
    recorder = Recorder()
    again = DiskTier(tmp_path, options(segment=1 << 20), observer=recorder)
    assert sum(served(again, n) for n in range(300)) == 297
    assert recorder.corrupt_reasons == ["payload_digest"] * 3
    again.close()


def make_unreadable(tier: DiskTier, path: Path) -> None:
    """Reads of this file fail from now on, as of a bad sector; writes go on."""
    fd = os.open(path, os.O_WRONLY)
    os.dup2(fd, tier._catalog.segments[int(path.stem, 16)]._data)
    os.close(fd)


def test_blocks_that_the_disk_cannot_read_are_lost_and_the_others_are_not(tmp_path: Path) -> None:
    recorder = Recorder()
    tier = DiskTier(tmp_path, options(segment=1 << 20), observer=recorder)
    put(tier, range(100))
    make_unreadable(tier, files(tmp_path)[0])
    ids = [block_id(n) for n in range(100)]
    reads = tier.get_many(ids, [np.zeros(BLOCK, dtype=np.uint8) for _ in range(100)])
    lost = reads.found.index(True)
    assert 50 < lost < 70
    assert reads.found == (False,) * lost + (True,) * (100 - lost)
    assert recorder.corrupt_reasons == ["unreadable"] * lost
    assert tier.health.state is DiskState.ON
    tier.check_integrity()
    tier.close()


def test_compaction_gets_past_what_the_disk_cannot_read(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, options(capacity=1 << 21))
    put(tier, range(60))
    for n in range(60):
        if n % 3:
            tier.remove(block_id(n))
    make_unreadable(tier, files(tmp_path)[0])
    assert put(tier, range(100, 160)) == 60
    assert not served(tier, 0)
    assert all(served(tier, n) for n in (57, *range(100, 160)))
    tier.check_integrity()
    tier.close()


def test_verify_finds_and_drops_what_is_corrupt(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, options())
    put(tier, range(10))
    flip(files(tmp_path)[0], 4 * RECORD + PAGE)
    [error] = tier.verify()
    assert isinstance(error, DiskBlockCorrupt)
    assert block_id(4) not in tier
    assert tier.verify() == ()
    tier.close()


def test_a_file_cut_while_open_loses_only_its_tail(tmp_path: Path) -> None:
    recorder = Recorder()
    tier = DiskTier(tmp_path, options(), observer=recorder)
    put(tier, range(10))
    os.truncate(files(tmp_path)[0], 6 * RECORD + 5000)
    reads = tier.get_many([block_id(n) for n in range(10)], [np.zeros(BLOCK, dtype=np.uint8) for _ in range(10)])
    assert reads.found == (True,) * 6 + (False,) * 4
    assert len(reads.errors) == 4
    assert recorder.corrupt_reasons == ["truncated"] * 4
    tier.close()


def test_a_segment_of_another_version_is_not_read(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, options())
    put(tier, [1])
    tier.close()
    [path] = files(tmp_path)
    whole = bytearray(path.read_bytes())
    tail = bytearray(whole[-PAGE:])
    tail[8] = 2
    tail[_TAIL.size : _TAIL.size + 16] = digest(bytes(tail[: _TAIL.size]))
    whole[-PAGE:] = tail
    path.write_bytes(whole)
    recorder = Recorder()
    again = DiskTier(tmp_path, options(), observer=recorder)
    assert not served(again, 1)
    assert recorder.corrupt_reasons == ["version"]
    assert put(again, [1]) == 1
    assert served(again, 1)
    again.close()


def test_a_record_that_was_copied_elsewhere_is_not_taken(tmp_path: Path) -> None:
    """A file system that returns another page of the same file."""
    tier = DiskTier(tmp_path, options())
    put(tier, range(4))
    path = files(tmp_path)[0]
    whole = bytearray(path.read_bytes())
    whole[2 * RECORD : 3 * RECORD] = whole[RECORD : 2 * RECORD]
    path.write_bytes(whole)
    assert served(tier, 1)
    with pytest.raises(DiskBlockCorrupt, match="other_record"):
        tier.get(block_id(2), np.zeros(BLOCK, dtype=np.uint8))
    tier.close()


def test_a_copied_segment_file_brings_nothing(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, options())
    put(tier, range(4))
    tier.close()
    shutil.copy(files(tmp_path)[0], tmp_path / f"{7:016x}.kvseg")
    again = DiskTier(tmp_path, options())
    assert len(again) == 4
    assert all(served(again, n) for n in range(4))
    again.close()
