"""From the engine's prefix cache into the node's store: what was computed, generated or imported here, once.

Copies run in a thread of their own, one chain at a time, and never hold the engine up: a block that the engine reuses
meanwhile changes its generation and is not committed. What cannot be copied soon enough is dropped and counted: it
is a cache.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np

from kvstore.node.client import StoreClient
from kvstore.node.entries import Status
from kvstore.transports.shm import SharedMemoryPool
from pdserve.engine.base import PublishedBlocks
from pdserve.errors import PdserveError, QuotaExceeded, TicketRefused
from pdserve.metrics import WorkerMetrics
from pdserve.wire.store import Reserved
from worker_core.engine_thread import EngineThread
from worker_core.store_commands import lend, take_back
from worker_core.store_link import StoreLink

MIN_BLOCKS = 8
"""New blocks for which a chain under way is stored: a call names the whole chain, so it should bring something."""
GROWTH = 8
"""And at least this part of what is stored: all calls of one chain together then stay linear in its length."""
MAX_OWNERS = 4096
"""Choices that have ended whose tenant is remembered: what the engine tells of one may come a step or two later."""
SETTLE_S = 0.02
"""Between two tries at a chain of which another worker writes blocks right now."""

log = logging.getLogger("pdserve.worker")


class Owner(NamedTuple):
    """Of a chain: whose quota it counts against, and whose trace storing it belongs to."""

    tenant: str = ""
    traceparent: str = ""


@dataclass(slots=True)
class Chain:
    """One choice's blocks, from the first on. `blocks` and `generations` stay empty if the engine gives none."""

    owner: Owner
    keys: list[bytes] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    generations: list[int] = field(default_factory=list)
    num_stored: int = 0
    """Leading blocks that the store has."""
    extends: bool = False
    """The store was asked about this chain before."""
    ended: bool = False
    tries: int = 0

    @property
    def num_new(self) -> int:
        return len(self.keys) - self.num_stored

    @property
    def due(self) -> bool:
        return self.num_new > 0 and (self.ended or self.num_new >= max(MIN_BLOCKS, self.num_stored // GROWTH))

    def take(self, published: PublishedBlocks) -> bool:
        """False if blocks before these are not known: nothing of it can be stored."""
        first = published.first_block
        if first > len(self.keys):
            return False
        end = first + len(published.keys)
        self.keys[first:end] = published.keys
        self.blocks[first:end] = published.blocks
        self.generations[first:end] = published.generations
        return True


class Publisher:
    """One a worker; all on the event loop but the copies."""

    def __init__(
        self,
        link: StoreLink,
        engine: EngineThread,
        pool: SharedMemoryPool,
        fingerprint: bytes,
        metrics: WorkerMetrics,
        max_backlog_blocks: int,
    ) -> None:
        self._link = link
        self._engine = engine
        self._pool = pool
        self._fingerprint = fingerprint
        self._metrics = metrics
        self._max_backlog = max_backlog_blocks
        self._chains: dict[int, Chain] = {}
        """Of choices that run, by handle."""
        self._owners: OrderedDict[int, Owner] = OrderedDict()
        """Of choices that have ended."""
        self._due: dict[int, Chain] = {}
        """To be stored, by a number of their own, oldest first."""
        self._numbers: dict[int, int] = {}
        """Number in `_due`, by `id` of the chain."""
        self._next = 0
        self._unsure: set[bytes] = set()
        """Sessions that may hold reservations of ours: their answers were lost. Nobody else would end them while this
        process lives."""
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._copies = ThreadPoolExecutor(1, "publish")
        self._running: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._running = asyncio.create_task(self._run())

    async def stop(self) -> None:
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
        await asyncio.get_running_loop().run_in_executor(None, self._copies.shutdown)

    async def flush(self) -> None:
        """Until nothing is left to be stored."""
        await self._idle.wait()

    # ---- from the job table ----

    def add(self, published: PublishedBlocks, owner_of: Callable[[int], Owner | None]) -> None:
        """`owner_of` tells whose choice a handle is; None: it has ended."""
        if published.handle < 0:
            return  # in a cache that nobody can copy from
        if self._link.client is None:
            self._chains.pop(published.handle, None)
            return
        chain = self._chains.get(published.handle)
        if chain is None:
            owner = owner_of(published.handle)
            chain = Chain(owner or self._owners.get(published.handle, Owner()), ended=owner is None)
            if owner is not None:
                self._chains[published.handle] = chain
        if not chain.take(published):
            self._chains.pop(published.handle, None)
            return
        self._offer(chain)

    def known(self, handle: int, owner: Owner, num_stored: int) -> None:
        """The store was asked for this request's chain and has so many of its blocks."""
        chain = self._chains.setdefault(handle, Chain(owner))
        chain.extends, chain.num_stored = True, num_stored

    def end(self, handle: int, owner: Owner) -> None:
        """The choice has ended: what it still has to store is due now, and may still be told."""
        self._owners[handle] = owner
        if len(self._owners) > MAX_OWNERS:
            self._owners.popitem(last=False)
        chain = self._chains.pop(handle, None)
        if chain is not None:
            chain.ended = True
            self._offer(chain)

    def _offer(self, chain: Chain) -> None:
        if not chain.due or id(chain) in self._numbers:
            return
        self._next += 1
        self._due[self._next] = chain
        self._numbers[id(chain)] = self._next
        self._bound_backlog()
        self._wake.set()
        self._idle.clear()

    def _bound_backlog(self) -> None:
        backlog = sum(chain.num_new for chain in self._due.values())
        while backlog > self._max_backlog and len(self._due) > 1:
            chain = self._pop()
            backlog -= chain.num_new
            self._drop(chain, "backlog")

    def _pop(self) -> Chain:
        number = next(iter(self._due))
        chain = self._due.pop(number)
        del self._numbers[id(chain)]
        return chain

    def _drop(self, chain: Chain, reason: str) -> None:
        """Its blocks so far stay out of the store; later ones have another chance."""
        self._metrics.store_publish_dropped.labels(reason).inc(max(0, chain.num_new))
        chain.num_stored = len(chain.keys)

    # ---- storing ----

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            while self._due:
                await self._store(self._pop())
            self._wake.clear()
            self._idle.set()

    async def _store(self, chain: Chain) -> None:
        client = self._link.client
        if client is None:
            self._drop(chain, "no_store")
            return
        began = time.perf_counter()
        try:
            await self._end_unsure(client)
            complete = await self._put(client, chain)
        except QuotaExceeded as error:
            self._drop(chain, error.reason)
            return
        except PdserveError as error:
            self._unsure.add(client.attached.session)
            self._failed(chain, error)
            return
        except Exception as error:
            self._unsure.add(client.attached.session)
            log.error("storing blocks failed", exc_info=error)
            self._drop(chain, "internal_error")
            return
        finally:
            self._metrics.store_seconds.labels("publish").observe(time.perf_counter() - began)
        if not complete:
            await self._again(chain)

    def _failed(self, chain: Chain, error: PdserveError) -> None:
        if error.reason == "deadline_exceeded":
            self._link.pause()
        log.info("blocks were not stored", extra={"reason": error.reason})
        self._drop(chain, error.reason)

    async def _end_unsure(self, client: StoreClient) -> None:
        """No copy runs now, so what those sessions reserved is not written any more."""
        for session in list(self._unsure):
            try:
                await client.abort_all(session)
            except TicketRefused:
                pass  # it holds nothing, or the store is another one
            self._unsure.discard(session)

    async def _again(self, chain: Chain) -> None:
        """Another worker writes part of it right now, or the engine had no room to lend: once more, in a while."""
        chain.tries += 1
        if chain.tries > 2:
            self._drop(chain, "busy")
            return
        await asyncio.sleep(SETTLE_S)
        self._offer(chain)

    async def _put(self, client: StoreClient, chain: Chain) -> bool:
        """Reserve, copy, commit what is missing of the chain as it is now. False: try again later."""
        keys, blocks, generations = tuple(chain.keys), tuple(chain.blocks), tuple(chain.generations)
        tenant, traceparent = chain.owner
        reserved = await client.reserve(
            keys, self._fingerprint, tenant=tenant, extends=chain.extends, traceparent=traceparent
        )
        chain.extends = True
        statuses = reserved.statuses
        wanted = [i for i, status in enumerate(statuses) if status == Status.RESERVED]
        if wanted and len(blocks) == len(keys):
            rows, fences = [blocks[i] for i in wanted], [generations[i] for i in wanted]
            num_copied = await self._copy(client, reserved, rows, fences, traceparent)
            self._metrics.store_publish_dropped.labels("reused").inc(len(wanted) - num_copied)
        elif wanted:
            num_copied = await self._copy_lent(client, reserved, [keys[i] for i in wanted], traceparent)
            chain.tries = 0 if num_copied else chain.tries
            if num_copied < len(wanted):
                return False
        if Status.BUSY in statuses:
            return False
        refused = sum(status == Status.NO_ROOM for status in statuses)
        self._metrics.store_publish_dropped.labels("no_room").inc(refused)
        chain.num_stored, chain.tries = len(keys), 0
        return True

    async def _copy_lent(self, client: StoreClient, reserved: Reserved, keys: Sequence[bytes], traceparent: str) -> int:
        """As `_copy`, of blocks that the engine must bring into hand-over memory first."""
        lent = await self._engine.call(partial(lend, keys))
        if lent is None:
            await client.abort(reserved)
            return 0
        try:
            return await self._copy(client, reserved, lent, self._pool.generations[list(lent)].tolist(), traceparent)
        finally:
            self._engine.post(partial(take_back, lent))

    async def _copy(
        self,
        client: StoreClient,
        reserved: Reserved,
        rows: Sequence[int],
        generations: Sequence[int],
        traceparent: str,
    ) -> int:
        """Copy rows of the pool into the reserved slots, commit those that were untouched; returns how many."""
        loop = asyncio.get_running_loop()
        copying = loop.run_in_executor(self._copies, _copy_fenced, client, reserved, self._pool, rows, generations)
        try:
            digests = await asyncio.shield(copying)
        except BaseException:
            await asyncio.wait([copying])  # an abort promises that nothing writes any more
            await client.abort(reserved)
            raise
        if not digests:
            await client.abort(reserved)
            return 0
        num_committed = await client.commit(reserved, digests, traceparent)
        self._metrics.store_bytes.labels("dram", "write").inc(num_committed * self._pool.block_bytes)
        return num_committed


def _copy_fenced(
    client: StoreClient, reserved: Reserved, pool: SharedMemoryPool, rows: Sequence[int], generations: Sequence[int]
) -> tuple[bytes, ...]:
    """In the copying thread: digests of the leading rows that kept their generation all the while."""
    expected = np.array(generations, dtype=np.uint64)
    count = _num_untouched(pool, rows, expected)
    digests = client.write_slots(reserved.slots[:count], pool.blocks, rows[:count])
    return digests[: _num_untouched(pool, rows, expected)]


def _num_untouched(pool: SharedMemoryPool, rows: Sequence[int], expected: np.ndarray) -> int:
    touched = np.flatnonzero(pool.generations[list(rows)] != expected[: len(rows)])
    return int(touched[0]) if touched.size else len(rows)
