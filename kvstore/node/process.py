"""One node's store as a process: the way in and out of life, and what it does when nobody calls.

Runs inside any event loop and keeps no process-wide state, so that a test can run many in one process.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from prometheus_client import CollectorRegistry

from kvstore.eviction import IntegrityError
from kvstore.node.assembly import Wires, advertised_host, assemble, check_config
from kvstore.node.compaction import compact
from kvstore.node.service import NodeParts, StoreService
from kvstore.transports.shm import SharedMemoryPool
from pdserve.config import KvstoreConfig, split_address
from pdserve.errors import PdserveError, ServiceError
from pdserve.http_status import Answer, StatusServer
from pdserve.metrics import CONTENT_TYPE, KvstoreMetrics, render
from pdserve.rpc import RpcServer

TICK_S = 1.0
INTEGRITY_TICKS = 60
"""The books are checked about once a minute, when nobody called in the last tick: it is linear in blocks."""
COMPACT_BYTES = 8 << 20
"""Moved in an idle tick, to join free space: some 2 ms."""
DRAIN_POLL_S = 0.05
STOP_GRACE_S = 2.0

log = logging.getLogger("pdserve.kvstore")


class NodeStore:
    """Starts, serves, drains, stops. `address`, `http_port` and `parts` are known after `start`."""

    address: str
    http_port: int
    parts: NodeParts

    def __init__(self, config: KvstoreConfig) -> None:
        """Raises `ConfigError`."""
        check_config(config)
        self._config = config
        self.registry = CollectorRegistry()
        self._metrics = KvstoreMetrics(self.registry)
        paths = {"/healthz": self._healthz, "/readyz": self._readyz, "/metrics": self._render_metrics}
        self._status = StatusServer(*split_address(config.http_listen, "http_listen"), paths)
        self._pool: SharedMemoryPool | None = None
        self._wires: Wires | None = None
        self._service: StoreService | None = None
        self._server: RpcServer | None = None
        self._ticking: asyncio.Task[None] | None = None
        self._state = "loading"
        self.failed: asyncio.Future[PdserveError] = asyncio.get_running_loop().create_future()
        """Done when the store found its own books wrong: the process should end, and start empty."""

    # ---- life ----

    async def start(self) -> None:
        """Allocate the pool, read what is on disk, serve. Raises `ConfigError`."""
        config = self._config
        self.http_port = await self._status.start()
        num_blocks = config.num_blocks or config.memory_bytes // config.block_bytes
        # in a thread: all its pages are allocated now, and probes want answers meanwhile
        self._pool = await asyncio.to_thread(SharedMemoryPool, num_blocks, config.block_bytes)
        self._wires = Wires(config, self._pool)
        self.parts = await assemble(config, self._pool, self._wires, self._metrics)
        self._service = StoreService(self.parts)
        self._server = RpcServer(config.listen, tls=config.tls.rpc(), allow_plaintext=config.allow_plaintext)
        self._service.register(self._server)
        port = await self._server.start()
        self.address = config.advertise or f"{advertised_host(config)}:{port}"
        self._ticking = asyncio.get_running_loop().create_task(self._tick_for_ever())
        self._ticking.add_done_callback(self._on_ticking_ended)
        await self._server.set_serving(True)
        self._state = "ready"

    async def drain(self) -> None:
        """Nothing new is stored and nobody attaches; those who read and write may finish, then what is in memory goes
        to disk: all within `drain_timeout_s`. `stop` should follow."""
        if self._service is not None:
            self._service.draining = True
        self._state = "draining"
        log.info("draining", extra={"leases": len(self.parts.dram.leases)})
        if self._server is not None:
            await self._server.set_serving(False)
        try:
            async with asyncio.timeout(self._config.drain_timeout_s):
                while self._held():  # noqa: ASYNC110 (holds also end by time, which no event tells)
                    await asyncio.sleep(DRAIN_POLL_S)
                await self.parts.tiers.flush()
        except TimeoutError:
            log.warning("drain timed out", extra={"leases": len(self.parts.dram.leases)})

    def _held(self) -> bool:
        """Whether anyone reads or writes; a writer that went silent is not waited for."""
        dram = self.parts.dram
        dram.expire()
        return bool(len(dram.leases)) or any(not reservation.lapsed for reservation in dram.reservations)

    async def stop(self) -> None:
        """End at once: streams end, the disk tier is sealed, the memory is unlinked. Idempotent."""
        self._state = "stopped"
        if self._ticking is not None:
            self._ticking.cancel()
            with suppress(asyncio.CancelledError):
                await self._ticking
        if self._service is not None:
            self._service.close()
        if self._server is not None:
            await self._server.stop(STOP_GRACE_S)
        if self._service is not None:
            await self.parts.tiers.close()
            self.parts.sessions.close()
            if self.parts.traces is not None:
                await asyncio.to_thread(self.parts.traces.close)
        self._service = self._server = None
        if self._wires is not None:
            self._wires.close()
        if self._pool is not None:
            self._pool.close()
        await self._status.stop()

    # ---- when nobody calls ----

    async def _tick_for_ever(self) -> None:
        """Raises `IntegrityError`."""
        idle_ticks = calls = 0
        while self._service is not None:
            await asyncio.sleep(TICK_S)
            self.tick()
            idle = calls == self._service.calls
            calls = self._service.calls
            idle_ticks = idle_ticks + 1 if idle else 0
            if idle:
                self.tidy()
            if idle and idle_ticks % INTEGRITY_TICKS == 0:
                self.parts.dram.check_integrity()

    def tick(self) -> None:
        """What time ends, and the gauges."""
        dram, metrics, disk = self.parts.dram, self._metrics, self.parts.tiers.disk
        dram.tick()
        holders = {lease.client for lease in dram.leases} | {reservation.client for reservation in dram.reservations}
        self.parts.sessions.purge(holders)
        reserved = sum(len(reservation.slots) for reservation in dram.reservations)
        for state, blocks in (("free", dram.slots.free), ("visible", len(dram.entries)), ("reserved", reserved)):
            metrics.blocks.labels(state).set(blocks)
        metrics.leases.set(len(dram.leases))
        metrics.reservations.set(len(dram.reservations))
        metrics.largest_free_run.set(dram.slots.largest_run)
        metrics.attached.set(len(self.parts.sessions))
        metrics.disk_blocks.set(len(disk) if disk is not None else 0)

    def tidy(self) -> None:
        """Compare a few blocks with their digests, join free space that is in pieces."""
        if self._config.scrub_blocks:
            _, wrong = self.parts.scrubber.step(self._config.scrub_blocks)
            if wrong:
                log.error("blocks in memory were corrupt and are dropped", extra={"blocks": len(wrong)})
        compact(self.parts.dram, max(1, COMPACT_BYTES // self._config.block_bytes))

    def _on_ticking_ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or (error := task.exception()) is None:
            return
        what = "its books are wrong" if isinstance(error, IntegrityError) else "its clockwork broke"
        log.error("the store ends: %s", what, exc_info=error)
        self._state = "failed"
        if not self.failed.done():
            self.failed.set_result(ServiceError(f"the store ends, {what}: {error}"))

    # ---- status ----

    def _healthz(self) -> Answer:
        return Answer(503, b"the store's books are wrong\n") if self.failed.done() else Answer(200, b"ok\n")

    def _readyz(self) -> Answer:
        return Answer(200 if self._state == "ready" else 503, f"{self._state}\n".encode())

    def _render_metrics(self) -> Answer:
        return Answer(200, render(self.registry), CONTENT_TYPE)
