"""A store over plain memory with a clock that tests move, and blocks whose bytes follow from their names."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import xxhash
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry

from kvstore.eviction import POLICIES
from kvstore.node.dram import DramStore
from kvstore.node.entries import Limits, Name, Offer
from kvstore.types import EventKind, StoreEvent
from pdserve.metrics import KvstoreMetrics

BLOCK_BYTES = 64
FINGERPRINT = b"F" * 16


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class PlainMemory:
    num_blocks: int
    blocks: NDArray[np.uint8] = field(init=False)
    generations: NDArray[np.uint64] = field(init=False)

    def __post_init__(self) -> None:
        self.blocks = np.zeros((self.num_blocks, BLOCK_BYTES), np.uint8)
        self.generations = np.zeros(self.num_blocks, np.uint64)


def name(key: str, fingerprint: bytes = FINGERPRINT) -> Name:
    return key.encode().ljust(16, b".") + fingerprint


def chain(prefix: str, length: int) -> list[Name]:
    return [name(f"{prefix}{i}") for i in range(length)]


def contents(block: Name) -> NDArray[np.uint8]:
    return np.frombuffer(hashlib.shake_128(block).digest(BLOCK_BYTES), np.uint8)


def digest_of(block: Name) -> bytes:
    return xxhash.xxh3_128_digest(contents(block))


def make_store(num_blocks: int, policy: str = "lru", limits: Limits | None = None, **options: object) -> DramStore:
    """Watermarks at 1.0 unless given: tests of other things want the whole pool."""
    options = {"clock": Clock(), "metrics": KvstoreMetrics(CollectorRegistry()), "digest_every": 1, **options}
    limits = limits or Limits(high_watermark=1.0, low_watermark=1.0)
    return DramStore(PlainMemory(num_blocks), POLICIES[policy](), limits=limits, **options)  # type: ignore[arg-type]


def reserved(names: Sequence[Name], offer: Offer) -> list[Name]:
    return [block for block, status in zip(names, offer.statuses, strict=True) if status == 1]


def fill(store: DramStore, names: Sequence[Name], offer: Offer) -> list[bytes]:
    """Write what the offer reserved; returns the digests."""
    written = reserved(names, offer)
    for block, slot in zip(written, offer.slots, strict=True):
        store.pool.blocks[slot] = contents(block)
    return [digest_of(block) for block in written]


def put(store: DramStore, names: Sequence[Name], tenant: str = "t", client: str = "writer") -> Offer:
    """A whole put: reserve, write, commit."""
    offer = store.reserve(names, tenant, client)
    if offer.reservation_id:
        store.commit(offer.reservation_id, client, fill(store, names, offer))
    return offer


def replay(events: Sequence[StoreEvent]) -> set[Name]:
    """What a follower of these events believes to be here."""
    here: set[Name] = set()
    for event in events:
        names = {key + event.fingerprint for key in event.keys}
        if event.kind is EventKind.STORED:
            assert not names & here
            here |= names
        else:
            assert names <= here
            here -= names
    return here
