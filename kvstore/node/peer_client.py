"""A client of another node's store: looked up over gRPC with a lease, read from its pool by transport.

Reads are those of a hand-over (`kvstore.handover.verify`): generations before and after, every block's digest. Writing
is for a store's own node only.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

from kvstore.handover.verify import DigestPolicy, PoolDescriptor, pull_blocks
from kvstore.transports.base import Peer, Transport
from kvstore.transports.registry import select
from kvstore.transports.segment import host_id
from kvstore.transports.shm import SharedMemoryPool
from pdserve.engine.base import ImportTarget
from pdserve.errors import WorkerLost
from pdserve.rpc import Channel
from pdserve.types import KVManifest
from pdserve.wire import store as wire

CALL_TIMEOUT_S = 5.0


class PeerStoreClient:
    """Made by `attach`. `lost` is done when the session has ended; `transport` is what its bytes come by."""

    def __init__(
        self, channel: Channel, attached: wire.Attached, stream: AsyncGenerator[wire.Attached, None], peer: Peer,
        memory: PoolDescriptor,
        transport: str,
    ) -> None:  # fmt: skip
        self._channel = channel
        self.attached = attached
        self._peer = peer
        self._memory = memory
        self.transport = transport
        self.lost = asyncio.get_running_loop().create_task(_until_end(stream))

    @classmethod
    async def attach(
        cls, channel: Channel, client: str, transports: Mapping[str, Transport], *, block_bytes: int
    ) -> PeerStoreClient:
        """`transports`: this process's, in order of preference.

        Raises `FingerprintMismatch` (other block size), `TicketRefused`, `HandoverError` (no common transport),
        `PeerLost`, `WorkerLost`.
        """
        stream = channel.stream(wire.ATTACH, wire.Attach(client, host_id(), block_bytes))
        assert isinstance(stream, AsyncGenerator)
        attached = await anext(stream, None)
        if attached is None:
            raise WorkerLost("the store closed the session at once: it is going away")
        try:
            name = select(tuple(transports), attached.memory, same_host=bool(attached.segment))
            memory = PoolDescriptor.decode(attached.memory[name])
            peer = await asyncio.to_thread(transports[name].connect, memory.region)
        except BaseException:
            await stream.aclose()
            raise
        return cls(channel, attached, stream, peer, memory, name)

    async def close(self) -> None:
        """End the session; reads under way raise `PeerLost`."""
        self._peer.close()
        self.lost.cancel()
        await asyncio.gather(self.lost, return_exceptions=True)

    async def lookup(self, keys: Sequence[bytes], fingerprint: bytes, *, extends: bool = False) -> wire.Found:
        """The longest prefix that is there, leased. `release` it after the read."""
        request = wire.Lookup(self.attached.session, fingerprint, tuple(keys), extends=extends)
        return await self._channel.call(wire.LOOKUP, request, timeout_s=CALL_TIMEOUT_S)

    async def renew(self, found: wire.Found) -> float:
        """Seconds that the lease lasts. Raises `TicketRefused` when it has ended."""
        request = wire.RenewLease(self.attached.session, found.lease_id)
        return (await self._channel.call(wire.RENEW_LEASE, request, timeout_s=CALL_TIMEOUT_S)).lease_ms / 1000

    async def release(self, found: wire.Found) -> None:
        if found.lease_id:
            request = wire.ReleaseLease(self.attached.session, found.lease_id)
            await self._channel.call(wire.RELEASE_LEASE, request, timeout_s=CALL_TIMEOUT_S)

    def read(
        self,
        found: wire.Found,
        into: SharedMemoryPool,
        blocks: Sequence[int],
        policy: DigestPolicy,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Fill `blocks` of `into` with what was found. Blocks the calling thread; raises as `pull_blocks` does."""
        manifest = KVManifest(0, 0, 0, found.slots, found.generations, found.digests, final=True)
        pull_blocks(self._peer, self._memory, manifest, into, ImportTarget(tuple(blocks)), policy, should_stop)


async def _until_end(stream: AsyncGenerator[wire.Attached, None]) -> None:
    """Raises what ended the session, if it was an error."""
    try:
        async for _ in stream:
            pass
    finally:
        await stream.aclose()
