"""The store's vocabulary: what a block is called, where it can be, and what happened to it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

KEY_BYTES = 16
"""A block key: `pdserve.block_keys`, chained, so that equal keys mean equal prefixes."""


class Tier(IntEnum):
    """Where a block's bytes are; smaller is nearer."""

    HBM = 0
    """An engine's own pool, on a device or (CPU engines) in shared memory."""
    DRAM = 1
    """The node store's pool in shared memory."""
    DISK = 2
    """The node store's segment files."""


@dataclass(frozen=True, slots=True)
class BlockId:
    """What a block is: its prefix, and the layout that its bytes have. Only equal fingerprints share bytes."""

    key: bytes
    fingerprint: bytes


@dataclass(frozen=True, slots=True)
class Place:
    """Where a block can be read. A place of an older incarnation is void: the node was restarted."""

    node: str
    """Worker id for HBM, node store id for DRAM and DISK."""
    tier: Tier
    incarnation: int


class EventKind(IntEnum):
    STORED = 1
    REMOVED = 2
    CLEARED = 3
    """Everything of this node and tier is gone."""


@dataclass(frozen=True, slots=True)
class StoreEvent:
    """A change of one node's content; sequence numbers of a (node, incarnation) run without gaps from 1."""

    sequence: int
    kind: EventKind
    tier: Tier
    keys: tuple[bytes, ...]
    fingerprint: bytes
    parents: tuple[bytes, ...] = ()
    """Key of the block before each, where known; an index may need it to keep chains together."""
