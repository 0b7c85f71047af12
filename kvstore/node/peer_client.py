"""A client of another node's store: looked up over gRPC with a lease, read from its pool by transport.

Reads are those of a hand-over (`kvstore.handover.verify`): generations before and after, every block's digest. Writing
is for a store's own node only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from kvstore.handover.verify import DigestPolicy, PoolDescriptor, pull_blocks
from kvstore.node.client_session import AttachStream, ClientSession, open_session
from kvstore.transports.base import Peer, Transport
from kvstore.transports.registry import select
from kvstore.transports.segment import host_id
from kvstore.transports.shm import SharedMemoryPool
from pdserve.engine.base import ImportTarget
from pdserve.rpc import Channel
from pdserve.types import KVManifest
from pdserve.wire import store as wire


class PeerStoreClient(ClientSession):
    """Made by `attach`. `transport` is what its bytes come by."""

    def __init__(
        self, channel: Channel, attached: wire.Attached, stream: AttachStream, peer: Peer,
        memory: PoolDescriptor,
        transport: str,
    ) -> None:  # fmt: skip
        super().__init__(channel, attached, stream)
        self._peer = peer
        self._memory = memory
        self.transport = transport

    @classmethod
    async def attach(
        cls, channel: Channel, client: str, transports: Mapping[str, Transport], *, block_bytes: int
    ) -> PeerStoreClient:
        """`transports`: this process's, in order of preference.

        Raises `FingerprintMismatch` (other block size), `TicketRefused`, `HandoverError` (no common transport),
        `PeerLost`, `WorkerLost`.
        """
        attached, stream = await open_session(channel, wire.Attach(client, host_id(), block_bytes))
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
        await super().close()

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
