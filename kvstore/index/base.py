"""What the index and its sources say to each other: snapshots, verdicts on events, and what a look-up finds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from kvstore.types import KEY_BYTES, Tier
from pdserve.errors import InvalidRequest


class Verdict(Enum):
    """What became of a batch of events."""

    APPLIED = "applied"
    """The index now stands after the last event of the batch."""
    DUPLICATE = "duplicate"
    """All of them were known already."""
    RESYNC = "resync"
    """Events are missing, or the node is new or was restarted: its entries are suspended until `load` brings a
    snapshot. The batch is kept for that moment, within bounds. Ask the node for one."""
    STALE = "stale"
    """From an older incarnation than is known: ignored."""
    DISTRUSTED = "distrusted"
    """The audit aged this incarnation out: ignored until the node restarts."""


@dataclass(frozen=True, slots=True)
class Section:
    """The blocks of one tier and layout; `keys` holds 16 bytes a block, one after the other."""

    tier: Tier
    fingerprint: bytes
    keys: bytes

    def __post_init__(self) -> None:
        if len(self.keys) % KEY_BYTES:
            raise InvalidRequest(f"a section's keys must be {KEY_BYTES} bytes each", param="keys")


@dataclass(frozen=True, slots=True)
class NodeSnapshot:
    """All that a node holds, as of event number `sequence` of `incarnation` (0: before the first).

    It may already show the effect of later events (a copy made while the node goes on), as long as those events are
    still to come: applying them again gives the same end.
    """

    node: str
    incarnation: int
    sequence: int
    sections: tuple[Section, ...] = ()


@dataclass(frozen=True, slots=True)
class Reach:
    """How many leading blocks of a chain one node (or a group of nodes) can give, by farthest tier used."""

    hbm: int = 0
    """Blocks found in HBM without a break."""
    dram: int = 0
    """The same, over HBM and DRAM together."""
    disk: int = 0
    """The same, over all tiers."""


@dataclass(frozen=True, slots=True)
class NodeReach(Reach):
    """What one incarnation of a node can give."""

    incarnation: int = 0


@dataclass(slots=True)
class IndexCounts:
    """Plain counters since start; `kvstore.index.metrics` shows them to Prometheus."""

    events: int = 0
    duplicates: int = 0
    stale: int = 0
    gaps: int = 0
    restarts: int = 0
    snapshots: int = 0
    evicted: int = 0
    """Entries that left because the index was full."""
    expired_nodes: int = 0
    distrusted_nodes: int = 0


def split_keys(packed: bytes) -> Iterator[bytes]:
    """The single keys of a packed run."""
    return (packed[start : start + KEY_BYTES] for start in range(0, len(packed), KEY_BYTES))
