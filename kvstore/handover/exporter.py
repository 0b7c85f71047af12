"""The exporter's side of every hand-over on a prefill worker: who may read what, and until when.

Pure bookkeeping: events in, actions out, time from an injected clock. The worker carries the actions out (`Announce`
to the router, the others to the engine) and calls `tick` about once a second. Nothing here blocks.

Every wait ends by itself. Prefill that exports nothing for `compute_s`; a ticket that nobody binds, and a bound one
whose decode worker neither renews nor releases, for `lease_s`; a complete prompt still held after `hold_s`, however
often it is renewed: each ends in `CancelRequest` and `Expired`. Blocks may be freed while a peer reads them: the
generation that grows with their next owner fences the reader off.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvstore.handover.chunk import Chunk, ChunkState, request_state
from kvstore.handover.ticket import Clock, ticket_id
from pdserve.engine.base import ExportedChunk
from pdserve.errors import FingerprintMismatch, HandoverError, TicketRefused, TransferTimeout
from pdserve.types import KVManifest, KVTicket, ParallelRank


@dataclass(frozen=True, slots=True)
class ExportLimits:
    """How long an exporter holds on, in seconds."""

    lease_s: float = 30.0
    """A ticket unbound, or bound but silent. Importers renew at a third of it, so two lost renewals are survived;
    30 s is also what vLLM's NIXL connector uses."""
    compute_s: float = 600.0
    """Between two chunks of one prompt, its wait in the queue included."""
    hold_s: float = 300.0
    """After the last chunk, whatever is renewed."""


@dataclass(frozen=True, slots=True)
class Announce:
    """Send to the router; the ticket comes with the first of a request only."""

    handle: int
    ticket: KVTicket | None
    manifest: KVManifest


@dataclass(frozen=True, slots=True)
class ReleaseBlocks:
    """`engine.export_release(handle, chunk_index)`; None: all of them."""

    handle: int
    chunk_index: int | None


@dataclass(frozen=True, slots=True)
class CancelRequest:
    """`engine.cancel(handle)`: all its blocks are freed now."""

    handle: int


@dataclass(frozen=True, slots=True)
class Expired:
    """Tell the router that this request failed here. `CancelRequest` comes with it."""

    handle: int
    error: HandoverError


ExportAction = Announce | ReleaseBlocks | CancelRequest | Expired


@dataclass(slots=True)
class _Export:
    """One request's hand-over, seen from here."""

    handle: int
    ticket: KVTicket
    lease_until: float
    last_export: float
    chunks: list[Chunk] = field(default_factory=list)
    bound_to: tuple[str, int] | None = None
    completed_at: float | None = None
    announced: bool = False
    unwanted: bool = False
    """Nothing of it will be read any more; prefill may still be at work for its first token."""

    @property
    def done(self) -> bool:
        return self.completed_at is not None and request_state(self.chunks) is ChunkState.FREED

    def deadline(self, limits: ExportLimits) -> float:
        """When it expires if nothing happens."""
        if self.completed_at is not None:
            return min(self.lease_until, self.completed_at + limits.hold_s)
        computing = self.last_export + limits.compute_s
        return computing if self.bound_to is None or self.unwanted else min(self.lease_until, computing)


class ExportLedger:
    """All hand-overs out of one worker. Not thread-safe: one thread owns it."""

    def __init__(
        self,
        worker_id: str,
        incarnation: int,
        fingerprint: bytes,
        address: str,
        *,
        clock: Clock,
        limits: ExportLimits | None = None,
        rank: ParallelRank | None = None,
        make_nonce: Callable[[], bytes] = lambda: secrets.token_bytes(16),
    ) -> None:
        self._worker_id, self._incarnation = worker_id, incarnation
        self._fingerprint, self._address = fingerprint, address
        self._clock = clock
        self._limits = limits or ExportLimits()
        self._rank = rank or ParallelRank()
        self._make_nonce = make_nonce
        self._by_handle: dict[int, _Export] = {}
        self._by_nonce: dict[bytes, _Export] = {}

    def __len__(self) -> int:
        """Requests that are computed for, or held for, a decode worker: a drain waits until it is 0."""
        return len(self._by_handle)

    def __contains__(self, handle: int) -> bool:
        return handle in self._by_handle

    def state(self, handle: int) -> ChunkState:
        """Raises `KeyError` for an unknown handle."""
        return request_state(self._by_handle[handle].chunks)

    @property
    def lease_ms(self) -> int:
        return int(self._limits.lease_s * 1000)

    def open(self, handle: int, request_id: str, num_prompt_tokens: int) -> KVTicket:
        """A request to prefill was taken: make its ticket. Raises `ValueError` for a handle that is open."""
        if handle in self._by_handle:
            raise ValueError(f"handle {handle} is open already")
        ticket = KVTicket(
            request_id=request_id,
            worker_id=self._worker_id,
            incarnation=self._incarnation,
            nonce=self._make_nonce(),
            fingerprint=self._fingerprint,
            address=self._address,
            lease_ms=self.lease_ms,
            num_prompt_tokens=num_prompt_tokens,
            rank=self._rank,
        )
        now = self._clock()
        export = _Export(handle, ticket, now + self._limits.lease_s, now)
        self._by_handle[handle] = self._by_nonce[ticket.nonce] = export
        _begin_chunk(export)
        return ticket

    def exported(self, chunk: ExportedChunk, digests: Sequence[bytes]) -> list[ExportAction]:
        """The engine finished a chunk; `digests` are its blocks' (`verify.digest_blocks`)."""
        export = self._by_handle.get(chunk.handle)
        if export is None:  # cancelled or expired while the step ran
            return [ReleaseBlocks(chunk.handle, chunk.chunk_index)]
        now = self._clock()
        current = export.chunks[-1]
        if current.index != chunk.chunk_index:
            raise RuntimeError(f"chunk {chunk.chunk_index} came where {current.index} was due")
        current.to(ChunkState.EXPORTED)
        export.last_export = now
        if chunk.final:
            export.completed_at = now
        else:
            _begin_chunk(export)
        if export.unwanted:
            return self._free(export, [current])
        if export.bound_to is None:
            export.lease_until = now + self._limits.lease_s
        else:
            current.to(ChunkState.PULLING)
        return [_announce(export, chunk, digests)]

    def bind(
        self,
        nonce: bytes,
        exporter_incarnation: int,
        decode_worker_id: str,
        decode_incarnation: int,
        fingerprint: bytes,
    ) -> int:
        """A decode worker wants to start pulling; the first one binds. Returns the lease in ms. Idempotent.

        Raises `TicketRefused` (unknown, expired, another incarnation's, bound by another), `FingerprintMismatch`.
        """
        export = self._known(nonce)
        if exporter_incarnation != self._incarnation:
            raise TicketRefused("the ticket is an earlier incarnation's of this worker: prefill again")
        if fingerprint != self._fingerprint:
            raise FingerprintMismatch("the KV layouts of the two workers differ: serve the same model and dtype")
        decode = (decode_worker_id, decode_incarnation)
        if export.bound_to not in (None, decode):
            raise TicketRefused("the ticket is bound by another decode worker")
        export.bound_to = decode
        export.lease_until = self._clock() + self._limits.lease_s
        for chunk in export.chunks:
            if chunk.state is ChunkState.EXPORTED:
                chunk.to(ChunkState.PULLING)
        return self.lease_ms

    def renew(self, nonce: bytes) -> int:
        """Extend the lease; returns it in ms. Raises `TicketRefused`."""
        export = self._known(nonce)
        export.lease_until = self._clock() + self._limits.lease_s
        return self.lease_ms

    def release(self, nonce: bytes, chunk_indexes: Sequence[int] | None = None) -> list[ExportAction]:
        """The decode worker owns these chunks; None: it wants nothing more of the request. Idempotent; an unknown
        ticket is ignored (its request has ended)."""
        export = self._by_nonce.get(nonce)
        if export is None:
            return []
        export.lease_until = self._clock() + self._limits.lease_s
        held = [c for c in export.chunks if ChunkState.EXPORTED <= c.state < ChunkState.FREED]
        if chunk_indexes is None:
            export.unwanted = True
            del self._by_nonce[nonce]
            return self._free(export, held)
        owned = [c for c in held if c.index in set(chunk_indexes)]
        for chunk in owned:
            if chunk.state is ChunkState.PULLING:
                chunk.to(ChunkState.OWNED)
        return self._free(export, owned)

    def cancel(self, handle: int) -> list[ExportAction]:
        """The router cancelled, or the engine failed the request. A reader is fenced off by the generations."""
        export = self._by_handle.get(handle)
        if export is None:
            return []
        self._forget(export)
        return [CancelRequest(handle)]

    def tick(self) -> list[ExportAction]:
        """End whatever has waited too long."""
        now = self._clock()
        actions: list[ExportAction] = []
        for export in [e for e in self._by_handle.values() if e.deadline(self._limits) <= now]:
            actions += [*self.cancel(export.handle), Expired(export.handle, _why_expired(export))]
        return actions

    def _known(self, nonce: bytes) -> _Export:
        export = self._by_nonce.get(nonce)
        if export is None or export.deadline(self._limits) <= self._clock():
            raise TicketRefused("the ticket is unknown here or has expired: prefill again")
        return export

    def _free(self, export: _Export, chunks: Sequence[Chunk]) -> list[ExportAction]:
        for chunk in chunks:
            chunk.to(ChunkState.FREED)
        if export.done:
            self._forget(export)
        return [ReleaseBlocks(export.handle, chunk.index) for chunk in chunks]

    def _forget(self, export: _Export) -> None:
        for chunk in export.chunks:
            if chunk.state is not ChunkState.FREED:
                chunk.to(ChunkState.FREED)
        del self._by_handle[export.handle]
        self._by_nonce.pop(export.ticket.nonce, None)


def _begin_chunk(export: _Export) -> None:
    chunk = Chunk(len(export.chunks))
    chunk.to(ChunkState.COMPUTING)
    export.chunks.append(chunk)


def _announce(export: _Export, chunk: ExportedChunk, digests: Sequence[bytes]) -> Announce:
    manifest = KVManifest(
        chunk_index=chunk.chunk_index,
        first_token=chunk.first_token,
        num_tokens=chunk.num_tokens,
        blocks=chunk.blocks,
        generations=chunk.generations,
        digests=tuple(digests),
        final=chunk.final,
        rank=export.ticket.rank,
        ticket_id=ticket_id(export.ticket.nonce),
    )
    ticket = None if export.announced else export.ticket
    export.announced = True
    return Announce(export.handle, ticket, manifest)


def _why_expired(export: _Export) -> HandoverError:
    if export.completed_at is None and (export.bound_to is None or export.unwanted):
        return TransferTimeout("prefill exported nothing within its bound", leg="prefill")
    if export.bound_to is None:
        return TransferTimeout("no decode worker came for the KV before the ticket's lease ended")
    return TransferTimeout(f"decode worker {export.bound_to[0]} neither renewed nor released its KV in time")
