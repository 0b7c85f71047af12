"""A worker's side of the KV stores: put together here, and the one thing that the job table sees of it.

What the engine's prefix cache takes up goes to the node's store (`publisher.py`), what a prompt needs comes from there
or from a peer's (`fetcher.py`), and routers hear what the cache holds (`cache_view.py`). A worker without a store, or
with an engine that has no `KVCache`, has all of this and uses none of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from kvstore.handover.verify import DigestPolicy
from pdserve.config import WorkerConfig
from pdserve.engine.base import HandoverEngine, KVCache
from pdserve.metrics import WorkerMetrics
from pdserve.types import CacheDelta, WorkerInfo
from worker_core.cache_view import CacheFeed, CacheView
from worker_core.engine_thread import EngineThread, Round
from worker_core.fetch_plan import FetchPlanner
from worker_core.fetcher import Fetcher
from worker_core.jobs import Job, JobTable
from worker_core.memory_port import MemoryPort
from worker_core.publisher import Owner, Publisher
from worker_core.store_link import StoreLink
from worker_core.store_sources import PeerStores

FLUSH_S = 2.0
"""At the end of a drain: for what is still to be stored."""

log = logging.getLogger("pdserve.worker")


class StoreSide:
    """One a worker; `start` once it serves. Its first four methods are `worker_core.jobs.Store`."""

    def __init__(
        self,
        config: WorkerConfig,
        info: WorkerInfo,
        engine: HandoverEngine,
        thread: EngineThread,
        jobs: JobTable,
        metrics: WorkerMetrics,
        port: MemoryPort,
        tokens_waiting: Callable[[], int],
    ) -> None:
        pool, tls, policy = port.pool, config.tls.rpc(), DigestPolicy(config.store_digest_every)
        self._jobs = jobs
        self._caches = isinstance(engine, KVCache) and config.prefix_cache
        self.view = CacheView()
        self.planner = FetchPlanner(
            info.block_tokens, engine.layout.block_bytes, max(1, config.chunk_tokens // info.block_tokens)
        )
        self.link: StoreLink | None = None
        self.publisher: Publisher | None = None
        if config.store and self._caches:
            self.link = StoreLink(config.store, info, pool, metrics, tls)
            self.publisher = Publisher(self.link, thread, pool, info.fingerprint, metrics, config.store_backlog_blocks)
        self.fetcher = Fetcher(
            thread,
            pool,
            self.view,
            self.planner,
            metrics,
            link=self.link,
            peers=PeerStores(info.worker_id, port, tls, policy),
            fingerprint=info.fingerprint,
            block_tokens=info.block_tokens,
            always=config.store_fetch == "always",
            timeout_s=config.store_timeout_s,
            threads=config.pull_threads,
            policy=policy,
            submit=jobs.start,
            stored=self._known,
            tokens_waiting=tokens_waiting,
        )
        self._fetches = self._caches and config.store_fetch != "never"

    # ---- for the job table ----

    def __contains__(self, key: int) -> bool:
        return key in self.fetcher

    def open(self, job: Job, prefix_store: str) -> bool:
        return self._fetches and self.fetcher.open(job, prefix_store)

    def drop(self, job: Job) -> None:
        self.fetcher.drop(job)

    def ended(self, key: int, job: Job) -> None:
        if self.publisher is not None:
            self.publisher.end(key, _owner(job))

    # ---- for the worker ----

    def start(self) -> None:
        if self.link is not None and self.publisher is not None:
            self.link.start()
            self.publisher.start()

    def on_round(self, round_: Round) -> CacheDelta:
        """One step's news; what routers should hear of it. Hot path when there is none."""
        result = round_.result
        self.planner.observe_step(result.num_prompt_tokens, result.prefill_s or round_.duration_s)
        if not result.published and not result.evicted:
            return CacheDelta()
        if self.publisher is not None:
            for published in result.published:
                self.publisher.add(published, self._owner_of)
        return self.view.update(result)

    def feed(self) -> CacheFeed:
        """For one router's stream."""
        return CacheFeed(self.view)

    def _owner_of(self, handle: int) -> Owner | None:
        job = self._jobs.job_of(handle)
        return None if job is None else _owner(job)

    def _known(self, job: Job, num_stored: int) -> None:
        if self.publisher is not None:
            self.publisher.known(job.key, _owner(job), num_stored)

    async def flush(self) -> None:
        """Store what is left, for a bounded time."""
        if self.publisher is None:
            return
        try:
            await asyncio.wait_for(self.publisher.flush(), FLUSH_S)
        except TimeoutError:
            log.warning("not everything was stored before the end")

    async def stop(self) -> None:
        """Nobody reads or writes any more when it returns."""
        await self.fetcher.stop()
        if self.publisher is not None:
            await self.publisher.stop()
        if self.link is not None:
            await self.link.stop()


def _owner(job: Job) -> Owner:
    return Owner(job.tenant, job.request.traceparent)
