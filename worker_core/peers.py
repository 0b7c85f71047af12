"""Connections to prefill workers: a gRPC channel for control and a transport peer for bytes, each made once."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from kvstore.handover.verify import DigestPolicy, PoolDescriptor
from kvstore.transports.base import Peer
from pdserve.errors import HandoverError, PdserveError, PeerLost
from pdserve.rpc import Channel, Tls
from pdserve.types import KVTicket
from pdserve.wire.handover import Bound
from worker_core.memory_port import MemoryPort

CLOSE_GRACE_S = 10.0
"""For calls under way to an exporter that has restarted; each has a shorter bound of its own."""


@dataclass(frozen=True, slots=True)
class Source:
    """One exporter's memory, ready to be read."""

    transport: str
    peer: Peer
    memory: PoolDescriptor
    policy: DigestPolicy


@dataclass(frozen=True, slots=True)
class _SourceKey:
    worker_id: str
    incarnation: int
    transport: str
    memory: bytes


class Peers:
    """All exporters that this worker has met. Reads of one exporter share one peer."""

    def __init__(self, port: MemoryPort, policies: Mapping[str, DigestPolicy], tls: Tls | None) -> None:
        self._port = port
        self._policies = policies
        self._tls = tls
        self._channels: dict[str, tuple[int, Channel]] = {}
        """By address, with the newest incarnation met there."""
        self._closing: set[asyncio.Future[None]] = set()
        self._sources: dict[_SourceKey, asyncio.Future[Source]] = {}

    def channel(self, ticket: KVTicket) -> Channel:
        """To the ticket's exporter. One that restarted gets a new channel: the old one may wait out a back-off yet."""
        known = self._channels.get(ticket.address)
        if known is not None and known[0] >= ticket.incarnation:
            return known[1]
        if known is not None:
            closing = asyncio.ensure_future(known[1].close(CLOSE_GRACE_S))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
        channel = Channel(ticket.address, tls=self._tls)
        self._channels[ticket.address] = ticket.incarnation, channel
        return channel

    async def connect(self, ticket: KVTicket, bound: Bound) -> Source:
        """The exporter's memory, connected at the first call. Raises `PeerLost`, `HandoverError`."""
        key = _SourceKey(ticket.worker_id, ticket.incarnation, bound.transport, bound.memory)
        connecting = self._sources.get(key)
        if connecting is None:
            self._drop_older(key)
            connecting = asyncio.ensure_future(self._connect(key))
            self._sources[key] = connecting
        try:
            return await asyncio.shield(connecting)
        except asyncio.CancelledError:
            if not connecting.cancelled():
                raise
            raise PeerLost("the exporter was lost while it was being met") from None
        except Exception as error:
            if self._sources.get(key) is connecting:
                del self._sources[key]  # tried anew by the next request
            if isinstance(error, PdserveError):
                raise
            raise HandoverError(f"connecting failed: {type(error).__name__}: {error}") from error

    async def _connect(self, key: _SourceKey) -> Source:
        self._port.refresh_tls()
        transport = self._port.transports.get(key.transport)
        if transport is None:
            raise HandoverError(f"the exporter chose the transport {key.transport!r}, which this worker has not")
        memory = PoolDescriptor.decode(key.memory)
        loop = asyncio.get_running_loop()
        peer = await loop.run_in_executor(None, transport.connect, memory.region)  # not behind, nor before, pulls
        return Source(key.transport, peer, memory, self._policies.get(key.transport, DigestPolicy()))

    def _drop_older(self, key: _SourceKey) -> None:
        """An exporter that restarted is another one: whatever was learnt of the older is void."""
        for known in [k for k in self._sources if k.worker_id == key.worker_id and k.incarnation != key.incarnation]:
            _close(self._sources.pop(known))

    def drop(self, ticket: KVTicket) -> None:
        """The exporter is lost: connect anew next time."""
        for known in [k for k in self._sources if k.incarnation == ticket.incarnation]:
            if known.worker_id == ticket.worker_id:
                _close(self._sources.pop(known))

    async def close(self) -> None:
        for connecting in self._sources.values():
            _close(connecting)
        self._sources.clear()
        for _, channel in self._channels.values():
            await channel.close()
        for closing in self._closing:
            closing.cancel()
        await asyncio.gather(*self._closing, return_exceptions=True)


def _close(connecting: asyncio.Future[Source]) -> None:
    if not connecting.done():
        connecting.cancel()
    elif not connecting.cancelled() and connecting.exception() is None:
        connecting.result().peer.close()
