"""The prefix caches of connected workers in the index: each is a node named by its worker, with one tier, HBM.

A worker that tells its changes is followed exactly; its first message on a stream is all it has. One that has told
nothing yet is guessed at (`router.guesses`). When a stream ends, what was known of its worker goes with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from kvstore.index.base import NodeSnapshot, Section, split_keys
from kvstore.index.index import KVIndex
from kvstore.types import EventKind, StoreEvent, Tier
from pdserve.types import CacheDelta, WorkerInfo
from router.guesses import Guess

LEASE_S = 30.0
"""Between two ticks that find the stream alive; a stream's end removes the node at once."""
STEPS_AT_ONCE = 2
"""Slices of a snapshot (8,192 blocks, some 4 ms each) between two looks at anything else."""
_OVER = object()


Later = Callable[[Callable[[], None]], object]
"""Calls something soon, on the loop: `loop.call_soon`."""


class WorkerCache:
    """One worker's, for the life of one stream. `first_sequence`: beyond any event number of its earlier streams, as
    the index compares them within an incarnation."""

    def __init__(self, index: KVIndex, info: WorkerInfo, first_sequence: int, later: Later) -> None:
        self._index = index
        self.info = info
        self.sequence = first_sequence
        self._later = later
        self.guess: Guess | None = Guess(info.num_blocks)
        """None once the worker has told."""
        self._load(b"")

    def take(self, delta: CacheDelta) -> None:
        """What the worker says itself."""
        if delta.reset:
            self.guess = None
            self._load(b"".join(delta.stored))
        elif self.guess is None:
            self._apply((EventKind.REMOVED, delta.removed), (EventKind.STORED, delta.stored))

    def computed(self, keys: bytes, now: float) -> None:
        """A prompt with these block keys is through there."""
        if self.guess is not None:
            new, gone = self.guess.add(split_keys(keys), now)
            self._apply((EventKind.REMOVED, gone), (EventKind.STORED, new))

    def judge(self, true: bool) -> None:
        """A guess held, or it did not."""
        if self.guess is not None and (gone := self.guess.judge(true)):
            self._apply((EventKind.REMOVED, gone))

    def tick(self, now: float) -> None:
        self._index.renew(self.info.worker_id, self.info.incarnation, lease_s=LEASE_S)
        if self.guess is not None and (gone := self.guess.age(now)):
            self._apply((EventKind.REMOVED, gone))

    def _load(self, keys: bytes) -> None:
        self.sequence += 1
        sections = (Section(Tier.HBM, self.info.fingerprint, keys),) if keys else ()
        snapshot = NodeSnapshot(self.info.worker_id, self.info.incarnation, self.sequence, sections)
        self._go_on(self._index.load_in_steps(snapshot, lease_s=LEASE_S))

    def _go_on(self, steps: Iterator[None]) -> None:
        """The next few thousand blocks; a small cache is loaded at once. Events that come meanwhile are kept by the
        index."""
        for _ in range(STEPS_AT_ONCE):
            if next(steps, _OVER) is _OVER:
                return
        self._later(partial(self._go_on, steps))

    def _apply(self, *changes: tuple[EventKind, Sequence[bytes]]) -> None:
        events = []
        for kind, keys in changes:
            if keys:
                self.sequence += 1
                events.append(StoreEvent(self.sequence, kind, Tier.HBM, tuple(keys), self.info.fingerprint))
        if events:
            self._index.apply(self.info.worker_id, self.info.incarnation, events)


class WorkerCaches:
    """All connected ones', by worker id."""

    def __init__(self, index: KVIndex, clock: Callable[[], float], later: Later) -> None:
        self._index = index
        self._clock = clock
        self._later = later
        self._caches: dict[str, WorkerCache] = {}
        self._last_sequence = 0

    def add(self, info: WorkerInfo) -> WorkerCache:
        cache = self._caches[info.worker_id] = WorkerCache(self._index, info, self._last_sequence, self._later)
        return cache

    def remove(self, info: WorkerInfo) -> None:
        """Its stream has ended; a successor's may have begun already."""
        cache = self._caches.get(info.worker_id)
        if cache is not None and cache.info.incarnation == info.incarnation:
            del self._caches[info.worker_id]
            self._last_sequence = max(self._last_sequence, cache.sequence)
            self._index.remove(info.worker_id)

    def __contains__(self, worker_id: str) -> bool:
        return worker_id in self._caches

    def computed(self, worker_id: str, keys: bytes) -> None:
        cache = self._caches.get(worker_id)
        if cache is not None and cache.guess is not None:
            cache.computed(keys, self._clock())

    def judge(self, worker_id: str, true: bool) -> None:
        cache = self._caches.get(worker_id)
        if cache is not None:
            cache.judge(true)

    def guessed(self, worker_id: str) -> bool:
        """The worker tells nothing."""
        cache = self._caches.get(worker_id)
        return cache is not None and cache.guess is not None

    def tick(self) -> None:
        now = self._clock()
        for cache in self._caches.values():
            cache.tick(now)

    def num_guessed(self) -> int:
        return sum(cache.guess is not None for cache in self._caches.values())
