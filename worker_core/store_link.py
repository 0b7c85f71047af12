"""This worker's session with its node's store, kept up for as long as the worker lives.

A store that is down, restarts or stops answering costs what it would have saved, and nothing else: whoever wants to
use it asks `client`, gets None, and goes on without.
"""

from __future__ import annotations

import asyncio
import logging
import time

from kvstore.node.client import StoreClient
from kvstore.transports.shm import SharedMemoryPool
from pdserve.errors import PdserveError
from pdserve.metrics import WorkerMetrics
from pdserve.rpc import Channel, Tls
from pdserve.types import WorkerInfo

FIRST_RETRY_S = 0.1
LAST_RETRY_S = 5.0
PAUSE_S = 2.0
"""A store that let a call time out is not asked for so long: each request would wait for it again."""

log = logging.getLogger("pdserve.worker")


class StoreLink:
    """`start` it once the engine's pool exists. `address`: host:port, as this worker dials it."""

    def __init__(
        self, address: str, info: WorkerInfo, pool: SharedMemoryPool, metrics: WorkerMetrics, tls: Tls | None
    ) -> None:
        self.address = address
        self.addresses = frozenset((address, info.store_address))
        self._worker_id = info.worker_id
        self._pool = pool
        self._metrics = metrics
        self._channel = Channel(address, tls=tls)
        self._client: StoreClient | None = None
        self._paused_until = 0.0
        self._running: asyncio.Task[None] | None = None
        self.attached = asyncio.Event()
        """Set while there is a session: for tests and drains."""

    @property
    def client(self) -> StoreClient | None:
        """The session, if the store can be used now."""
        return self._client if time.monotonic() >= self._paused_until else None

    def pause(self) -> None:
        """It did not answer in time."""
        self._paused_until = time.monotonic() + PAUSE_S

    def start(self) -> None:
        self._running = asyncio.create_task(self._run())

    async def stop(self) -> None:
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
        await self._channel.close()

    async def _run(self) -> None:
        retry_s = FIRST_RETRY_S
        while True:
            try:
                client = await StoreClient.attach(
                    self._channel, self._worker_id, block_bytes=self._pool.block_bytes, alive_segment=self._pool.name
                )
                retry_s = FIRST_RETRY_S
                await self._hold(client)
            except PdserveError as error:
                level = logging.DEBUG if retry_s > FIRST_RETRY_S else logging.WARNING
                log.log(level, "no KV store: %s", error.message, extra={"reason": error.reason, "store": self.address})
            except Exception as error:
                log.error("attaching to the KV store failed", exc_info=error)  # and is tried again
            await asyncio.sleep(retry_s)
            retry_s = min(2 * retry_s, LAST_RETRY_S)

    async def _hold(self, client: StoreClient) -> None:
        """Until the session ends."""
        log.info("attached to the KV store", extra={"store": self.address, "node": client.attached.node})
        self._client, self._paused_until = client, 0.0
        self._metrics.store_attached.set(1)
        self.attached.set()
        try:
            await asyncio.wait([client.lost])
        finally:
            self._client = None
            self._metrics.store_attached.set(0)
            self.attached.clear()
            await client.close()
        log.warning("the KV store is gone: going on without", extra={"store": self.address})
