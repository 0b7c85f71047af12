"""The event stream that indexes follow: what they missed or a snapshot, then changes as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator

from kvstore.node.events import EventLog
from kvstore.types import StoreEvent
from pdserve.wire.store import EventBatch, EventColumns, Follow

SIGN_OF_LIFE_S = 2.0
"""An index takes a node for dead when it hears nothing for its lease; this is well below any sensible one."""
KEYS_A_BATCH = 16384
"""0.5 MiB with parents: under every message limit."""


class EventFeed:
    """`content` tells all that is here now, both tiers, as events."""

    def __init__(self, node: str, incarnation: int, log: EventLog, content: Callable[[int], list[StoreEvent]]) -> None:
        self._node, self._incarnation = node, incarnation
        self._log = log
        self._content = content
        self._closing = asyncio.Event()

    def close(self) -> None:
        """Every follower's stream ends."""
        self._closing.set()
        self._log.wake()

    async def follow(self, request: Follow) -> AsyncIterator[EventBatch]:
        wake = asyncio.Event()
        stop = self._log.listen(wake.set)
        position = request.after if request.incarnation == self._incarnation else -1
        try:
            while not self._closing.is_set():
                wake.clear()
                missed = self._log.since(position) if position >= 0 else None
                position = self._log.sequence
                batches = self._snapshot() if missed is None else self._changes(missed)
                for batch in batches:
                    yield batch
                if self._log.sequence == position:
                    await _wait(wake)
        finally:
            stop()

    def _snapshot(self) -> Iterator[EventBatch]:
        sequence = self._log.sequence
        yield self._batch((), sequence, snapshot=True)
        for part in _parts(self._content(sequence)):
            yield self._batch(part, sequence, snapshot=True)
        yield self._batch((), sequence, snapshot=True, complete=True)

    def _changes(self, events: list[StoreEvent]) -> Iterator[EventBatch]:
        """At least one batch: an empty one is the sign of life."""
        if not events:
            yield self._batch((), self._log.sequence)
        for part in _parts(events):
            yield self._batch(part, part[-1].sequence)

    def _batch(
        self, events: Iterable[StoreEvent], sequence: int, *, snapshot: bool = False, complete: bool = False
    ) -> EventBatch:
        columns = tuple(
            EventColumns(e.sequence, int(e.kind), int(e.tier), e.keys, e.fingerprint, e.parents) for e in events
        )
        return EventBatch(self._node, self._incarnation, snapshot, complete, columns, sequence)


def _parts(events: Iterable[StoreEvent]) -> Iterator[list[StoreEvent]]:
    """Groups of bounded size. Only a snapshot has an event that is too large alone: it is cut."""
    part: list[StoreEvent] = []
    size = 0
    for event in events:
        for piece in _cut(event):
            if part and size + len(piece.keys) > KEYS_A_BATCH:
                yield part
                part, size = [], 0
            part.append(piece)
            size += len(piece.keys)
    if part:
        yield part


def _cut(event: StoreEvent) -> Iterator[StoreEvent]:
    for i in range(0, max(1, len(event.keys)), KEYS_A_BATCH):
        end = i + KEYS_A_BATCH
        yield StoreEvent(
            event.sequence, event.kind, event.tier, event.keys[i:end], event.fingerprint, event.parents[i:end]
        )


async def _wait(wake: asyncio.Event) -> None:
    try:
        await asyncio.wait_for(wake.wait(), SIGN_OF_LIFE_S)
    except TimeoutError:
        pass  # nothing happened: say that we live
