"""A client of the store on its own node: calls by gRPC, bytes by the pool's shared memory.

A worker looks a prompt's keys up before prefill, copies the hits into its engine's blocks, and puts the blocks that
it filled. Reads are fenced: generations equal to the look-up's before *and after* the copy prove that no slot got a new
owner in between, so that a lease which lapsed costs a recompute and never a wrong block.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvstore.handover.verify import DigestPolicy, digest_policy
from kvstore.node.client_session import CALL_TIMEOUT_S, AttachStream, ClientSession, open_session
from kvstore.node.entries import Status
from kvstore.ranges import coalesce
from kvstore.transports.segment import host_id
from kvstore.transports.shm import SharedMemoryPool
from pdserve.errors import DigestMismatch, PeerLost, StaleBlock
from pdserve.rpc import Channel
from pdserve.wire import store as wire

STEP_BYTES = 1 << 20
"""Copied before it is digested: it lies in the second-level cache then, and is not fetched from memory twice."""


class StoreClient(ClientSession):
    """Made by `attach`."""

    def __init__(self, channel: Channel, attached: wire.Attached, stream: AttachStream) -> None:
        self.pool = _map_pool(attached.segment)
        super().__init__(channel, attached, stream)

    @classmethod
    async def attach(
        cls, channel: Channel, client: str, *, block_bytes: int = 0, alive_segment: str = ""
    ) -> StoreClient:
        """`alive_segment`: a segment that this process owns (its engine's pool); without it the store must keep slots
        of a writer that went silent out of use for minutes.

        Raises `FingerprintMismatch` (other block size), `TicketRefused`, `PeerLost` (not on this host), `WorkerLost`.
        """
        request = wire.Attach(client, host_id(), block_bytes, alive_segment)
        attached, stream = await open_session(channel, request)
        if not attached.segment:
            await stream.aclose()
            raise PeerLost("the store's memory is on another host")
        try:
            return cls(channel, attached, stream)
        except BaseException:
            await stream.aclose()
            raise

    async def close(self) -> None:
        await super().close()
        self.pool.close()

    # ---- reading ----

    def read(
        self, found: wire.Found, into: NDArray[np.uint8], blocks: Sequence[int], policy: DigestPolicy | None = None
    ) -> int:
        """Copy `found` into rows `blocks` of `into` (shape [n, block_bytes], C-contiguous); returns in how many runs
        they lie, on both sides.

        Blocks the calling thread. When it raises, those rows' content is undefined: `StaleBlock` (reused while it was
        read), `DigestMismatch`, `PeerLost` (the store died).
        """
        self.pool.check_alive()
        expected = np.array(found.generations, np.uint64)
        slots = list(found.slots)
        self._check_generations(slots, expected)
        flat, chosen = into.reshape(-1), set((policy or digest_policy("shm")).chosen(len(slots)))
        wrong: list[int] = []
        for step in self._steps(len(slots)):
            for r in coalesce(slots[step], blocks[step], self.pool.block_bytes):
                flat[r.local : r.local + r.length] = self.pool.region[r.remote : r.remote + r.length]
            indexes = chosen.intersection(range(step.start, step.stop))
            wrong += [i for i in indexes if xxhash.xxh3_128_digest(into[blocks[i]]) != found.digests[i]]
        self._check_generations(slots, expected)
        self.pool.check_alive()
        if wrong:
            raise DigestMismatch(f"block {min(wrong)} of {len(slots)} differs from what was stored: recompute it")
        return len(coalesce(slots, blocks, self.pool.block_bytes))

    def _steps(self, count: int) -> list[slice]:
        """`count` blocks in pieces of `STEP_BYTES`, one block at least."""
        size = max(1, STEP_BYTES // self.pool.block_bytes)
        return [slice(start, min(count, start + size)) for start in range(0, count, size)]

    def _check_generations(self, slots: Sequence[int], expected: NDArray[np.uint64]) -> None:
        stale = np.flatnonzero(self.pool.generations[slots] != expected)
        if stale.size:
            raise StaleBlock(f"{stale.size} of {len(slots)} blocks were given to others: look them up again")

    # ---- writing ----

    async def reserve(
        self,
        keys: Sequence[bytes],
        fingerprint: bytes,
        *,
        tenant: str = "",
        extends: bool = False,
        traceparent: str = "",
    ) -> wire.Reserved:
        """Slots for what is missing of a whole chain. Raises `QuotaExceeded`, `Draining`."""
        request = wire.Reserve(self.attached.session, fingerprint, tuple(keys), tenant, extends, traceparent)
        return await self._channel.call(wire.RESERVE, request, timeout_s=CALL_TIMEOUT_S)

    def write(self, reserved: wire.Reserved, source: NDArray[np.uint8], blocks: Sequence[int]) -> tuple[bytes, ...]:
        """Copy to the reserved slots; `blocks[i]` is the row of `source` for the chain's i-th block. Returns the
        digests to commit. Blocks the calling thread. Raises `PeerLost`."""
        rows = [block for block, status in zip(blocks, reserved.statuses, strict=True) if status == Status.RESERVED]
        return self.write_slots(reserved.slots, source, rows)

    def write_slots(self, slots: Sequence[int], source: NDArray[np.uint8], rows: Sequence[int]) -> tuple[bytes, ...]:
        """The same for the leading ones of a reservation's slots: `rows[i]` of `source` goes to `slots[i]`."""
        flat, digests = source.reshape(-1), list[bytes]()
        self.pool.check_alive()
        for step in self._steps(len(rows)):
            for r in coalesce(rows[step], slots[step], self.pool.block_bytes):
                self.pool.region[r.local : r.local + r.length] = flat[r.remote : r.remote + r.length]
            digests += [xxhash.xxh3_128_digest(source[row]) for row in rows[step]]
        return tuple(digests)

    async def commit(self, reserved: wire.Reserved, digests: Sequence[bytes], traceparent: str = "") -> int:
        """How many became visible. Raises `TicketRefused` (it lapsed), `DigestMismatch`."""
        request = wire.Commit(self.attached.session, reserved.reservation_id, tuple(digests), traceparent)
        return (await self._channel.call(wire.COMMIT, request, timeout_s=CALL_TIMEOUT_S)).committed

    async def abort(self, reserved: wire.Reserved) -> None:
        """This process writes to those slots no more."""
        if reserved.reservation_id:
            request = wire.Abort(self.attached.session, reserved.reservation_id)
            await self._channel.call(wire.ABORT, request, timeout_s=CALL_TIMEOUT_S)

    async def abort_all(self, session: bytes) -> None:
        """The same for whatever this session of ours, perhaps an ended one, had reserved: its answers were lost.
        Raises `TicketRefused` when it holds nothing (any more)."""
        await self._channel.call(wire.ABORT, wire.Abort(session, 0), timeout_s=CALL_TIMEOUT_S)

    async def put(
        self,
        keys: Sequence[bytes],
        fingerprint: bytes,
        source: NDArray[np.uint8],
        blocks: Sequence[int],
        *,
        tenant: str = "",
        extends: bool = False,
    ) -> int:
        """Reserve, copy in a thread, commit; returns how many blocks were new. `source` must not change meanwhile."""
        reserved = await self.reserve(keys, fingerprint, tenant=tenant, extends=extends)
        if not reserved.reservation_id:
            return 0
        writing = asyncio.ensure_future(asyncio.to_thread(self.write, reserved, source, blocks))
        try:
            digests = await asyncio.shield(writing)
        except BaseException:
            await asyncio.wait([writing])  # also when cancelled: an abort promises that nothing writes any more
            await self.abort(reserved)
            raise
        return await self.commit(reserved, digests)


def _map_pool(segment: str) -> SharedMemoryPool:
    pool = SharedMemoryPool.attach(segment)
    try:
        pool.populate()
    except BaseException:
        pool.close()
        raise
    return pool
