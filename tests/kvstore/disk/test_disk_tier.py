"""The disk tier's everyday behaviour: store, read, evict, compact, remove, restart."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
import pytest
from disk_blocks import BLOCK, Recorder, block_id, content, files, options, put, served

from kvstore.disk import DiskOptions, DiskState, DiskTier
from kvstore.disk.footer import Tail
from kvstore.disk.record import PAGE, record_bytes
from kvstore.disk.segment import Segment
from kvstore.types import BlockId
from pdserve.errors import ConfigError, DiskError


@pytest.fixture(params=[False, True], ids=["buffered", "direct"])
def direct(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_blocks_are_read_as_they_were_put(tmp_path: Path, direct: bool) -> None:
    recorder = Recorder()
    tier = DiskTier(tmp_path, options(direct=direct), observer=recorder)
    assert put(tier, range(20)) == 20
    into = [np.zeros(BLOCK, dtype=np.uint8) for _ in range(21)]
    reads = tier.get_many([block_id(n) for n in range(21)], into)
    assert reads.found == (True,) * 20 + (False,)
    assert reads.errors == ()
    assert all(np.array_equal(into[n], content(n)) for n in range(20))
    assert recorder.bytes == {"write": 20 * BLOCK, "read": 20 * BLOCK}
    assert recorder.resident == set(tier.ids())
    tier.close()


@pytest.mark.parametrize("nbytes", [1, 4095, 4096, 4097, 65536])
def test_any_length_and_alignment_goes_through(tmp_path: Path, direct: bool, nbytes: int) -> None:
    tier = DiskTier(tmp_path, options(block=65536, direct=direct))
    for n, shift in enumerate((0, 1, 4096)):
        memory = np.frombuffer(mmap.mmap(-1, nbytes + shift), dtype=np.uint8)[shift:]
        memory[:] = content(n, nbytes)
        assert tier.put(block_id(n), memory)
        memory[:] = 0
        assert tier.get(block_id(n), memory)
        assert np.array_equal(memory, content(n, nbytes))
    tier.close()


def test_several_blocks_of_one_call_may_be_the_same(tmp_path: Path, direct: bool) -> None:
    tier = DiskTier(tmp_path, options(direct=direct))
    assert put(tier, [1, 1, 2]) == 2
    into = [np.zeros(BLOCK, dtype=np.uint8) for _ in range(3)]
    assert tier.get_many([block_id(n) for n in (1, 2, 1)], into).found == (True, True, True)
    assert np.array_equal(into[0], into[2])
    tier.close()


def test_a_resident_block_is_not_written_again(tmp_path: Path) -> None:
    recorder = Recorder()
    tier = DiskTier(tmp_path, options(), observer=recorder)
    assert put(tier, [1, 2]) == 2
    assert put(tier, [1, 2, 3]) == 1
    assert recorder.bytes["write"] == 3 * BLOCK
    tier.close()


def test_another_fingerprint_is_a_miss(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, options())
    put(tier, [1])
    into = np.zeros(BLOCK, dtype=np.uint8)
    assert not tier.get(block_id(1, b"another layout"), into)
    assert not into.any()
    tier.close()


def test_two_layouts_of_one_prefix_stand_side_by_side(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, options())
    other = block_id(1, b"another layout")
    put(tier, [1])
    tier.put(other, content(99))
    into = np.zeros(BLOCK, dtype=np.uint8)
    assert tier.get(other, into)
    assert np.array_equal(into, content(99))
    assert served(tier, 1)
    tier.close()


@pytest.mark.parametrize("clean", [True, False], ids=["closed", "scanned"])
def test_a_restart_keeps_the_blocks(tmp_path: Path, direct: bool, clean: bool) -> None:
    tier = DiskTier(tmp_path, options(direct=direct, segment=1 << 20, fsync=True))
    put(tier, range(100))
    tier.close()
    if not clean:
        for path in files(tmp_path):
            with path.open("r+b") as file:
                file.truncate(path.stat().st_size - 4096)
    recorder = Recorder()
    again = DiskTier(tmp_path, options(direct=direct, segment=1 << 20), observer=recorder)
    assert len(again) == 100
    assert recorder.resident == set(again.ids())
    assert all(served(again, n) for n in range(100))
    again.check_integrity()
    again.close()


def test_a_scan_leaves_footers_for_the_next_start(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, options())
    put(tier, range(10))
    tier.close()
    [path] = files(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-4096])
    DiskTier(tmp_path, options()).close()
    assert path.read_bytes() == whole


def test_what_was_removed_stays_removed_after_a_restart(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, options(segment=1 << 20))
    put(tier, range(100))  # several segments, all but the last one sealed
    assert all(tier.remove(block_id(n)) for n in range(0, 100, 2))
    assert not tier.remove(block_id(0))
    tier.close()
    for path in files(tmp_path)[1:2]:  # and where the footer is lost
        path.write_bytes(path.read_bytes()[:-4096])
    again = DiskTier(tmp_path, options(segment=1 << 20))
    assert sorted(n for n in range(100) if served(again, n)) == list(range(1, 100, 2))
    again.close()


def test_a_block_stored_anew_is_read_in_its_new_form(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, options())
    put(tier, [1])
    tier.remove(block_id(1))
    tier.put(block_id(1), content(1, version=1))
    tier.close()
    again = DiskTier(tmp_path, options())
    into = np.zeros(BLOCK, dtype=np.uint8)
    assert again.get(block_id(1), into)
    assert np.array_equal(into, content(1, version=1))
    again.close()


def test_of_doubled_records_the_newest_counts_and_removal_takes_both(tmp_path: Path) -> None:
    """As when a compaction dies between copying a segment and deleting it."""
    tier = DiskTier(tmp_path, options())
    put(tier, [1])
    tier.close()
    [first] = files(tmp_path)
    kept = first.read_bytes()
    tier = DiskTier(tmp_path, options())
    tier.remove(block_id(1))
    tier.put(block_id(1), content(1, version=1))
    tier.close()
    first.write_bytes(kept)
    tier = DiskTier(tmp_path, options())
    into = np.zeros(BLOCK, dtype=np.uint8)
    assert len(tier) == 1
    assert tier.get(block_id(1), into)
    assert np.array_equal(into, content(1, version=1))
    tier.remove(block_id(1))
    tier.close()
    again = DiskTier(tmp_path, options())
    assert len(again) == 0
    again.close()


def test_the_files_never_exceed_the_capacity(tmp_path: Path, direct: bool) -> None:
    recorder = Recorder()
    tier = DiskTier(tmp_path, options(capacity=1 << 21, direct=direct), observer=recorder)
    for start in range(0, 600, 7):
        put(tier, range(start, start + 7))
        assert sum(path.stat().st_size for path in files(tmp_path)) <= 1 << 21
        assert max(path.stat().st_size for path in files(tmp_path)) <= 1 << 19
    tier.check_integrity()
    assert {reason for _, reason in recorder.removed_ids} == {"evicted"}
    kept = [n for n in range(602) if served(tier, n)]
    assert len(kept) == len(tier) > 60  # of 128 that would fit without headers, padding and a spare segment
    assert kept[0] > 602 - len(kept) - 7  # least recently used requests went first, each from its tail
    tier.close()


def test_compaction_keeps_what_lives(tmp_path: Path, direct: bool) -> None:
    recorder = Recorder()
    tier = DiskTier(tmp_path, options(capacity=1 << 21, direct=direct), observer=recorder)
    put(tier, range(60))
    for n in range(60):
        if n % 3:
            tier.remove(block_id(n))
    put(tier, range(100, 160))
    assert recorder.bytes["compact"] > 0
    assert all(served(tier, n) for n in (*range(0, 60, 3), *range(100, 160)))
    tier.check_integrity()
    tier.close()
    again = DiskTier(tmp_path, options(capacity=1 << 21, direct=direct))
    assert all(served(again, n) for n in (*range(0, 60, 3), *range(100, 160)))
    again.close()


def test_compaction_does_not_pass_corrupt_bytes_on(tmp_path: Path) -> None:
    """The copy gets a digest of its own: so the old one must be checked first."""
    recorder = Recorder()
    tier = DiskTier(tmp_path, options(capacity=1 << 21), observer=recorder)
    put(tier, range(60))
    for n in range(60):
        if n % 3:
            tier.remove(block_id(n))
    with files(tmp_path)[0].open("r+b") as file:
        file.seek(3 * record_bytes(BLOCK) + PAGE + 50)
        file.write(b"altered")
    put(tier, range(100, 160))
    assert recorder.bytes["compact"] > 0
    assert not served(tier, 3)
    assert recorder.corrupt_reasons == ["payload_digest"]
    assert (block_id(3), "corrupt") in recorder.removed_ids
    assert all(served(tier, n) for n in (0, *range(6, 60, 3), *range(100, 160)))
    tier.check_integrity()
    tier.close()


def test_a_block_removed_while_its_segment_is_sealed_stays_removed(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, options())
    put(tier, range(4))

    class Sealing(Segment):
        def write_footer(self, states: bytes) -> Tail:
            tail = super().write_footer(states)
            tier.remove(block_id(2))
            return tail

    [segment] = tier._catalog.segments.values()
    segment.__class__ = Sealing
    tier.close()
    again = DiskTier(tmp_path, options())
    assert {n for n in range(4) if block_id(n) in again} == {0, 1, 3}
    again.close()


def test_files_are_closed_when_segments_go(tmp_path: Path, direct: bool) -> None:
    before = len(os.listdir("/proc/self/fd"))
    tier = DiskTier(tmp_path, options(capacity=1 << 21, direct=direct))
    put(tier, range(600))
    opened = len(os.listdir("/proc/self/fd")) - before
    assert opened <= 1 + (2 if direct else 1) * len(files(tmp_path))
    tier.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_pinned_blocks_do_not_leave(tmp_path: Path) -> None:
    pinned = {block_id(n) for n in range(10)}
    tier = DiskTier(tmp_path, options(capacity=1 << 21), may_leave=lambda block: block not in pinned)
    put(tier, range(400))
    assert all(served(tier, n) for n in range(10))
    tier.close()


def test_a_tier_full_of_pinned_blocks_says_so_and_serves_on(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, options(capacity=1 << 21), may_leave=lambda _: False)
    with pytest.raises(DiskError, match="pinned"):
        put(tier, range(400))
    assert tier.health.state is DiskState.READ_ONLY
    assert served(tier, 0)
    tier.check_integrity()
    tier.close()


def test_smaller_settings_are_kept_to_after_a_restart(tmp_path: Path) -> None:
    """Half-empty segments, each larger than the new ones: several are copied together, into several."""
    tier = DiskTier(tmp_path, options(segment=1 << 20))
    put(tier, range(300))
    for n in range(300):
        if n % 5:
            tier.remove(block_id(n))
    tier.close()
    small = DiskTier(tmp_path, options(capacity=1 << 21, segment=1 << 17))
    old = set(files(tmp_path))
    put(small, [1000])
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 1 << 21
    assert max(path.stat().st_size for path in set(files(tmp_path)) - old) <= 1 << 17
    assert served(small, 1000)
    assert all(served(small, n) for n in range(0, 300, 5))
    small.check_integrity()
    small.close()


def test_blocks_too_large_for_new_settings_leave_when_their_segment_does(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, options(block=1 << 20, segment=1 << 22))
    put(tier, [1, 2], 1 << 20)
    tier.remove(block_id(2))
    tier.close()
    small = DiskTier(tmp_path, options(capacity=1 << 19, segment=1 << 17))
    assert served(small, 1, 1 << 20)
    put(small, range(10, 15))
    assert block_id(1) not in small
    assert all(served(small, n) for n in range(10, 15))
    small.check_integrity()
    small.close()


def test_futures_bring_the_same(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, options())
    assert tier.submit_put([block_id(1)], [content(1)]).result() == 1
    into = np.zeros(BLOCK, dtype=np.uint8)
    assert tier.submit_get([block_id(1)], [into]).result().found == (True,)
    assert np.array_equal(into, content(1))
    tier.close()


def test_what_no_record_can_hold_is_refused(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, options())
    with pytest.raises(ValueError, match="this tier takes"):
        tier.put(block_id(1), content(1, BLOCK + 1))
    with pytest.raises(ValueError, match="this tier takes"):
        tier.put(block_id(1), b"")
    with pytest.raises(ValueError, match="key has 16 bytes"):
        tier.put(BlockId(b"short", b""), b"x")
    with pytest.raises(ValueError, match="fingerprint has at most"):
        tier.put(BlockId(bytes(16), bytes(65)), b"x")
    put(tier, [1])
    with pytest.raises(ValueError, match="writable and as long"):
        tier.get(block_id(1), np.zeros(BLOCK - 1, dtype=np.uint8))
    with pytest.raises(ValueError, match="writable and as long"):
        tier.get(block_id(1), bytes(BLOCK))
    assert served(tier, 1)
    tier.close()


def test_a_capacity_too_small_for_the_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="give it at least"):
        DiskOptions(capacity_bytes=1 << 20, block_bytes=1 << 20)


def test_a_closed_tier_takes_and_serves_nothing(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, options())
    put(tier, [1])
    tier.close()
    tier.close()
    assert not served(tier, 1)
    with pytest.raises(DiskError, match="closed"):
        put(tier, [2])
