"""The index shared and kept over restarts: what the local index learns is copied to Redis, and a router that starts,
or misses events, takes a node from there instead of asking it.

Serving never waits for Redis: look-ups and events touch the local index only; a task writes behind, once a tick, in
one pipeline. With Redis down, slow or flushed the mirror is *degraded*: the local index goes on alone, what cannot be
kept is dropped, and when Redis answers again each node that it lacks is published in full.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from redis.exceptions import RedisError

from kvstore.index.base import NodeSnapshot, Verdict
from kvstore.index.index import KVIndex
from kvstore.index.redis_copy import RedisCopy, RedisOptions, StoredNode
from kvstore.index.redis_scripts import OLDER, UNKNOWN
from kvstore.types import StoreEvent
from pdserve.errors import InvalidRequest

log = logging.getLogger(__name__)

TICK_S = 0.05
"""Events of so long share a pipeline."""
MAX_BACKOFF_S = 5.0
"""Between tries while Redis fails; doubled from TICK_S."""
MAX_UNWRITTEN_KEYS = 400_000
"""Keys of unwritten events, over all nodes (some 40 MB); a node past its share is published in full instead."""
KEYS_PER_BATCH = 4096
"""Keys per script call: a few ms of Redis's single thread."""
MAX_ROUNDS = 64
"""Script calls for each node in one tick: leases are renewed even when events never pause."""
READ_AGAIN_S = 1.0
"""How often a node that waits for a snapshot is looked for in Redis."""
FAILURES = (RedisError, OSError, TimeoutError)


@dataclass(slots=True)
class MirrorCounts:
    failures: int = 0
    """Ticks that failed."""
    events_written: int = 0
    publications: int = 0
    overflows: int = 0
    """Nodes whose unwritten events were dropped."""
    nodes_read: int = 0
    malformed: int = 0
    """Nodes whose copy in Redis is not in our form."""


@dataclass(slots=True)
class _Outbox:
    """What Redis does not have yet of one node."""

    incarnation: int
    events: list[StoreEvent] = field(default_factory=list)
    num_keys: int = 0
    publish: bool = False
    """Redis lacks more than `events` can mend."""
    renewed_at: float = float("-inf")
    """When Redis last heard of the lease."""
    renew: bool = True

    def add(self, events: Sequence[StoreEvent], max_keys: int) -> bool:
        """False: too many, they were dropped."""
        if self.publish:  # a publication to come has them in it
            return True
        self.events += events
        self.num_keys += sum(len(event.keys) + 1 for event in events)
        if self.num_keys <= max_keys:
            return True
        self.events, self.num_keys, self.publish = [], 0, True
        return False

    def written(self, sequence: int) -> None:
        self.events = [event for event in self.events if event.sequence > sequence]
        self.num_keys = sum(len(event.keys) + 1 for event in self.events)

    def batch(self) -> list[StoreEvent]:
        """The oldest events, so many as one call may carry (one at least)."""
        taken: list[StoreEvent] = []
        num_keys = 0
        for event in self.events:
            num_keys += len(event.keys)
            if taken and num_keys > KEYS_PER_BATCH:
                break
            taken.append(event)
        return taken


class RedisIndex:
    """The local index and its copy. Same calls as `KVIndex` for what changes it; look-ups go to `local`."""

    def __init__(
        self,
        local: KVIndex,
        options: RedisOptions,
        *,
        tick_s: float = TICK_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.local = local
        self.counts = MirrorCounts()
        self.degraded = True
        """Until Redis has answered, and whenever it does not."""
        self._copy = RedisCopy(options)
        self._outboxes: dict[str, _Outbox] = {}
        self._goodbyes: dict[str, int] = {}
        self._read_at: dict[str, float] = {}
        self._ttl_ms = int(local.lease_s * 1000)
        self._tick_s, self._clock = tick_s, clock
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self._backoff_s = tick_s

    # What changes the index

    def apply(self, node: str, incarnation: int, events: Sequence[StoreEvent]) -> Verdict:
        """As `KVIndex.apply`."""
        verdict = self.local.apply(node, incarnation, events)
        if verdict is Verdict.APPLIED:
            self._write(node, incarnation, events)
        return verdict

    def renew(self, node: str, incarnation: int, *, sequence: int = 0) -> Verdict:
        """As `KVIndex.renew`."""
        verdict = self.local.renew(node, incarnation, sequence=sequence)
        if verdict is Verdict.APPLIED:
            self._outbox(node, incarnation).renew = True
        return verdict

    def load(self, snapshot: NodeSnapshot) -> Verdict:
        """As `KVIndex.load`."""
        verdict = self.local.load(snapshot)
        if verdict is Verdict.APPLIED:
            self._outbox(snapshot.node, snapshot.incarnation).publish = True
        return verdict

    def remove(self, node: str) -> None:
        """As `KVIndex.remove`."""
        if (position := self.local.position(node)) is not None:
            self._goodbyes[node] = position[0]
        self._outboxes.pop(node, None)
        self.local.remove(node)

    def expire(self) -> list[str]:
        """As `KVIndex.expire`; Redis forgets by itself, after the same lease."""
        gone = self.local.expire()
        known = {*self.local.live_nodes(), *(node for node, _ in self.local.awaiting())}
        self._outboxes = {node: box for node, box in self._outboxes.items() if node in known}
        return gone

    # Life

    async def start(self) -> None:
        """Takes over what Redis has, then writes behind. Returns in any case, within a few of the options' timeouts
        if Redis does not answer."""
        try:
            await self._read_all()
            self._recovered()
        except FAILURES as error:
            self._failed(error)
        self._stopping = False
        self._task = asyncio.create_task(self._run(), name="redis-index")

    async def stop(self) -> None:
        """Ends the task; what is unwritten stays so (another router, or the next start, publishes in full)."""
        # The flag too: the client may swallow a cancellation that meets the end of one of its own timeouts.
        self._stopping = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        await self._copy.close()

    async def flush(self) -> None:
        """One tick, now. Raises what Redis raises."""
        await self._say_goodbye()
        await self._write_events()
        await self._renew_leases()
        await self._publish()
        await self._read_awaited()

    async def _run(self) -> None:
        while not self._stopping:
            await asyncio.sleep(self._backoff_s)
            try:
                await self.flush()
                self._recovered()
            except FAILURES as error:
                self._failed(error)

    def _failed(self, error: BaseException) -> None:
        self.counts.failures += 1
        self._backoff_s = min(MAX_BACKOFF_S, self._backoff_s * 2)
        if not self.degraded or self.counts.failures == 1:
            log.warning("Redis does not answer; the index goes on locally", extra={"error": str(error)})
        self.degraded = True

    def _recovered(self) -> None:
        if self.degraded:
            log.info("Redis answers; the index is shared")
        self.degraded, self._backoff_s = False, self._tick_s

    # To Redis

    def _outbox(self, node: str, incarnation: int) -> _Outbox:
        outbox = self._outboxes.get(node)
        if outbox is None or outbox.incarnation != incarnation:
            outbox = self._outboxes[node] = _Outbox(incarnation)
        return outbox

    def _write(self, node: str, incarnation: int, events: Sequence[StoreEvent]) -> None:
        outbox = self._outbox(node, incarnation)
        if not outbox.add(events, MAX_UNWRITTEN_KEYS // len(self._outboxes)):
            self.counts.overflows += 1

    async def _say_goodbye(self) -> None:
        for node, incarnation in list(self._goodbyes.items()):
            await self._copy.forget(node, incarnation)
            if self._goodbyes.get(node) == incarnation:
                del self._goodbyes[node]

    async def _write_events(self) -> None:
        for _ in range(MAX_ROUNDS):
            waiting = {node: box for node, box in self._outboxes.items() if box.events and not box.publish}
            if not waiting:
                return
            batches = [(node, box.incarnation, self._ttl_ms, box.batch()) for node, box in waiting.items()]
            answers = await self._copy.apply(batches)
            for (node, _, _, events), answer in zip(batches, answers, strict=True):
                self._take_answer(waiting[node], answer)
                self.counts.events_written += len(events) if answer >= 0 else 0

    def _take_answer(self, box: _Outbox, answer: int) -> None:
        if answer == UNKNOWN:
            box.publish = True
        elif answer == OLDER:
            box.events, box.num_keys, box.publish = [], 0, False
        else:
            box.written(answer)
            box.renewed_at, box.renew = self._clock(), False

    async def _renew_leases(self) -> None:
        """Three times in a lease, of the nodes that gave a sign of life since."""
        due = self._clock() - self.local.lease_s / 3
        boxes = {n: b for n, b in self._outboxes.items() if b.renew and not b.publish and b.renewed_at <= due}
        if boxes:
            answers = await self._copy.renew([(node, box.incarnation, self._ttl_ms) for node, box in boxes.items()])
            for box, answer in zip(boxes.values(), answers, strict=True):
                self._take_answer(box, answer)

    async def _publish(self) -> None:
        for node, box in list(self._outboxes.items()):
            if not box.publish:
                continue
            box.publish = False
            try:
                answer = await self._copy.publish(self.local, node, self._ttl_ms)
            except FAILURES:
                box.publish = True
                raise
            if answer is None:
                box.publish = self.local.position(node) is not None
            else:
                self._take_answer(box, answer)
                self.counts.publications += answer >= 0

    # From Redis

    async def _read_all(self) -> None:
        async for node in self._copy.nodes():
            await self._read(node)

    async def _read_awaited(self) -> None:
        now = self._clock()
        awaited = [node for node, _ in self.local.awaiting()]
        self._read_at = {node: at for node, at in self._read_at.items() if node in awaited}
        for node in awaited:
            if self._read_at.get(node, float("-inf")) <= now - READ_AGAIN_S:
                self._read_at[node] = now
                await self._read(node)

    async def _read(self, node: str) -> None:
        try:
            stored = await self._copy.read(node)
        except (ValueError, InvalidRequest) as error:
            self.counts.malformed += 1
            log.warning("a node's copy in Redis is malformed", extra={"node": node, "error": str(error)})
            return
        if stored is not None and await self._take(stored) is Verdict.APPLIED:
            self.counts.nodes_read += 1

    async def _take(self, stored: StoredNode) -> Verdict:
        """Loads a copy; held events that it leads up to are written on."""
        snapshot = stored.snapshot
        position = self.local.position(snapshot.node)
        if position is not None and position[0] >= snapshot.incarnation:
            return Verdict.DUPLICATE
        verdict = await _load_gently(self.local, stored)
        if verdict is Verdict.APPLIED:
            box = self._outbox(snapshot.node, snapshot.incarnation)
            now = self.local.position(snapshot.node)
            box.publish |= now is not None and now[1] != snapshot.sequence
        return verdict


async def _load_gently(local: KVIndex, stored: StoredNode) -> Verdict:
    """A snapshot in steps, so that requests go on between them."""
    steps = local.load_in_steps(stored.snapshot, lease_s=stored.lease_s)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            verdict: Verdict = end.value
            return verdict
        await asyncio.sleep(0)
