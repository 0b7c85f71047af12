"""Before a prompt is computed: what of it can be brought from a store sooner.

One fetch a request, in a task of its own, from its arrival to its submission: look the chain up in the node's store and
in the peer's that the router named, take the longest, open blocks in the engine, read into them in a thread, commit,
submit. Whatever goes wrong, the request is submitted all the same, and computes what is missing. Its end (cancel,
deadline, lost router) stops the read first and then gives the blocks back.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from kvstore.handover.verify import DigestPolicy
from kvstore.transports.shm import SharedMemoryPool
from pdserve.block_keys import KEY_BYTES, block_keys, next_key
from pdserve.engine.base import ImportTarget
from pdserve.errors import DeadlineExceeded, HandoverError, PdserveError
from pdserve.metrics import WorkerMetrics
from pdserve.types import Request
from pdserve.wire.store import Found
from worker_core.cache_view import CacheView
from worker_core.engine_thread import EngineThread
from worker_core.fetch_plan import FetchPlanner
from worker_core.jobs import Job
from worker_core.store_commands import commit_fill, drop_fill, open_fill
from worker_core.store_link import StoreLink
from worker_core.store_sources import Find, PeerStores

READ_BYTES = 16 << 20
"""In one go: what is whole of an interrupted fetch is kept, and a cancelled one ends within some 10 ms."""

OPEN_S = 0.25
"""For room in the engine. Longer, and the prompt had better stand in the engine's own queue."""

ResultT = TypeVar("ResultT")

log = logging.getLogger("pdserve.worker")


@dataclass(slots=True, eq=False)
class Fetch:
    """One request's."""

    job: Job
    keys: Sequence[bytes]
    """Of the blocks that may be fetched: all full ones but that of the last token, which is always computed."""
    stop: threading.Event = field(default_factory=threading.Event)
    task: asyncio.Task[None] | None = None
    submitted: bool = False
    dropped: bool = False
    """The request has ended."""


class Fetcher:
    """One a worker. `submit` hands a job to the engine; `stored` hears how much of a chain the node's store has."""

    def __init__(
        self,
        engine: EngineThread,
        pool: SharedMemoryPool,
        view: CacheView,
        planner: FetchPlanner,
        metrics: WorkerMetrics,
        *,
        link: StoreLink | None,
        peers: PeerStores,
        fingerprint: bytes,
        block_tokens: int,
        always: bool,
        timeout_s: float,
        threads: int,
        policy: DigestPolicy,
        submit: Callable[[Job], None],
        stored: Callable[[Job, int], None],
        tokens_waiting: Callable[[], int],
    ) -> None:
        self._engine = engine
        self._pool = pool
        self._view = view
        self._planner = planner
        self._metrics = metrics
        self._link = link
        self._peers = peers
        self._fingerprint = fingerprint
        self._block_tokens = block_tokens
        self._always = always
        self._timeout_s = timeout_s
        self._policy = policy
        self._submit = submit
        self._stored = stored
        self._tokens_waiting = tokens_waiting
        self.read_bytes = READ_BYTES
        self._bulk = {tier: ThreadPoolExecutor(threads, f"fetch-{tier}") for tier in ("dram", "peer")}
        """Apart, so that a slow peer delays no read from the own node."""
        self._leaders: dict[bytes, asyncio.Event] = {}
        """By the first block that is being read: set when it is there, or will not be."""
        self._fetches: dict[int, Fetch] = {}
        self._releases: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        """Requests for which something is looked up or read."""
        return len(self._fetches)

    def __contains__(self, key: int) -> bool:
        return key in self._fetches

    # ---- from the job table ----

    def open(self, job: Job, prefix_store: str) -> bool:
        """Whether a fetch was begun, which will submit the job. Hot path when it is not."""
        has_own = self._link is not None and self._link.client is not None
        peer = prefix_store if self._may_ask(prefix_store) else ""
        if not has_own and not peer:
            return False
        keys = context_keys(job.request, self._block_tokens)
        missing = len(keys) - self._view.match(keys)
        if not missing or not (self._always or self._planner.worth_asking(missing)):
            return False
        fetch = Fetch(job, keys)
        self._fetches[job.key] = fetch
        fetch.task = asyncio.create_task(self._run(fetch, peer))
        fetch.task.add_done_callback(partial(self._ended, fetch))  # also of one that is cancelled before it begins
        return True

    def _may_ask(self, address: str) -> bool:
        own = self._link is not None and address in self._link.addresses
        return bool(address) and not own and self._peers.available(address)

    def drop(self, job: Job) -> None:
        """The request has its prompt, or has ended: stop what is under way, hold nothing for it. Other jobs are
        ignored."""
        fetch = self._fetches.get(job.key)
        if fetch is not None and fetch.task is not None and not fetch.dropped:
            fetch.dropped = True
            fetch.stop.set()
            fetch.task.cancel()
        elif fetch is None:
            self._let_go(job)

    async def stop(self) -> None:
        """End every fetch, wait until no thread writes any more."""
        tasks = [fetch.task for fetch in self._fetches.values() if fetch.task is not None]
        for fetch in list(self._fetches.values()):
            self.drop(fetch.job)
        await asyncio.gather(*tasks, return_exceptions=True)
        for bulk in self._bulk.values():
            await asyncio.get_running_loop().run_in_executor(None, bulk.shutdown)
        await asyncio.gather(*self._releases, return_exceptions=True)
        await self._peers.close()

    # ---- one fetch ----

    async def _run(self, fetch: Fetch, peer: str) -> None:
        try:
            find = await self._find(fetch, peer)
            if find is not None:
                await self._fetch(fetch, find)
        except PdserveError as error:
            self._recompute(error)
        except Exception as error:
            log.error("a fetch failed", exc_info=error)
            self._metrics.store_recomputes.labels("internal_error").inc()

    def _ended(self, fetch: Fetch, task: asyncio.Task[None]) -> None:
        """Nothing writes for it any more."""
        del self._fetches[fetch.job.key]
        if fetch.dropped:
            self._let_go(fetch.job)
        elif not fetch.submitted:
            self._submit(fetch.job)

    def _let_go(self, job: Job) -> None:
        """It takes no more of what was filled for it; not every engine knows by itself."""
        if job.fetched_from:
            self._engine.post(partial(drop_fill, job.key))

    def _recompute(self, error: PdserveError) -> None:
        log.info("a prompt is computed, not fetched: %s", error.message, extra={"reason": error.reason})
        self._metrics.store_recomputes.labels(error.reason).inc()

    async def _find(self, fetch: Fetch, peer: str) -> Find | None:
        """The longest of what the stores have, if it is more than the engine itself."""
        began = time.perf_counter()
        asked = [self._find_own(fetch)] + ([self._find_peer(peer, fetch)] if peer else [])
        finds = [find for find in await asyncio.gather(*asked) if find is not None]
        elapsed = time.perf_counter() - began
        self._metrics.store_seconds.labels("lookup").observe(elapsed)
        if finds and not any(find.found.promoted for find in finds):  # else the disk's time, or a time-out
            self._planner.overhead_s.add(elapsed)
        best = max(finds, key=len, default=None)
        for find in finds:
            if find is not best:
                self._release(find)
        if best is not None and len(best) <= self._view.match(fetch.keys):
            self._release(best)
            return None
        return best

    async def _find_own(self, fetch: Fetch) -> Find | None:
        client = self._link.client if self._link is not None else None
        if self._link is None or client is None:
            return None
        job = fetch.job
        looking = client.lookup(fetch.keys, self._fingerprint, tenant=job.tenant, traceparent=job.request.traceparent)
        found = await self._asked(self._link.pause, looking)
        if found is None:
            return None
        self._stored(job, len(found.slots))
        self._metrics.store_promoted_blocks.inc(found.promoted)
        pool, policy = self._pool, self._policy

        def read(part: Found, blocks: Sequence[int], should_stop: Callable[[], bool]) -> None:
            client.read(part, pool.blocks, blocks, policy)

        return Find("dram", "dram", found, client, read, client.attached.lease_ms / 1000)

    async def _find_peer(self, address: str, fetch: Fetch) -> Find | None:
        pause = partial(self._peers.pause, address)
        traceparent = fetch.job.request.traceparent
        found = await self._asked(pause, self._peers.find(address, fetch.keys, self._fingerprint, traceparent))
        if found is None:
            pause()
        return found

    async def _asked(self, pause: Callable[[], None], call: Coroutine[None, None, ResultT]) -> ResultT | None:
        """A store's answer; None, and counted, if it gives none in time."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return await call
        except PdserveError as error:
            if isinstance(error, DeadlineExceeded):
                pause()
            self._recompute(error)
        except TimeoutError:
            pause()
            self._recompute(DeadlineExceeded(f"a store did not answer within {self._timeout_s} s"))
        return None

    async def _fetch(self, fetch: Fetch, find: Find) -> None:
        """Decide what to read, and read it, under the lease."""
        keeping = asyncio.create_task(find.keep())
        self._metrics.store_leases.inc()
        try:
            cached = self._view.match(fetch.keys)
            first = cached if self._always else self._first_block(find, cached)
            if first >= len(find):
                self._metrics.store_recomputes.labels("slower").inc()
                return
            async with self._in_turn(fetch.keys[first]):
                await self._fill_all(fetch, find, first, computes_meanwhile=first > cached)
        finally:
            keeping.cancel()
            self._metrics.store_leases.dec()
            self._release(find)

    @asynccontextmanager
    async def _in_turn(self, key: bytes) -> AsyncIterator[None]:
        """Prompts that begin alike often come together: the first one reads, the others find it in the engine."""
        if (leader := self._leaders.get(key)) is not None:
            await leader.wait()
            yield  # all at once: what it could not bring need not be waited for one after the other
            return
        self._leaders[key] = asyncio.Event()
        try:
            yield
        finally:
            self._leaders.pop(key).set()

    async def _fill_all(self, fetch: Fetch, find: Find, first: int, *, computes_meanwhile: bool) -> None:
        while first < len(find):  # more than once where they go through a staging area
            filled = await self._fill(fetch, find, first, computes_meanwhile=computes_meanwhile)
            first = first + filled if filled else len(find)

    def _first_block(self, find: Find, cached: int) -> int:
        return self._planner.first_block(find.source, cached, len(find), self._tokens_waiting())

    async def _fill(self, fetch: Fetch, find: Find, first: int, *, computes_meanwhile: bool) -> int:
        """Bring block `first` and as many more as the engine has room for; how many, 0 if some are missing."""
        key = fetch.job.key
        target = await self._open(fetch, fetch.keys[: len(find)], first)
        if target is None:
            return 0
        if computes_meanwhile and not fetch.submitted:
            fetch.submitted = True
            self._submit(fetch.job)
        began = time.perf_counter()
        per_read = max(1, self.read_bytes // self._pool.block_bytes)
        reading = asyncio.get_running_loop().run_in_executor(
            self._bulk[find.tier], _read_all, find, first, target, per_read, fetch.stop.is_set
        )
        try:
            num_blocks, error = await asyncio.shield(reading)
        except asyncio.CancelledError:
            await asyncio.wait([reading])  # until then a thread writes into the blocks
            self._engine.post(partial(drop_fill, key))
            raise
        self._engine.post(partial(commit_fill, key, num_blocks))
        self._count(
            fetch, find, range(first + target.num_cached_blocks, first + num_blocks), time.perf_counter() - began
        )
        if error is not None:
            self._lost(find, error)
        return num_blocks if num_blocks == len(target.blocks) else 0

    async def _open(self, fetch: Fetch, keys: Sequence[bytes], first: int) -> ImportTarget | None:
        """Blocks to write into; None, and counted, when the engine has no room for long."""
        opening: asyncio.Future[ImportTarget] = self._engine.call_when_possible(
            partial(open_fill, fetch.job.key, keys, first)
        )
        try:
            async with asyncio.timeout(min(OPEN_S, self._timeout_s)):
                return await opening
        except TimeoutError:
            self._metrics.store_recomputes.labels("no_room").inc()
            self._engine.post(partial(drop_fill, fetch.job.key))  # it may have been opened in this very moment
            return None
        except asyncio.CancelledError:
            self._engine.post(partial(drop_fill, fetch.job.key))
            raise

    def _count(self, fetch: Fetch, find: Find, blocks: range, elapsed_s: float) -> None:
        nbytes = len(blocks) * self._pool.block_bytes
        fetch.job.fetched_from = find.tier
        fetch.job.fetched_ns = time.time_ns()
        fetch.job.num_disk_tokens += find.num_from_disk(blocks) * self._block_tokens
        self._planner.observe_read(find.source, nbytes, elapsed_s)
        self._metrics.store_bytes.labels(find.tier, "read").inc(nbytes)
        self._metrics.store_seconds.labels(f"fetch_{find.tier}").observe(elapsed_s)

    def _lost(self, find: Find, error: PdserveError) -> None:
        """What was read before is used, the rest is computed."""
        self._recompute(error)
        if find.tier == "peer":
            self._peers.pause(find.source)

    def _release(self, find: Find) -> None:
        task = asyncio.create_task(find.release())
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)


def _read_all(
    find: Find, first: int, target: ImportTarget, per_read: int, should_stop: Callable[[], bool]
) -> tuple[int, PdserveError | None]:
    """In a thread: fill the target; how many of its leading blocks are whole, and what ended it early."""
    done = target.num_cached_blocks
    while done < len(target.blocks) and not should_stop():
        part = target.blocks[done : done + per_read]
        try:
            find.read(first + done, part, should_stop)
        except PdserveError as error:
            return done, error
        except Exception as error:
            log.error("a read failed", exc_info=error)
            return done, HandoverError(f"the read failed: {type(error).__name__}: {error}")
        done += len(part)
    return done, None


def context_keys(request: Request, block_tokens: int) -> list[bytes]:
    """Of the full blocks of what is computed before a request's choices part, but for a block that its last token
    ends: the last token is always computed."""
    tokens: Sequence[int] = request.prompt_token_ids
    packed = request.block_keys or block_keys(request.cache_root, tokens, block_tokens)
    keys = [packed[i : i + KEY_BYTES] for i in range(0, len(packed), KEY_BYTES)]
    if len(request.output_token_ids) == 1:
        tokens = (*tokens, *request.output_token_ids[0])
        for start in range(len(keys) * block_tokens, len(tokens) - block_tokens + 1, block_tokens):
            parent = keys[-1] if keys else request.cache_root
            keys.append(next_key(parent, tokens[start : start + block_tokens]))
    return keys[: (len(tokens) - 1) // block_tokens]
