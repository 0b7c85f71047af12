"""The node store's gRPC face: calls become steps of the pool, in the name of the session that makes them.

The pool's handle (the name of its shared memory, a transport's descriptor) leaves this process only in the answer to
`Attach`, and only towards a peer that the connection identifies: shared memory and RDMA pass every network policy by,
so whoever has the handle can read and write it all.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from kvstore.node.dram import DramStore
from kvstore.node.entries import Name
from kvstore.node.feed import EventFeed
from kvstore.node.integrity import Scrubber
from kvstore.node.sessions import Sessions
from kvstore.node.tiers import Tiers
from kvstore.node.traces import StoreTraces
from kvstore.transports.segment import host_id
from kvstore.transports.shm import SharedMemoryPool
from kvstore.types import KEY_BYTES, Tier
from pdserve.errors import Draining, FingerprintMismatch, InvalidRequest, TicketRefused
from pdserve.metrics import KvstoreMetrics
from pdserve.rpc import RpcServer, is_loopback
from pdserve.wire import AnyMethod
from pdserve.wire import store as wire

LIST_BLOCKS = 2000
"""In one message."""
VERIFY_BYTES = 32 << 20
"""Compared in one go: some 2 ms in which nobody else is served."""


@dataclass(frozen=True, slots=True)
class NodeParts:
    """What the service speaks for."""

    node: str
    incarnation: int
    pool: SharedMemoryPool
    dram: DramStore
    tiers: Tiers
    sessions: Sessions
    scrubber: Scrubber
    feed: EventFeed
    metrics: KvstoreMetrics
    offers: dict[str, bytes]
    """Descriptor of the pool by transport."""
    before_attach: Callable[[], None]
    """Certificates may have been renewed in place."""
    traces: StoreTraces | None = None


class StoreService:
    """`KvStoreService`."""

    def __init__(self, parts: NodeParts) -> None:
        self._parts = parts
        self._dram, self._tiers = parts.dram, parts.tiers
        self.draining = False
        self.calls = 0
        """Since start: an unchanged number says that the node is idle."""
        self._closing = asyncio.Event()

    def register(self, server: RpcServer) -> None:
        unary: list[tuple[AnyMethod, Callable[[Any], Awaitable[Any]]]] = [
            (wire.LOOKUP, self.lookup),
            (wire.RENEW_LEASE, self.renew_lease),
            (wire.RELEASE_LEASE, self.release_lease),
            (wire.RESERVE, self.reserve),
            (wire.COMMIT, self.commit),
            (wire.ABORT, self.abort),
            (wire.PIN, self.pin),
            (wire.DROP, self.drop),
            (wire.STAT, self.stat),
            (wire.VERIFY, self.verify),
        ]
        for method, handler in unary:
            operation, traces = method.name.lower(), self._parts.traces
            server.add(method, self._timed(operation, traces.traced(operation, handler) if traces else handler))
        server.add(wire.ATTACH, self.attach)
        server.add(wire.LIST, self.list_blocks)
        server.add(wire.EVENTS, lambda request, context: self._parts.feed.follow(request))

    def _timed(self, operation: str, handler: Callable[[Any], Awaitable[Any]]) -> Callable[[Any], Awaitable[Any]]:
        seconds = self._parts.metrics.seconds.labels(operation)

        async def serve(request: Any) -> Any:
            self.calls += 1
            begun = time.perf_counter()
            response = await handler(request)
            seconds.observe(time.perf_counter() - begun)
            return response

        return serve

    def close(self) -> None:
        """Every session and event stream ends."""
        self._closing.set()
        self._parts.feed.close()

    # ---- sessions ----

    async def attach(self, request: wire.Attach, context: Any) -> AsyncIterator[wire.Attached]:
        parts = self._parts
        check_identity(context)
        if self.draining:
            raise Draining("this node's store is going away")
        if request.block_bytes not in (0, parts.pool.block_bytes):
            raise FingerprintMismatch(
                f"blocks of {request.block_bytes} bytes do not fit this store's of {parts.pool.block_bytes}: set "
                "its block_bytes to that of the workers' layout"
            )
        parts.before_attach()
        here = request.host_id == host_id()
        session = parts.sessions.open(request.client, request.alive_segment if here else "", local=here)
        try:
            yield wire.Attached(
                session=session.token,
                node=parts.node,
                incarnation=parts.incarnation,
                num_blocks=parts.pool.num_blocks,
                block_bytes=parts.pool.block_bytes,
                segment=parts.pool.name if here else "",
                memory={name: memory for name, memory in parts.offers.items() if here or name != "shm"},
                lease_ms=int(self._dram.limits.lease_s * 1000),
                reservation_ms=int(self._dram.limits.reservation_s * 1000),
            )
            await self._closing.wait()
        finally:
            parts.sessions.detach(session)

    # ---- readers ----

    async def lookup(self, request: wire.Lookup) -> wire.Found:
        client = self._parts.sessions.name(request.session)
        hit, promoted = await self._tiers.lookup(
            names_of(request.keys, request.fingerprint),
            client,
            request.tenant,
            lease=not request.no_lease,
            extends=request.extends,
            promote=not request.no_promotion,
        )
        return wire.Found(hit.lease_id, hit.slots, hit.generations, hit.digests, promoted)

    async def renew_lease(self, request: wire.RenewLease) -> wire.LeaseRenewed:
        left = self._dram.renew(request.lease_id, self._parts.sessions.name(request.session))
        return wire.LeaseRenewed(int(left * 1000))

    async def release_lease(self, request: wire.ReleaseLease) -> wire.Done:
        self._dram.release(request.lease_id, self._parts.sessions.name(request.session))
        return wire.Done()

    # ---- writers ----

    async def reserve(self, request: wire.Reserve) -> wire.Reserved:
        if self.draining:
            raise Draining("this node's store is going away")
        client = self._parts.sessions.name(request.session, to_write=True)
        names = names_of(request.keys, request.fingerprint)
        offer = self._dram.reserve(names, request.tenant, client, extends=request.extends)
        return wire.Reserved(offer.reservation_id, tuple(map(int, offer.statuses)), offer.slots, offer.generations)

    async def commit(self, request: wire.Commit) -> wire.Committed:
        client = self._parts.sessions.name(request.session)
        return wire.Committed(self._dram.commit(request.reservation_id, client, request.digests))

    async def abort(self, request: wire.Abort) -> wire.Done:
        self._dram.abort(request.reservation_id, self._parts.sessions.name(request.session, to_stop=True))
        return wire.Done()

    # ---- care ----

    async def pin(self, request: wire.Pin) -> wire.Blocks:
        names = names_of(request.keys, request.fingerprint)
        return wire.Blocks(self._dram.pin(names, pinned=request.pinned, soft_ttl_s=request.soft_ttl_ms / 1000))

    async def drop(self, request: wire.Drop) -> wire.Blocks:
        names = self._tiers.names() if request.all else names_of(request.keys, request.fingerprint)
        return wire.Blocks(self._tiers.drop(names))

    async def verify(self, request: wire.Verify) -> wire.Verified:
        """Everything: DRAM here, a slice at a time; the disk in a thread."""
        names = list(self._dram.entries) if request.all else names_of(request.keys, request.fingerprint)
        step = max(1, VERIFY_BYTES // self._parts.pool.block_bytes)
        checked, corrupt = 0, list[Name]()
        for i in range(0, len(names), step):
            done, wrong = self._parts.scrubber.verify(names[i : i + step])
            checked, corrupt = checked + done, corrupt + wrong
            await asyncio.sleep(0)
        on_disk = 0
        if request.all and (disk := self._tiers.disk) is not None:
            checked += len(disk)
            on_disk = len(await asyncio.to_thread(disk.verify))
        return wire.Verified(checked, tuple(name[:KEY_BYTES] for name in corrupt), on_disk)

    async def stat(self, request: wire.StatQuery) -> wire.Stat:
        dram, pool = self._dram, self._parts.pool
        dram.expire()
        entries = dram.entries.values()
        return wire.Stat(
            node=self._parts.node,
            incarnation=self._parts.incarnation,
            num_blocks=pool.num_blocks,
            block_bytes=pool.block_bytes,
            free_blocks=dram.slots.free,
            visible_blocks=len(entries),
            reserved_blocks=sum(len(reservation.slots) for reservation in dram.reservations),
            leased_blocks=sum(entry.leases > 0 for entry in entries),
            pinned_blocks=sum(entry.pinned for entry in entries),
            largest_free_run=dram.slots.largest_run,
            disk_blocks=len(self._tiers.disk or ()),
            leases=len(dram.leases),
            sessions=len(self._parts.sessions),
            sequence=dram.events.sequence,
            tenants=dict(dram.tenants.used),
        )

    async def list_blocks(self, request: wire.ListQuery, context: Any) -> AsyncIterator[wire.Listed]:
        blocks = self._listed()
        wanted = blocks[: request.limit or len(blocks)]
        for i in range(0, len(wanted), LIST_BLOCKS):
            yield wire.Listed(tuple(wanted[i : i + LIST_BLOCKS]))

    def _listed(self) -> list[wire.ListedBlock]:
        in_dram = [
            wire.ListedBlock(e.key, e.fingerprint, int(Tier.DRAM), e.slot, e.tenant, e.leases, e.pinned, e.parent)
            for e in self._dram.entries.values()
        ]
        disk = self._tiers.disk
        on_disk = disk.ids() if disk is not None else []
        return in_dram + [wire.ListedBlock(block.key, block.fingerprint, int(Tier.DISK)) for block in on_disk]


def names_of(keys: Sequence[bytes], fingerprint: bytes) -> list[Name]:
    """Raises `InvalidRequest` for a fingerprint that is none."""
    if len(fingerprint) != KEY_BYTES:
        raise InvalidRequest(f"a fingerprint has {KEY_BYTES} bytes, this one {len(fingerprint)}", param="fingerprint")
    return [key + fingerprint for key in keys]


def check_identity(context: Any) -> None:
    """Raises `TicketRefused` unless the peer proved itself: a certificate of ours, or it is on this host."""
    if b"ssl" in context.auth_context().get("transport_security_type", ()):
        return  # the server asks every client for a certificate
    peer = unquote(context.peer())
    if peer.startswith("unix:") or is_loopback(peer.partition(":")[2].rpartition(":")[0]):
        return
    raise TicketRefused("the pool's handle is given to identified peers only: use mutual TLS, or come by loopback")
