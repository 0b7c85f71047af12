"""DRAM over disk: victims of the pool are written down before they leave it, and come back up when they are hit.

All state is the event loop's; only bytes move in the disk tier's threads, between its files and slots that are held
for as long: an entry on its way down by `DramStore.demoting`, one on its way up by a reservation of the disk's own.
A disk that fails costs blocks, never an answer: what can't be read is recomputed by whoever asked.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from itertools import takewhile
from typing import Any, TypeVar

from kvstore.disk import DiskHealth, DiskState, DiskTier
from kvstore.node.dram import DramStore
from kvstore.node.entries import Entry, Hit, Name, Offer, Status, block_id
from kvstore.node.events import EventLog
from kvstore.types import BlockId, EventKind, StoreEvent, Tier
from pdserve.errors import DiskError, QuotaExceeded
from pdserve.metrics import KvstoreMetrics

log = logging.getLogger("pdserve.kvstore")

DISK_CLIENT = "disk"
"""Who promotions are reserved for; it is never dead before its read has ended."""
MAX_DEMOTING_SHARE = 0.5
"""Of the pool: a disk that can't keep up must not take the room that writers need. Beyond it victims are lost."""
DEMOTION_BLOCKS = 64
"""In one write: large enough for few runs, small enough that slots come free soon."""

T = TypeVar("T")


class DiskEvents:
    """Brings what the disk tier's threads report to the loop: events for the index, figures for Prometheus."""

    def __init__(self, loop: asyncio.AbstractEventLoop, events: EventLog, metrics: KvstoreMetrics) -> None:
        self._loop, self._events, self._metrics = loop, events, metrics

    def stored(self, ids: Sequence[BlockId]) -> None:
        self._on_loop(self._emit, EventKind.STORED, list(ids))

    def removed(self, block: BlockId, reason: str) -> None:
        self._metrics.evictions.labels("disk", reason).inc()
        self._on_loop(self._emit, EventKind.REMOVED, [block])

    def corrupt(self, block: BlockId | None, reason: str) -> None:
        self._metrics.integrity_failures.labels("disk").inc()
        log.warning("a block on disk is corrupt", extra={"reason": reason, "key": block.key.hex() if block else ""})

    def moved(self, direction: str, nbytes: int, seconds: float) -> None:
        self._metrics.bytes.labels("disk", direction).inc(nbytes)
        self._metrics.seconds.labels(f"disk_{direction}").observe(seconds)

    def health(self, health: DiskHealth) -> None:
        self._metrics.disk_state.set(health.state)
        log.log(logging.INFO if health.state is DiskState.ON else logging.WARNING, "disk tier: %s", health)

    def _emit(self, kind: EventKind, ids: Sequence[BlockId]) -> None:
        by_layout: dict[bytes, list[bytes]] = {}
        for block in ids:
            by_layout.setdefault(block.fingerprint, []).append(block.key)
        for fingerprint, keys in by_layout.items():
            self._events.emit(kind, Tier.DISK, keys, fingerprint)

    def _on_loop(self, call: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:
            pass  # the loop has ended: nobody follows any more


class Tiers:
    """`open_disk` gets the observer and makes the tier; without it there is DRAM alone."""

    def __init__(self, metrics: KvstoreMetrics) -> None:
        self._metrics = metrics
        self._disk: DiskTier | None = None
        self._dram: DramStore
        self._falling: list[Entry] = []
        self._rising: dict[Name, asyncio.Task[int]] = {}
        """First block of a promotion under way."""
        self._writing: asyncio.Task[None] | None = None
        """What brings victims down, while there are any."""
        self._tasks: set[asyncio.Task[Any]] = set()

    def join(self, dram: DramStore, disk: DiskTier | None) -> None:
        self._dram, self._disk = dram, disk

    @property
    def disk(self) -> DiskTier | None:
        return self._disk

    # ---- down ----

    def demote(self, entry: Entry) -> bool:
        """`DramStore`'s `Demote`."""
        disk = self._disk
        if disk is None or not disk.ready or block_id(entry.name) in disk:
            return False
        if len(self._dram.demoting) >= MAX_DEMOTING_SHARE * self._dram.slots.count:
            self._metrics.demotion_failures.inc()
            return False
        self._fall(entry, disk)
        return True

    async def flush(self) -> None:
        """Write down what is not on disk yet, so that a restart finds it. Cancelled: at the end of the batch under
        way."""
        disk = self._disk
        if disk is None or not disk.ready:
            return
        for entry in reversed(self._dram.entries.values()):
            if entry.slot not in self._dram.demoting and block_id(entry.name) not in disk:
                self._dram.begin_demotion(entry)
                self._fall(entry, disk)
        try:
            await self.drain()
        finally:
            rest = self._falling[DEMOTION_BLOCKS:]
            del self._falling[DEMOTION_BLOCKS:]
            for entry in rest:
                self._dram.demoted(entry)

    def _fall(self, entry: Entry, disk: DiskTier) -> None:
        if not self._falling:
            self._writing = self._spawn(self._write_down(disk))
        self._falling.append(entry)

    async def _write_down(self, disk: DiskTier) -> None:
        """Batches; started with the first victim, so that the rest of its round is in it."""
        await asyncio.sleep(0)
        while self._falling:
            batch = self._falling[:DEMOTION_BLOCKS][::-1]  # victims come tail first
            try:
                await self._put(disk, await self._whole(batch))
            except (DiskError, ValueError) as error:
                self._metrics.demotion_failures.inc(len(batch))
                log.warning("the disk tier took no blocks", extra={"reason": str(error), "blocks": len(batch)})
            finally:
                del self._falling[: len(batch)]
                for entry in batch:
                    if entry.dropped and block_id(entry.name) in disk and entry.name not in self._dram.entries:
                        disk.remove(block_id(entry.name))
                    self._dram.demoted(entry)

    async def _whole(self, batch: Sequence[Entry]) -> list[Entry]:
        """Those whose bytes are still what was stored: the disk's own digest would make a flipped bit look right."""
        digests = await asyncio.to_thread(lambda: [self._dram.digest(entry.slot) for entry in batch])
        wrong = [entry for entry, digest in zip(batch, digests, strict=True) if digest != entry.digest]
        self._dram.report_corrupt([entry.name for entry in wrong if not entry.dropped])
        return [entry for entry in batch if not entry.dropped]

    async def _put(self, disk: DiskTier, batch: Sequence[Entry]) -> None:
        ids = [block_id(entry.name) for entry in batch]
        await asyncio.wrap_future(disk.submit_put(ids, [self._dram.pool.blocks[entry.slot].data for entry in batch]))

    # ---- up ----

    async def lookup(
        self, names: Sequence[Name], client: str, tenant: str, *, lease: bool, extends: bool, promote: bool
    ) -> tuple[Hit, int]:
        """`DramStore.lookup` with what follows on disk brought up first; also how many of its blocks were."""
        hit = self._dram.lookup(names, client, extends=extends)
        promoted = 0
        if promote and self._disk is not None and len(hit.slots) < len(names):
            promoted = await self._bring_up(names, len(hit.slots), tenant)
        if promoted:
            self._dram.release(hit.lease_id, client)
            hit = self._dram.lookup(names, client, extends=True, count=False)
        if not lease:
            self._dram.release(hit.lease_id, client)
        return hit, promoted

    async def _bring_up(self, names: Sequence[Name], first: int, tenant: str) -> int:
        disk = self._disk
        if disk is None or (block_id(names[first]) not in disk and names[first] not in self._rising):
            return 0
        if names[first] not in self._rising:
            run = [*takewhile(lambda n: block_id(n) in disk or n in self._dram.entries, names[first:])]
            task = self._spawn(self._read_up(disk, [*names[:first], *run], tenant))
            self._rising[names[first]] = task
            task.add_done_callback(lambda _: self._rising.pop(names[first], None))
        # shielded: a caller that leaves must not free slots that a thread is filling
        return await asyncio.shield(self._rising[names[first]])

    async def _read_up(self, disk: DiskTier, names: Sequence[Name], tenant: str) -> int:
        try:
            offer = await self._room_for(names, tenant)
        except QuotaExceeded:
            return 0
        if not offer.reservation_id:
            return 0
        wanted = [n for n, status in zip(names, offer.statuses, strict=True) if status is Status.RESERVED]
        done = 0
        try:
            reads = await asyncio.wrap_future(
                disk.submit_get([block_id(n) for n in wanted], [self._dram.pool.blocks[s].data for s in offer.slots])
            )
            done = sum(1 for _ in takewhile(bool, reads.found))
        except (DiskError, ValueError) as error:  # ValueError: a block of another size, from before a change of config
            log.warning("the disk tier gave no blocks", extra={"reason": str(error), "blocks": len(wanted)})
        if not done:
            self._dram.abort(offer.reservation_id, DISK_CLIENT)
            return 0
        digests = await asyncio.to_thread(lambda: [self._dram.digest(slot) for slot in offer.slots[:done]])
        self._metrics.hit_blocks.labels("disk").inc(done)
        return self._dram.commit(offer.reservation_id, DISK_CLIENT, digests)

    async def _room_for(self, names: Sequence[Name], tenant: str) -> Offer:
        """A reservation for what is missing. Where the pool is full, its victims are on their way down: their slots
        are worth a short wait. Raises `QuotaExceeded`."""
        offer = self._dram.reserve(names, tenant, DISK_CLIENT, extends=True)
        if Status.NO_ROOM not in offer.statuses or self._writing is None or self._writing.done():
            return offer
        if offer.reservation_id:
            self._dram.abort(offer.reservation_id, DISK_CLIENT)
        await asyncio.wait([self._writing])
        return self._dram.reserve(names, tenant, DISK_CLIENT, extends=True)

    # ---- both ----

    def drop(self, names: Sequence[Name]) -> int:
        """On both tiers; returns how many of `names` were on either. Blocks for one small write a block on disk."""
        disk = self._disk
        here = self._dram.entries.keys() | ({n for n in names if block_id(n) in disk} if disk is not None else set())
        found = [name for name in dict.fromkeys(names) if name in here]
        self._dram.drop(found)
        if disk is not None:
            for name in found:
                disk.remove(block_id(name))
        return len(found)

    def names(self) -> list[Name]:
        """Everything on either tier."""
        on_disk = self._disk.ids() if self._disk is not None else []
        return [*dict.fromkeys([*self._dram.entries, *(block.key + block.fingerprint for block in on_disk)])]

    def content(self, sequence: int) -> list[StoreEvent]:
        """What both tiers hold, as events. Of the disk it may know more than its events told so far; those follow."""
        by_layout: dict[bytes, list[bytes]] = {}
        for block in self._disk.ids() if self._disk is not None else ():
            by_layout.setdefault(block.fingerprint, []).append(block.key)
        on_disk = [
            StoreEvent(sequence, EventKind.STORED, Tier.DISK, tuple(keys), fingerprint)
            for fingerprint, keys in by_layout.items()
        ]
        return [*self._dram.content(), *on_disk]

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def drain(self) -> None:
        """Every move under way ends."""
        while self._tasks:
            await asyncio.wait(list(self._tasks))

    async def close(self) -> None:
        """Ends what moves, seals the disk tier. Nothing goes down any more."""
        disk, self._disk = self._disk, None
        await self.drain()
        if disk is not None:
            await asyncio.to_thread(disk.close)
