"""Where a prompt's blocks can be fetched from: the node's own store, and stores of other nodes that a router names.

A `Find` is what one source has of one prompt, leased: read any part of it, then release it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from kvstore.handover.verify import DigestPolicy
from kvstore.node.peer_client import PeerStoreClient
from kvstore.transports.registry import SAME_HOST_ONLY
from pdserve.errors import HandoverError, PdserveError
from pdserve.rpc import Channel, Tls
from pdserve.wire.store import Found
from worker_core.memory_port import MemoryPort
from worker_core.store_link import PAUSE_S

RENEWALS = 3
"""Within a lease."""
IDLE_S = 900.0
"""A peer that no router has named for so long is let go: its channel, its session, its connected memory. Three times
as long as any lease: whoever still reads would have to go on without one."""

log = logging.getLogger("pdserve.worker")


class StoreSession(Protocol):
    """What `StoreClient` and `PeerStoreClient` have in common."""

    async def renew(self, found: Found) -> float: ...
    async def release(self, found: Found) -> None: ...


Reader = Callable[[Found, Sequence[int], Callable[[], bool]], object]
"""Fills blocks of the engine's pool; blocks the calling thread; raises a `PdserveError`, and the blocks are garbage."""


@dataclass(frozen=True, slots=True)
class Find:
    """The leading blocks of a prompt that a source has."""

    tier: str
    """dram or peer: for metrics and for what a read costs."""
    source: str
    """Whose bandwidth it is."""
    found: Found
    session: StoreSession
    reader: Reader
    lease_s: float

    def __len__(self) -> int:
        return len(self.found.slots)

    def num_from_disk(self, blocks: range) -> int:
        """How many of these the node's own store has just brought up: they are the chain's last ones. What a peer had
        on disk is the peer's matter."""
        up = len(self) - self.found.promoted if self.tier == "dram" else len(self)
        return len(range(max(blocks.start, up), blocks.stop))

    def read(self, first: int, blocks: Sequence[int], should_stop: Callable[[], bool]) -> None:
        """Bring found blocks `first` and on into these blocks of the engine's pool."""
        found, end = self.found, first + len(blocks)
        part = replace(
            found,
            slots=found.slots[first:end],
            generations=found.generations[first:end],
            digests=found.digests[first:end],
        )
        self.reader(part, blocks, should_stop)

    async def keep(self) -> None:
        """Renew the lease until cancelled, or until it can't be: then the fences tell what was lost."""
        while True:
            await asyncio.sleep(self.lease_s / RENEWALS)
            try:
                await self.session.renew(self.found)
            except PdserveError as error:
                log.info("a lease ended early", extra={"reason": error.reason})
                return

    async def release(self) -> None:
        """Best effort: the lease ends by itself."""
        try:
            await self.session.release(self.found)
        except PdserveError as error:
            log.debug("a lease was not released", extra={"reason": error.reason})


@dataclass(slots=True)
class _Peer:
    channel: Channel
    client: PeerStoreClient | None = None
    attaching: asyncio.Task[PeerStoreClient] | None = None
    paused_until: float = 0.0
    named: float = 0.0
    """When it was last asked."""


class PeerStores:
    """Sessions with other nodes' stores, made at the first use. `policy` is for those that share memory; what came
    over a wire has every digest checked."""

    def __init__(self, worker_id: str, port: MemoryPort, tls: Tls | None, policy: DigestPolicy) -> None:
        self._worker_id = worker_id
        self._port = port
        self._pool = port.pool
        self._tls = tls
        self._policy = policy
        self._peers: dict[str, _Peer] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """Peers with a channel."""
        return len(self._peers)

    def available(self, address: str) -> bool:
        peer = self._peers.get(address)
        return peer is None or time.monotonic() >= peer.paused_until

    def pause(self, address: str) -> None:
        """It failed: not again for a while."""
        peer = self._peers.get(address)
        if peer is not None:
            peer.paused_until = time.monotonic() + PAUSE_S

    async def find(self, address: str, keys: Sequence[bytes], fingerprint: bytes, traceparent: str = "") -> Find:
        """Raises a `PdserveError`."""
        client = await self._client(address)
        found = await client.lookup(keys, fingerprint, traceparent=traceparent)
        if not len(found.slots) == len(found.generations) == len(found.digests) <= len(keys):
            raise HandoverError("the peer's store answered with columns that do not fit the prompt")
        policy = self._policy if client.transport in SAME_HOST_ONLY else DigestPolicy()

        def read(part: Found, blocks: Sequence[int], should_stop: Callable[[], bool]) -> None:
            client.read(part, self._pool, blocks, policy, should_stop)

        return Find("peer", address, found, client, read, client.attached.lease_ms / 1000)

    async def _client(self, address: str) -> PeerStoreClient:
        peer = self._peers.get(address)
        if peer is None:
            peer = self._peers[address] = _Peer(Channel(address, tls=self._tls))
            self._arm()
        peer.named = time.monotonic()
        if peer.client is not None and not peer.client.lost.done():
            return peer.client
        if peer.client is not None:
            gone, peer.client = peer.client, None
            await gone.close()
        if peer.attaching is None:
            peer.attaching = asyncio.create_task(self._attach(peer))
        try:
            return await asyncio.shield(peer.attaching)
        finally:
            if peer.attaching is not None and peer.attaching.done():
                peer.attaching = None

    async def _attach(self, peer: _Peer) -> PeerStoreClient:
        self._port.refresh_tls()
        peer.client = await PeerStoreClient.attach(
            peer.channel, self._worker_id, self._port.transports, block_bytes=self._pool.block_bytes
        )
        return peer.client

    def _arm(self) -> None:
        if self._timer is None and self._peers:
            self._timer = asyncio.get_running_loop().call_later(IDLE_S / 2, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.let_go(time.monotonic() - IDLE_S)
        self._arm()

    def let_go(self, named_before: float) -> None:
        """Close what was last asked before this time (`time.monotonic`)."""
        for address in [address for address, peer in self._peers.items() if peer.named <= named_before]:
            closing = asyncio.create_task(_close(self._peers.pop(address)))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        self.let_go(math.inf)
        if self._timer is not None:
            self._timer.cancel()
        await asyncio.gather(*self._closing, return_exceptions=True)


async def _close(peer: _Peer) -> None:
    if peer.attaching is not None:
        peer.attaching.cancel()
        await asyncio.gather(peer.attaching, return_exceptions=True)
    if peer.client is not None:
        await peer.client.close()
    await peer.channel.close()
