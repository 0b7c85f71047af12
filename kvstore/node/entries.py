"""What the node's store remembers of blocks, writers and readers, and what it answers them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from kvstore.types import KEY_BYTES, BlockId

Name = bytes
"""A block id as one value: its key, then its fingerprint. What dictionaries and the eviction policy are keyed by."""


def block_id(name: Name) -> BlockId:
    return BlockId(name[:KEY_BYTES], name[KEY_BYTES:])


@dataclass(frozen=True, slots=True)
class Limits:
    """How full the pool gets, and how long the store waits for its clients. Times in seconds."""

    high_watermark: float = 0.95
    """Share of slots in use at which eviction starts: so that a writer rarely waits for it."""
    low_watermark: float = 0.90
    """Share at which it stops: Mooncake's store evicts 5 % a round, too."""
    lease_s: float = 10.0
    """A reader that does not renew has died: Mooncake's default."""
    max_lease_s: float = 300.0
    """However often it is renewed."""
    reservation_s: float = 30.0
    """From reservation to commit: prefill of a long chunk, with room to spare."""
    abandoned_s: float = 300.0
    """Slots of a lapsed reservation whose writer can't be seen to be dead are not used for so long."""
    default_quota: int = 0
    """Slots a tenant may hold; 0: no limit."""


@dataclass(slots=True)
class Entry:
    """A visible block."""

    name: Name
    slot: int
    generation: int
    digest: bytes
    """xxh3-128 of its bytes, as its writer gave it."""
    tenant: str
    parent: bytes
    """Key of the block before it; empty for the first."""
    leases: int = 0
    pinned: bool = False
    soft_pin_until: float = 0.0
    dropped: bool = False
    """No longer visible; its slot is kept for those who still read it."""

    @property
    def key(self) -> bytes:
        return self.name[:KEY_BYTES]

    @property
    def fingerprint(self) -> bytes:
        return self.name[KEY_BYTES:]


@dataclass(slots=True)
class Lease:
    """A reader's hold on blocks."""

    lease_id: int
    client: str
    entries: tuple[Entry, ...]
    until: float
    born: float


@dataclass(slots=True)
class Reservation:
    """A writer's hold on slots: one for each name, in the chain's order. The policy counts its blocks as resident."""

    reservation_id: int
    client: str
    tenant: str
    names: tuple[Name, ...]
    slots: tuple[int, ...]
    parents: tuple[bytes, ...]
    until: float
    lapsed: bool = False


class Status(IntEnum):
    """What a reservation says of each block of the chain."""

    RESERVED = 1
    """Write it to its slot, then commit."""
    EXISTS = 2
    """Visible already."""
    BUSY = 3
    """Another writer is at it."""
    NO_ROOM = 4
    """Neither this nor any later block fits now."""


@dataclass(frozen=True, slots=True)
class Offer:
    """Answer to a reservation. `slots` and `generations` belong to the RESERVED blocks, in order."""

    reservation_id: int
    """0 when nothing was reserved."""
    statuses: tuple[Status, ...]
    slots: tuple[int, ...] = ()
    generations: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Hit:
    """The longest prefix that is here. Columns are of equal length."""

    lease_id: int
    """0 when nothing was found, or no lease was wanted."""
    slots: tuple[int, ...] = ()
    generations: tuple[int, ...] = ()
    digests: tuple[bytes, ...] = field(default=())
