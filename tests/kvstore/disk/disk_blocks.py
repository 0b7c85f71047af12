"""Blocks whose right content anyone can tell: it follows from the id and a version."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvstore.disk import DiskHealth, DiskOptions, DiskTier
from kvstore.types import BlockId

BLOCK = 10_000
"""Not whole pages, so that padding is exercised."""
FP = b"fingerprint-of-a-layout-32-bytes"


def block_id(n: int, fingerprint: bytes = FP) -> BlockId:
    return BlockId(hashlib.blake2b(n.to_bytes(8, "little"), digest_size=16).digest(), fingerprint)


def content(n: int, nbytes: int = BLOCK, version: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng([n, version]).integers(0, 256, nbytes, dtype=np.uint8)


def options(
    capacity: int = 1 << 24,
    block: int = BLOCK,
    segment: int = 0,
    *,
    direct: bool = False,
    fsync: bool = False,
    retry_s: float = 5.0,
) -> DiskOptions:
    return DiskOptions(capacity, block, segment, direct=direct, fsync_on_seal=fsync, threads=2, retry_s=retry_s)


def put(tier: DiskTier, numbers: Sequence[int], nbytes: int = BLOCK) -> int:
    return tier.put_many([block_id(n) for n in numbers], [content(n, nbytes) for n in numbers])


def served(tier: DiskTier, n: int, nbytes: int = BLOCK) -> bool:
    """Reads block `n`; fails the test when the tier serves anything but its content."""
    into = np.full(nbytes, 0xAA, dtype=np.uint8)
    reads = tier.get_many([block_id(n)], [into])
    if reads.found[0]:
        assert np.array_equal(into, content(n, nbytes)), f"block {n} was served with other bytes"
    return reads.found[0]


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.kvseg"))


@dataclass
class Recorder:
    """An observer that remembers."""

    stored_ids: list[BlockId] = field(default_factory=list)
    removed_ids: list[tuple[BlockId, str]] = field(default_factory=list)
    corrupt_reasons: list[str] = field(default_factory=list)
    bytes: dict[str, int] = field(default_factory=dict)
    states: list[DiskHealth] = field(default_factory=list)

    def stored(self, ids: Sequence[BlockId]) -> None:
        self.stored_ids += ids

    def removed(self, block: BlockId, reason: str) -> None:
        self.removed_ids.append((block, reason))

    def corrupt(self, block: BlockId | None, reason: str) -> None:
        self.corrupt_reasons.append(reason)

    def moved(self, direction: str, nbytes: int, seconds: float) -> None:
        self.bytes[direction] = self.bytes.get(direction, 0) + nbytes

    def health(self, health: DiskHealth) -> None:
        self.states.append(health)

    @property
    def resident(self) -> set[BlockId]:
        """What an index that only heard the events would believe, if nothing was ever stored twice meanwhile."""
        here = set(self.stored_ids)
        return here - {block for block, _ in self.removed_ids}
