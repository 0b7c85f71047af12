"""A client's session with a store: what reading takes, whether the store is on this node or on another one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from pdserve.errors import WorkerLost
from pdserve.rpc import Channel
from pdserve.wire import store as wire

CALL_TIMEOUT_S = 5.0
"""Of a control call; the store answers in well under a millisecond, a promotion from disk in some tens."""

AttachStream = AsyncGenerator[wire.Attached, None]


async def open_session(channel: Channel, request: wire.Attach) -> tuple[wire.Attached, AttachStream]:
    """The store's answer, and the stream whose end is the session's. Raises `FingerprintMismatch` (other block size),
    `TicketRefused`, `WorkerLost`."""
    stream = channel.stream(wire.ATTACH, request)
    assert isinstance(stream, AsyncGenerator)
    attached = await anext(stream, None)
    if attached is None:
        raise WorkerLost("the store closed the session at once: it is going away")
    return attached, stream


class ClientSession:
    """`lost` is done when the session has ended: attach again, the store may be a new one."""

    def __init__(self, channel: Channel, attached: wire.Attached, stream: AttachStream) -> None:
        self._channel = channel
        self.attached = attached
        self.lost = asyncio.get_running_loop().create_task(_until_end(stream))

    async def close(self) -> None:
        """End the session. Leases and reservations that are still held end by time: release them first."""
        self.lost.cancel()
        await asyncio.gather(self.lost, return_exceptions=True)

    async def lookup(
        self,
        keys: Sequence[bytes],
        fingerprint: bytes,
        *,
        tenant: str = "",
        extends: bool = False,
        traceparent: str = "",
    ) -> wire.Found:
        """The longest prefix that is there, leased. `release` it after the bytes were read. `traceparent`: of the
        request that it is for."""
        request = wire.Lookup(
            self.attached.session, fingerprint, tuple(keys), tenant, extends=extends, traceparent=traceparent
        )
        return await self._channel.call(wire.LOOKUP, request, timeout_s=CALL_TIMEOUT_S)

    async def renew(self, found: wire.Found) -> float:
        """Seconds that the lease lasts. Raises `TicketRefused` when it has ended."""
        request = wire.RenewLease(self.attached.session, found.lease_id)
        return (await self._channel.call(wire.RENEW_LEASE, request, timeout_s=CALL_TIMEOUT_S)).lease_ms / 1000

    async def release(self, found: wire.Found) -> None:
        if found.lease_id:
            request = wire.ReleaseLease(self.attached.session, found.lease_id)
            await self._channel.call(wire.RELEASE_LEASE, request, timeout_s=CALL_TIMEOUT_S)


async def _until_end(stream: AttachStream) -> None:
    """Raises what ended the session, if it was an error."""
    try:
        async for _ in stream:
            pass
    finally:
        await stream.aclose()
