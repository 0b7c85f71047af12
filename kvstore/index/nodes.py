"""What the index knows of one node besides its blocks: incarnation, place in the event stream, lease, and whether
its entries may be believed now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from kvstore.types import StoreEvent, Tier

MAX_HELD_KEYS = 1 << 16
"""Keys of events that are kept while a snapshot is on its way (about 8 MB). Past that they are dropped: the snapshot
that then comes is found to be too old, and another is asked for."""


class State(Enum):
    LIVE = "live"
    WAITING = "waiting"
    """For a snapshot; nothing of it is shown."""
    EXPIRED = "expired"
    """Its lease ran out; only the name and incarnation are remembered, so that late news of it is known as such."""
    DISTRUSTED = "distrusted"


@dataclass(slots=True)
class Node:
    name: str
    incarnation: int
    deadline: float
    state: State = State.WAITING
    sequence: int = 0
    """Last event applied."""
    seen: int = 0
    """Highest event number heard of; a snapshot that leads only to an earlier one is too old."""
    epoch: int = 0
    """Counts how often its columns were given up: what was read before is void after."""
    columns: dict[bytes, int] = field(default_factory=dict)
    """By fingerprint."""
    tiers: set[Tier] = field(default_factory=set)
    """Where it has had blocks since its columns are these."""
    held: dict[int, StoreEvent] = field(default_factory=dict)
    """Events by number, kept for the snapshot."""
    held_keys: int = 0

    def hold(self, events: Sequence[StoreEvent]) -> None:
        for event in events:
            self.seen = max(self.seen, event.sequence)
            if event.sequence not in self.held:
                self.held[event.sequence] = event
                self.held_keys += len(event.keys) + 1
        if self.held_keys > MAX_HELD_KEYS:
            self.release()

    def release(self) -> list[StoreEvent]:
        """What was held, in order; nothing is held any more."""
        events = [self.held[number] for number in sorted(self.held)]
        self.held, self.held_keys = {}, 0
        return events

    def begin(self, incarnation: int) -> None:
        """A new life: whatever was known of an older one is void."""
        self.incarnation, self.state = incarnation, State.WAITING
        self.sequence = self.seen = 0
        self.release()
