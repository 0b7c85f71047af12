"""What the router believes of prefixes: who holds how much of a prompt, fed by events and checked against answers.

Three sources fill one index: the node stores that workers name, the workers' own caches, and guesses where a worker
tells nothing. Each answer then says how much was really cached; whoever holds much less than was believed is aged out
until it restarts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from kvstore.index.base import NodeReach
from kvstore.index.index import KVIndex
from pdserve.metrics import RouterMetrics
from pdserve.types import PromptStats, WorkerInfo
from router.caches import Later, WorkerCache, WorkerCaches
from router.session import Link
from router.stores import Stores

log = logging.getLogger(__name__)


class PrefixIndex:
    """`follow` it whatever the fleet is; `close` it at the end."""

    def __init__(
        self, index: KVIndex, stores: Stores, metrics: RouterMetrics, clock: Callable[[], float], later: Later
    ) -> None:
        self.index = index
        self._stores = stores
        self._caches = WorkerCaches(index, clock, later)
        self._links: dict[Link, WorkerCache] = {}
        self._judged: set[str] = set()
        """Since the last tick: their gauges are set then, not at each prompt."""
        self._metrics = metrics

    # ---- what comes in ----

    def follow(self, links: Sequence[Link]) -> None:
        """The fleet has changed."""
        gone = self._links.keys() - set(links)
        for link in gone:
            del self._links[link]
            link.on_cache = None
            self._caches.remove(link.info)
            self._judged.discard(link.info.worker_id)
            with suppress(KeyError):  # never audited
                self._metrics.prefix_audit_ratio.remove(link.info.worker_id)
        for link in links:
            if link not in self._links:
                cache = self._links[link] = self._caches.add(link.info)
                link.on_cache = cache.take
        self._stores.follow(link.info.store_address for link in links)

    def computed(self, worker_id: str, keys: bytes) -> None:
        """A prompt is through at a worker: what it may hold from now on, if it does not tell itself."""
        self._caches.computed(worker_id, keys)

    def tick(self) -> None:
        """About once a second: leases, ages, tidying."""
        self._caches.tick()
        self.index.expire()
        self._metrics.guessed_caches.set(self._caches.num_guessed())
        for worker_id in self._judged:
            self._metrics.prefix_audit_ratio.labels(worker_id).set(self.index.audit.ratio(worker_id))
        self._judged.clear()

    async def close(self) -> None:
        await self._stores.close()

    # ---- what is known ----

    def match(self, keys: bytes, fingerprint: bytes) -> Mapping[str, NodeReach]:
        """Leading blocks by worker id (in HBM) and by store address (in DRAM and on disk)."""
        found = self.index.match(keys, fingerprint)
        if not self._stores:
            return found
        return {self._name(node): reach for node, reach in found.items()}

    def _name(self, node: str) -> str:
        return node if node in self._caches else self._stores.address_of(node) or node

    def source(self, info: WorkerInfo) -> str:
        """How a worker's cache is known: "events", "guess", or "distrusted"."""
        if self.index.position(info.worker_id) is None:
            return "distrusted"
        return "guess" if self._caches.guessed(info.worker_id) else "events"

    # ---- and whether it was true ----

    def check(self, worker_id: str, incarnation: int, believed: int, stats: PromptStats) -> None:
        """A prompt is through: tokens that the worker's own cache was believed to hold, against what was found. A
        worker that tells is judged; of one that is guessed at less is believed. Blocks that came from a store say
        nothing for it. A store is not judged: a worker may have had reason not to fetch."""
        found = max(0, stats.num_cached_tokens - stats.num_fetched_tokens)
        self._metrics.prefix_believed_tokens.inc(believed)
        self._metrics.prefix_found_tokens.inc(min(found, believed))
        if self._caches.guessed(worker_id):
            self._caches.judge(worker_id, found >= believed)
            return
        distrusted = self.index.observe(worker_id, incarnation, believed, found)
        self._judged.add(worker_id)
        if distrusted:
            self._tell(worker_id, incarnation)

    def _tell(self, worker_id: str, incarnation: int) -> None:
        self._metrics.prefix_distrusted.labels(worker_id).inc()
        ratio = round(self.index.audit.ratio(worker_id), 3)
        log.warning(
            "worker %s holds less than it was believed to: its cache is not believed any more until it restarts",
            worker_id,
            extra={"worker_id": worker_id, "incarnation": incarnation, "ratio": ratio},
        )
