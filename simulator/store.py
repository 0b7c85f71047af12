"""A node's KV store in virtual time: the real books of the DRAM pool, bytes moved by the node's host links.

One byte a block stands for the KV. Routers learn what it holds by its events, as they do from a real one.
"""

from __future__ import annotations

from collections.abc import Sequence

import xxhash
from prometheus_client import CollectorRegistry

from kvstore.eviction import EvictionPolicy
from kvstore.index.base import NodeSnapshot
from kvstore.index.index import KVIndex
from kvstore.node.dram import DramStore
from kvstore.node.entries import Hit, Limits, Status
from pdserve.metrics import KvstoreMetrics
from simulator.engines import null_memory
from simulator.events import EventQueue

TENANT = "all"
LIMITS = Limits(high_watermark=1.0, low_watermark=1.0)
"""Slots are kept free for what comes while victims are on their way to disk. Here there is none: they leave at once."""
_DIGEST = xxhash.xxh3_128_digest(b"\0")


class NodeStore:
    """`address` names it to workers and in the index; `node` is where it stands on the network."""

    def __init__(
        self, address: str, node: str, num_blocks: int, policy: EvictionPolicy, queue: EventQueue, index: KVIndex
    ) -> None:
        self.address = address
        self.node = node
        self._index = index
        metrics = KvstoreMetrics(CollectorRegistry())
        self._books = DramStore(null_memory(num_blocks, 1), policy, clock=queue.clock, metrics=metrics, limits=LIMITS)
        self._told = 0
        self._books.events.listen(self._tell)
        self._index.load(NodeSnapshot(address, 1, 0))

    def lookup(self, keys: Sequence[bytes], fingerprint: bytes, client: str) -> Hit:
        """The leading blocks that are here, leased."""
        return self._books.lookup([key + fingerprint for key in keys], client)

    def release(self, hit: Hit, client: str) -> None:
        self._books.release(hit.lease_id, client)

    def reserve(self, keys: Sequence[bytes], fingerprint: bytes, client: str) -> tuple[int, int]:
        """(reservation, blocks to write) for those of the chain that are not here and fit."""
        offer = self._books.reserve([key + fingerprint for key in keys], TENANT, client, extends=True)
        return offer.reservation_id, sum(status is Status.RESERVED for status in offer.statuses)

    def commit(self, reservation: int, client: str, num_blocks: int) -> None:
        self._books.commit(reservation, client, [_DIGEST] * num_blocks)

    def renew(self) -> None:
        """A sign of life, and the store's own tick."""
        self._books.tick()
        self._index.renew(self.address, 1)

    def check_integrity(self) -> None:
        """Raises `IntegrityError`."""
        self._books.check_integrity()

    def _tell(self) -> None:
        events = self._books.events.since(self._told)
        assert events is not None, "every event is told at once"
        self._told = self._books.events.sequence
        self._index.apply(self.address, 1, events)
