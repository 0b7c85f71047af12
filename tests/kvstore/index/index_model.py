"""Helpers: a clock that tests turn, a node that really holds blocks and tells about them, keys by number."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.index.base import NodeSnapshot, Section
from kvstore.index.index import KVIndex
from kvstore.types import EventKind, StoreEvent, Tier

FP = b"layout a........"
OTHER_FP = b"layout b........"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def keys(numbers: Sequence[int]) -> tuple[bytes, ...]:
    return tuple(map(key, numbers))


def chain(numbers: Sequence[int]) -> bytes:
    return b"".join(keys(numbers))


class Node:
    """The truth about one node, and the events that tell it."""

    def __init__(self, name: str, incarnation: int = 1) -> None:
        self.name, self.incarnation = name, incarnation
        self.sequence = 0
        self.blocks: set[tuple[Tier, bytes, bytes]] = set()

    def restart(self) -> None:
        self.incarnation += 1
        self.sequence = 0
        self.blocks.clear()

    def store(self, numbers: Sequence[int], tier: Tier = Tier.HBM, fingerprint: bytes = FP) -> StoreEvent:
        self.blocks |= {(tier, fingerprint, key(n)) for n in numbers}
        return self._event(EventKind.STORED, tier, keys(numbers), fingerprint)

    def drop(self, numbers: Sequence[int], tier: Tier = Tier.HBM, fingerprint: bytes = FP) -> StoreEvent:
        self.blocks -= {(tier, fingerprint, key(n)) for n in numbers}
        return self._event(EventKind.REMOVED, tier, keys(numbers), fingerprint)

    def clear(self, tier: Tier = Tier.HBM) -> StoreEvent:
        self.blocks = {block for block in self.blocks if block[0] is not tier}
        return self._event(EventKind.CLEARED, tier, (), b"")

    def snapshot(self) -> NodeSnapshot:
        groups: dict[tuple[Tier, bytes], list[bytes]] = {}
        for tier, fingerprint, block in sorted(self.blocks):
            groups.setdefault((tier, fingerprint), []).append(block)
        sections = tuple(Section(tier, fp, b"".join(blocks)) for (tier, fp), blocks in groups.items())
        return NodeSnapshot(self.name, self.incarnation, self.sequence, sections)

    def _event(self, kind: EventKind, tier: Tier, found: tuple[bytes, ...], fingerprint: bytes) -> StoreEvent:
        self.sequence += 1
        return StoreEvent(self.sequence, kind, tier, found, fingerprint)


def joined(index: KVIndex, *nodes: Node) -> None:
    """The index learns what each node holds."""
    for node in nodes:
        index.load(node.snapshot())


def shown(index: KVIndex, numbers: Sequence[int], fingerprint: bytes = FP) -> set[tuple[str, Tier, bytes, int]]:
    """Everything the index says about these blocks."""
    return {
        (place.node, place.tier, key(n), place.incarnation)
        for n in numbers
        for place in index.locate(key(n), fingerprint)
    }


def truth(*nodes: Node, fingerprint: bytes = FP) -> set[tuple[str, Tier, bytes, int]]:
    return {
        (node.name, tier, block, node.incarnation)
        for node in nodes
        for tier, fp, block in node.blocks
        if fp == fingerprint
    }
