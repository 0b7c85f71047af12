"""What changed in this node's store, numbered without gaps, so that an index elsewhere can follow and know it did.

A follower names the last event that it has; it gets all later ones, or, when they are no longer held, nothing: then
it takes a snapshot of the content and goes on from that snapshot's number.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from kvstore.types import EventKind, StoreEvent, Tier

HELD_EVENTS = 65536
"""Some 10 MB of small events; at 1,000 blocks a second a follower may be away for a minute."""


class EventLog:
    """The latest events of one incarnation. Not thread-safe."""

    def __init__(self, held: int = HELD_EVENTS) -> None:
        self._events: deque[StoreEvent] = deque(maxlen=held)
        self._listeners: list[Callable[[], None]] = []
        self.sequence = 0
        """Of the latest event; 0: nothing has happened yet."""

    def emit(
        self, kind: EventKind, tier: Tier, keys: Sequence[bytes], fingerprint: bytes, parents: Sequence[bytes] = ()
    ) -> StoreEvent:
        self.sequence += 1
        event = StoreEvent(self.sequence, kind, tier, tuple(keys), fingerprint, tuple(parents))
        self._events.append(event)
        self.wake()
        return event

    def wake(self) -> None:
        """Have every listener look again."""
        for notify in self._listeners:
            notify()

    def since(self, sequence: int) -> list[StoreEvent] | None:
        """Events after `sequence`, oldest first; None when the log can't know them all: take a snapshot."""
        missing = self.sequence - sequence
        if missing < 0 or missing > len(self._events):
            return None
        return [self._events[i] for i in range(len(self._events) - missing, len(self._events))]

    def listen(self, notify: Callable[[], None]) -> Callable[[], None]:
        """Call `notify` after each event; returns what ends that."""
        self._listeners.append(notify)
        return lambda: self._listeners.remove(notify)
