"""Bit rot on a real disk tier: exactly every Nth block is struck, and the tier notices each one."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.disk import DiskOptions, DiskTier
from kvstore.types import BlockId
from pdserve_cli.disk_faults import Rot, live_records

BLOCK_BYTES = 5000
COUNT = 60


def _id(number: int) -> BlockId:
    return BlockId(number.to_bytes(16, "little"), b"f" * 16)


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[DiskTier]:
    options = DiskOptions(capacity_bytes=8 << 20, block_bytes=BLOCK_BYTES, segment_bytes=256 << 10)
    tier = DiskTier(tmp_path / "tier", options)
    blocks = [random.Random(number).randbytes(BLOCK_BYTES) for number in range(COUNT)]
    tier.submit_put([_id(n) for n in range(COUNT)], [memoryview(block) for block in blocks]).result()
    yield tier
    tier.close()


def _whole(tier: DiskTier) -> int:
    into = [memoryview(bytearray(BLOCK_BYTES)) for _ in range(COUNT)]
    reads = tier.submit_get([_id(n) for n in range(COUNT)], into).result()
    for number, found in enumerate(reads.found):
        assert not found or bytes(into[number]) == random.Random(number).randbytes(BLOCK_BYTES)
    return sum(map(bool, reads.found))


def test_every_tenth_block_is_struck_and_each_is_noticed(tier: DiskTier, tmp_path: Path) -> None:
    assert sum(len(list(live_records(path))) for path in (tmp_path / "tier").glob("*.kvseg")) == COUNT
    struck = Rot(10, random.Random(1)).strike(tmp_path)
    assert struck == COUNT // 10
    assert _whole(tier) == COUNT - struck


def test_no_block_is_struck_twice(tier: DiskTier, tmp_path: Path) -> None:
    rot = Rot(1, random.Random(1))
    assert [rot.strike(tmp_path), rot.strike(tmp_path)] == [COUNT, 0]
    assert _whole(tier) == 0


def test_blocks_that_left_are_left_alone(tier: DiskTier, tmp_path: Path) -> None:
    for number in range(0, COUNT, 2):
        tier.remove(_id(number))
    assert Rot(1, random.Random(1)).strike(tmp_path) == COUNT // 2
