"""Call counts are what coalescing is for: they are asserted, not timed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.ranges import batches, check_ranges, coalesce
from kvstore.transports.base import Range


def test_contiguous_blocks_become_one_range() -> None:
    assert coalesce(range(100, 164), range(64), 2 << 20) == [Range(100 * (2 << 20), 0, 64 * (2 << 20))]


def test_a_gap_on_either_side_splits() -> None:
    assert len(coalesce([0, 1, 3, 4], [0, 1, 2, 3], 10)) == 2
    assert len(coalesce([0, 1, 2, 3], [0, 1, 3, 4], 10)) == 2


def test_blocks_that_share_a_permutation_merge() -> None:
    assert coalesce([3, 1, 2], [13, 11, 12], 10) == [Range(10, 110, 30)]


def test_descending_blocks_do_not_merge() -> None:
    assert len(coalesce([0, 1, 2], [2, 1, 0], 10)) == 3


def test_bases_shift_both_sides() -> None:
    assert coalesce([2], [3], 8, remote_base=1000, local_base=50) == [Range(1016, 74, 8)]


def test_no_blocks_no_ranges() -> None:
    assert coalesce([], [], 10) == []


def test_lists_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="2 remote blocks for 1"):
        coalesce([1, 2], [1], 10)


@given(st.lists(st.integers(0, 40), unique=True), st.randoms(use_true_random=False))
def test_ranges_cover_exactly_the_pairs(remote: list[int], random: object) -> None:
    local = list(range(len(remote)))
    random.shuffle(local)  # type: ignore[attr-defined]
    pairs = {(r.remote + i, r.local + i) for r in coalesce(remote, local, 3) for i in range(r.length)}
    assert pairs == {(a * 3 + i, b * 3 + i) for a, b in zip(remote, local, strict=True) for i in range(3)}


@given(st.lists(st.integers(0, 50), max_size=8), st.integers(1, 20))
def test_batches_keep_every_byte_in_order(lengths: list[int], limit: int) -> None:
    ranges = [Range(1000 * i, 2000 * i, n) for i, n in enumerate(lengths)]
    split = list(batches(ranges, limit))
    assert all(sum(r.length for r in batch) <= limit for batch in split)

    def covered(some: list[Range]) -> list[tuple[int, int]]:
        return [(r.remote + i, r.local + i) for r in some for i in range(r.length)]

    assert covered([r for batch in split for r in batch]) == covered(ranges)


@pytest.mark.parametrize("bad", [Range(90, 0, 11), Range(0, 95, 6), Range(-1, 0, 1), Range(0, -1, 1), Range(0, 0, -1)])
def test_ranges_outside_are_refused(bad: Range) -> None:
    check_ranges([Range(90, 0, 10), Range(0, 100, 0)], 100, 100)
    with pytest.raises(ValueError, match="Range"):
        check_ranges([bad], 100, 100)
