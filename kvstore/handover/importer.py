"""The importer's side of every hand-over on a decode worker: from a ticket to a request that can decode.

Pure bookkeeping, like `exporter`: events in, actions out. Messages may be lost, doubled, late or out of order; the
ledger acts on each fact once. One request goes through these steps, chunk by chunk, while prefill computes the rest:

    relay (ticket, manifests) -> Reserve -> reserved -> Bind -> bound -> Pull -> pulled -> Commit ... -> Resume

Pulls wait for credits: at most `max_bytes_in_flight` for the whole worker, requests taking turns. It fails closed: any
error ends the request (`Failed`), tells the exporter, and frees the local blocks, but only after the last pull that
writes into them has ended (`FreeLocal`).

Prefill may be retried elsewhere: a new ticket replaces the old one as long as no chunk is committed. Afterwards it
ends the request (committed blocks may have been read and cached already, and must not be written again), unless all
KV is here and only the first outputs are missing.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.handover.actions import (
    AbortPull,
    Bind,
    Commit,
    Failed,
    FreeLocal,
    ImportAction,
    Pull,
    ReleaseRemote,
    Renew,
    Reserve,
    Resume,
)
from kvstore.handover.chunk import ChunkState, request_state
from kvstore.handover.incoming import ImportLimits, InChunk, Incoming
from kvstore.handover.ticket import Clock, ticket_id
from pdserve.engine.base import ImportTarget
from pdserve.errors import FingerprintMismatch, HandoverError, PdserveError, TicketRefused, TransferTimeout
from pdserve.types import KVManifest, KVTicket
from pdserve.wire.session import FirstOutput

_MAX_EARLY = 4096
"""Manifests kept for a ticket that is not here yet: a prompt has at most one chunk a block."""


class ImportLedger:
    """All hand-overs into one worker. Not thread-safe: one thread owns it."""

    def __init__(
        self,
        fingerprint: bytes,
        block_tokens: int,
        block_bytes: int,
        *,
        clock: Clock,
        limits: ImportLimits | None = None,
    ) -> None:
        self._fingerprint, self._block_tokens, self._block_bytes = fingerprint, block_tokens, block_bytes
        self._clock = clock
        self._limits = limits or ImportLimits()
        self._imports: dict[int, Incoming] = {}
        self._pulls: dict[int, Incoming] = {}
        self._turns: dict[int, None] = {}
        """Handles with something to pull, in order of their turn."""
        self._bytes_in_flight = 0
        self._next_pull_id = 1

    def __len__(self) -> int:
        return len(self._imports)

    def __contains__(self, handle: int) -> bool:
        return handle in self._imports

    @property
    def bytes_in_flight(self) -> int:
        return self._bytes_in_flight

    def state(self, handle: int) -> ChunkState:
        """Raises `KeyError` for an unknown handle."""
        return request_state(self._imports[handle].chunks.values())

    # --- events from the router ---

    def expect(self, handle: int, num_prompt_tokens: int) -> None:
        """A DECODE request was submitted. Raises `ValueError` for a handle that is in use."""
        if handle in self._imports:
            raise ValueError(f"handle {handle} is in use")
        self._imports[handle] = Incoming(handle, num_prompt_tokens, self._clock())

    def relay(
        self,
        handle: int,
        ticket: KVTicket | None = None,
        manifests: Sequence[KVManifest] = (),
        outputs: Sequence[FirstOutput] = (),
    ) -> list[ImportAction]:
        """What prefill announced, passed on by the router. The first outputs that come are kept: the client has
        them."""
        request = self._live(handle)
        if request is None:
            return []
        actions: list[ImportAction] = []
        try:
            if ticket is not None:
                actions += self._take_ticket(request, ticket)
            for manifest in manifests:
                self._take_manifest(request, manifest)
        except HandoverError as error:
            return actions + self._fail(request, error)
        if outputs and not request.outputs:
            request.outputs = tuple(outputs)
            request.progress_at = self._clock()
        return actions + self._advance(request)

    def cancel(self, handle: int) -> list[ImportAction]:
        """The router cancelled. A handle that is not (or no more) here gives `FreeLocal` too."""
        request = self._imports.get(handle)
        if request is None:
            return [FreeLocal(handle)]
        return [] if request.ended else self._end(request)

    # --- events from the engine, the exporter and the transports ---

    def reserved(self, reserve: Reserve, target: ImportTarget) -> list[ImportAction]:
        """The engine has blocks for this chunk. An answer about a replaced ticket's chunk is ignored."""
        request = self._live(reserve.handle)
        chunk = request.chunks.get(reserve.chunk_index) if request else None
        if request is None or chunk is None or chunk.target is not None or not chunk.covers(reserve):
            return []
        if len(target.blocks) != len(chunk.manifest.blocks):
            return self._fail(request, HandoverError("the exporter's blocks and ours differ in number"))
        chunk.target = target
        request.progress_at = self._clock()
        return self._advance(request)

    def bound(self, handle: int, nonce: bytes) -> list[ImportAction]:
        request = self._of_ticket(handle, nonce)
        if request is None or request.bound:
            return []
        request.binding, request.bound = False, True
        request.progress_at = self._clock()
        return self._advance(request)

    def bind_failed(self, handle: int, nonce: bytes, error: PdserveError) -> list[ImportAction]:
        request = self._of_ticket(handle, nonce)
        if request is None or request.bound:
            return []
        request.binding = not isinstance(error, TicketRefused | FingerprintMismatch)  # refused: nothing to release
        return self._fail(request, error)

    def renew_refused(self, handle: int, nonce: bytes, error: HandoverError) -> list[ImportAction]:
        """The exporter has forgotten the ticket, or is gone: no need to wait for a pull to find out."""
        request = self._of_ticket(handle, nonce)
        return [] if request is None or request.complete else self._fail(request, error)

    def pulled(self, pull_id: int) -> list[ImportAction]:
        """The chunk's bytes are in their place, verified."""
        ended = self._end_pull(pull_id)
        if ended is None:
            return []
        request, chunk = ended
        if request.chunks.get(chunk.index) is chunk:
            chunk.arrived = True
            request.progress_at = self._clock()
        return self._after_pull(request)

    def pull_failed(self, pull_id: int, error: PdserveError) -> list[ImportAction]:
        """The pull ended without the bytes. Fatal for the request, unless it had ended or changed its ticket."""
        ended = self._end_pull(pull_id)
        if ended is None:
            return []
        request, chunk = ended
        if not request.ended and request.chunks.get(chunk.index) is chunk:
            return self._fail(request, error)
        return self._after_pull(request)

    def tick(self) -> list[ImportAction]:
        """Renew leases; end whatever has waited too long."""
        now = self._clock()
        actions: list[ImportAction] = []
        for request in [r for r in self._imports.values() if not r.ended]:
            what, limit_s = request.waits_for(self._limits)
            if now >= request.progress_at + limit_s:
                actions += self._fail(request, TransferTimeout(f"waited {limit_s:g} s for {what}"))
            elif request.ticket is not None and not request.complete and now >= request.renew_at:
                request.renew_at = now + request.ticket.lease_ms / 3000
                actions.append(Renew(request.handle, request.ticket))
        return actions

    # --- tickets and manifests ---

    def _take_ticket(self, request: Incoming, ticket: KVTicket) -> list[ImportAction]:
        """A first or a new ticket; one seen before is ignored. Raises `HandoverError`."""
        identity = ticket_id(ticket.nonce)
        if identity in request.seen:
            return []
        if ticket.fingerprint != self._fingerprint:
            raise FingerprintMismatch("the KV layouts of the two workers differ: serve the same model and dtype")
        if ticket.num_prompt_tokens != request.num_prompt_tokens:
            raise HandoverError("the ticket is for a prompt of another length")
        request.seen.add(identity)
        if request.complete:  # only first outputs are missing: the new prefill need not keep its KV for us
            return [ReleaseRemote(ticket, None)]
        actions = self._drop_ticket(request)
        request.ticket = ticket
        request.progress_at = now = self._clock()
        request.renew_at = now + ticket.lease_ms / 3000
        early, request.early = request.early, []
        for manifest in early:
            self._take_manifest(request, manifest)
        return actions

    def _drop_ticket(self, request: Incoming) -> list[ImportAction]:
        """Prefill was retried: forget what came of the old ticket. Raises `TicketRefused` when it is too late."""
        if request.ticket is None:
            return []
        if request.num_committed_chunks:
            raise TicketRefused("prefill was retried after part of its KV was in use here: submit the request again")
        actions: list[ImportAction] = [AbortPull(pull_id) for pull_id in request.pulls]
        if request.binding or request.bound:
            actions.append(ReleaseRemote(request.ticket, None))
        for chunk in request.chunks.values():
            chunk.to(ChunkState.FREED)
        request.chunks.clear()
        request.binding = request.bound = False
        return actions

    def _take_manifest(self, request: Incoming, manifest: KVManifest) -> None:
        """Keep it if it is new and of the current ticket. Raises `HandoverError` for one that cannot be right."""
        current = request.ticket
        if current is None or manifest.ticket_id != ticket_id(current.nonce):
            if manifest.ticket_id not in request.seen and len(request.early) < _MAX_EARLY:
                request.early.append(manifest)  # its ticket was overtaken
            return
        if manifest.chunk_index in request.chunks:
            return
        self._check_manifest(request, manifest)
        request.chunks[manifest.chunk_index] = InChunk(manifest)
        request.progress_at = self._clock()

    def _check_manifest(self, request: Incoming, manifest: KVManifest) -> None:
        first, end = manifest.first_token, manifest.first_token + manifest.num_tokens
        whole = end % self._block_tokens == 0 or end == request.num_prompt_tokens
        if first < 0 or manifest.num_tokens < 1 or first % self._block_tokens or not whole:
            raise HandoverError(f"chunk {manifest.chunk_index} does not begin and end with a block")
        if end > request.num_prompt_tokens or manifest.final != (end == request.num_prompt_tokens):
            raise HandoverError(f"chunk {manifest.chunk_index} does not fit the prompt")
        columns = {len(manifest.blocks), len(manifest.generations), len(manifest.digests)}
        if columns != {-(-manifest.num_tokens // self._block_tokens)}:
            raise HandoverError(f"chunk {manifest.chunk_index} has the wrong number of blocks")

    # --- moving on ---

    def _advance(self, request: Incoming) -> list[ImportAction]:
        """Whatever has become possible for this request, and for those that wait for credits."""
        try:
            actions = [*self._reserve(request), *self._bind(request), *self._commit(request)]
        except HandoverError as error:
            return self._fail(request, error)
        if request.complete and request.outputs:
            actions += self._resume(request)
        elif request.next_pull() is not None:
            self._turns.setdefault(request.handle)
        return actions + self._dispatch()

    def _reserve(self, request: Incoming) -> list[ImportAction]:
        actions: list[ImportAction] = []
        for chunk in request.chunks.values():
            if not chunk.asked:
                chunk.asked = True
                m = chunk.manifest
                actions.append(Reserve(request.handle, chunk.index, m.first_token, m.num_tokens))
        return actions

    def _bind(self, request: Incoming) -> list[ImportAction]:
        """Only when there is something to pull and room for it: until then the router may choose another worker."""
        if request.ticket is None or request.binding or request.bound:
            return []
        if not any(chunk.pullable for chunk in request.chunks.values()):
            return []
        request.binding = True
        return [Bind(request.handle, request.ticket)]

    def _commit(self, request: Incoming) -> list[ImportAction]:
        """Commit what has arrived, in order. Raises `HandoverError` if the chunks don't follow each other."""
        actions: list[ImportAction] = []
        while (
            not request.replacing
            and (chunk := request.chunks.get(request.num_committed_chunks)) is not None
            and chunk.is_here()
        ):
            manifest = chunk.manifest
            if manifest.first_token != request.num_committed_tokens:
                raise HandoverError(f"chunk {chunk.index} does not follow the one before it")
            chunk.to(ChunkState.OWNED)
            request.num_committed_chunks += 1
            request.num_committed_tokens += manifest.num_tokens
            actions.append(Commit(request.handle, manifest.first_token, manifest.num_tokens))
            assert request.ticket is not None
            actions.append(ReleaseRemote(request.ticket, (chunk.index,)))
        return actions

    def _resume(self, request: Incoming) -> list[ImportAction]:
        assert request.ticket is not None
        self._forget(request)
        outputs = tuple(output.token_ids for output in request.outputs)
        finished = tuple(output.finished for output in request.outputs)
        return [Resume(request.handle, outputs, finished), ReleaseRemote(request.ticket, None)]

    def _dispatch(self) -> list[ImportAction]:
        """Start pulls while credits last, one chunk a request and turn."""
        actions: list[ImportAction] = []
        while self._turns:
            request = self._imports[next(iter(self._turns))]
            chunk = request.next_pull()
            if chunk is None:
                del self._turns[request.handle]
                continue
            nbytes = self._nbytes(chunk)
            if self._bytes_in_flight and self._bytes_in_flight + nbytes > self._limits.max_bytes_in_flight:
                break
            del self._turns[request.handle]
            self._turns[request.handle] = None
            actions.append(self._start_pull(request, chunk))
        return actions

    def _start_pull(self, request: Incoming, chunk: InChunk) -> Pull:
        assert request.ticket is not None
        assert chunk.target is not None
        chunk.to(ChunkState.PULLING)
        pull_id, self._next_pull_id = self._next_pull_id, self._next_pull_id + 1
        request.pulls[pull_id] = chunk
        request.progress_at = self._clock()
        self._pulls[pull_id] = request
        self._bytes_in_flight += self._nbytes(chunk)
        return Pull(pull_id, request.handle, request.ticket, chunk.manifest, chunk.target)

    def _end_pull(self, pull_id: int) -> tuple[Incoming, InChunk] | None:
        request = self._pulls.pop(pull_id, None)
        if request is None:
            return None
        chunk = request.pulls.pop(pull_id)
        self._bytes_in_flight -= self._nbytes(chunk)
        return request, chunk

    def _after_pull(self, request: Incoming) -> list[ImportAction]:
        if not request.ended:
            return self._advance(request)
        return [*self._free_when_idle(request), *self._dispatch()]

    # --- the end ---

    def _fail(self, request: Incoming, error: PdserveError) -> list[ImportAction]:
        return [Failed(request.handle, error), *self._end(request)]

    def _end(self, request: Incoming) -> list[ImportAction]:
        """Stop the pulls, tell the exporter, free the blocks as soon as nobody writes into them."""
        request.ended = True
        self._turns.pop(request.handle, None)
        actions: list[ImportAction] = [AbortPull(pull_id) for pull_id in request.pulls]
        if request.ticket is not None and (request.binding or request.bound):
            actions.append(ReleaseRemote(request.ticket, None))
        return [*actions, *self._free_when_idle(request), *self._dispatch()]

    def _free_when_idle(self, request: Incoming) -> list[ImportAction]:
        if request.pulls:
            return []
        self._forget(request)
        return [FreeLocal(request.handle)]

    def _forget(self, request: Incoming) -> None:
        for chunk in request.chunks.values():
            chunk.to(ChunkState.FREED)
        del self._imports[request.handle]
        self._turns.pop(request.handle, None)

    def _live(self, handle: int) -> Incoming | None:
        request = self._imports.get(handle)
        return None if request is None or request.ended else request

    def _of_ticket(self, handle: int, nonce: bytes) -> Incoming | None:
        """The request, if this is its current ticket."""
        request = self._live(handle)
        if request is None or request.ticket is None or request.ticket.nonce != nonce:
            return None
        return request

    def _nbytes(self, chunk: InChunk) -> int:
        return chunk.num_to_pull * self._block_bytes
