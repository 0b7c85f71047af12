"""The prefill side of hand-overs: carries out what the `ExportLedger` decides.

Each finished chunk is digested and announced to the router at once, so that decode pulls it while prefill goes on.
Decode workers then come here over `KvHandoverService`: bind, renew, release. Whatever they fail to do is done by
the ticket's lease.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from kvstore.handover.exporter import (
    Announce,
    CancelRequest,
    Expired,
    ExportAction,
    ExportLedger,
    ReleaseBlocks,
)
from kvstore.handover.verify import digest_blocks
from kvstore.transports.registry import select
from pdserve.engine.base import ExportedChunk, HandoverEngine, KVMemory
from pdserve.errors import HandoverError
from pdserve.metrics import WorkerMetrics
from pdserve.wire.handover import (
    Bind,
    Bound,
    Release,
    Released,
    Renew,
    Renewed,
    encode_manifest,
    encode_ticket,
)
from pdserve.wire.session import Announcement
from worker_core.engine_thread import EngineThread
from worker_core.identity import num_context_tokens
from worker_core.jobs import Job, JobTable
from worker_core.session import HANDLE_MASK

INLINE_DIGEST_BYTES = 256 << 10
"""Up to this a digest takes 20 us on the loop (16 GB/s); beyond it goes to a thread."""
MAX_TICK_S = 1.0

log = logging.getLogger("pdserve.worker")


class Exporter:
    """One a worker. `offers` maps a transport's name to the descriptor of this worker's memory on it."""

    def __init__(
        self,
        ledger: ExportLedger,
        engine: EngineThread,
        memory: KVMemory,
        jobs: JobTable,
        metrics: WorkerMetrics,
        *,
        offers: Mapping[str, bytes],
        host_id: str,
    ) -> None:
        self._ledger = ledger
        self._engine = engine
        self._memory = memory
        self._jobs = jobs
        self._metrics = metrics
        self._offers = offers
        self._host_id = host_id
        self._block_bytes = memory.blocks.shape[1]
        self._tick_s = min(MAX_TICK_S, ledger.lease_ms / 4000)
        self._ticking: asyncio.TimerHandle | None = None
        self._open: dict[int, Job] = {}
        self._digests = ThreadPoolExecutor(1, "digest")
        """One thread, so that a request's chunks stay in order."""
        self._num_digesting = 0

    def __len__(self) -> int:
        """Requests that are computed for, or held for, a decode worker."""
        return len(self._ledger)

    # ---- from the job table ----

    def open(self, job: Job) -> None:
        """A PREFILL request was taken."""
        self._ledger.open(job.key, job.request.request_id, num_context_tokens(job.request))
        self._open[job.key] = job
        if self._ticking is None:
            self._schedule_tick()

    def add_chunk(self, job: Job, chunk: ExportedChunk) -> None:
        """Announce a chunk that the engine has finished."""
        nbytes = len(chunk.blocks) * self._block_bytes
        if nbytes <= INLINE_DIGEST_BYTES and not self._num_digesting:
            self._announce(chunk, digest_blocks(self._memory, chunk.blocks))
            return
        self._num_digesting += 1
        loop = asyncio.get_running_loop()
        digested = loop.run_in_executor(self._digests, digest_blocks, self._memory, chunk.blocks)
        digested.add_done_callback(partial(self._digested, chunk))

    def _digested(self, chunk: ExportedChunk, digests: asyncio.Future[tuple[bytes, ...]]) -> None:
        self._num_digesting -= 1
        if not digests.cancelled():
            self._announce(chunk, digests.result())

    def _announce(self, chunk: ExportedChunk, digests: tuple[bytes, ...]) -> None:
        self._run(self._ledger.exported(chunk, digests))

    def drop(self, job: Job) -> None:
        """The request has ended before its blocks were released: free them now."""
        self._open.pop(job.key, None)
        self._run(self._ledger.cancel(job.key))

    # ---- from decode workers ----

    async def bind(self, request: Bind) -> Bound:
        """Raises `TicketRefused`, `FingerprintMismatch`, `HandoverError` (no common transport)."""
        name = select(request.transports, self._offers, same_host=request.host_id == self._host_id)
        lease_ms = self._ledger.bind(
            request.nonce,
            request.exporter_incarnation,
            request.decode_worker_id,
            request.decode_incarnation,
            request.fingerprint,
        )
        return Bound(name, self._offers[name], lease_ms)

    async def renew(self, request: Renew) -> Renewed:
        """Raises `HandoverError`."""
        return Renewed(self._ledger.renew(request.nonce))

    async def release(self, request: Release) -> Released:
        self._run(self._ledger.release(request.nonce, None if request.all else request.chunk_indexes))
        return Released()

    # ---- carrying out ----

    def _run(self, actions: Iterable[ExportAction]) -> None:
        for action in actions:
            match action:
                case Announce():
                    self._tell_router(action)
                case ReleaseBlocks(handle, chunk_index):
                    self._engine.post(partial(_release, handle, chunk_index))
                    self._check_done(handle)
                case CancelRequest(handle):
                    self._engine.post(partial(_cancel, handle))
                case Expired(handle, error):
                    self._expired(handle, error)

    def _tell_router(self, action: Announce) -> None:
        job = self._open[action.handle]
        ticket = b"" if action.ticket is None else encode_ticket(action.ticket)
        manifests = (encode_manifest(action.manifest),)
        job.session.add_announcement(Announcement(action.handle & HANDLE_MASK, ticket, manifests))

    def _check_done(self, handle: int) -> None:
        if handle not in self._ledger and (job := self._open.pop(handle, None)) is not None:
            self._jobs.export_ended(job)

    def _expired(self, handle: int, error: HandoverError) -> None:
        self._metrics.tickets_expired.inc()
        job = self._open.pop(handle, None)
        if job is not None:
            log.warning("ticket expired", extra={"request_id": job.request.request_id, "reason": error.reason})
            self._jobs.fail(job, error)

    def _schedule_tick(self) -> None:
        self._ticking = asyncio.get_running_loop().call_later(self._tick_s, self._tick)

    def _tick(self) -> None:
        """Runs only while something is open: an idle worker sleeps."""
        self._ticking = None
        self._run(self._ledger.tick())
        if len(self._ledger):
            self._schedule_tick()

    def close(self) -> None:
        if self._ticking is not None:
            self._ticking.cancel()
        self._digests.shutdown(wait=False, cancel_futures=True)


def _release(handle: int, chunk_index: int | None, engine: HandoverEngine) -> None:
    engine.export_release(handle, chunk_index)


def _cancel(handle: int, engine: HandoverEngine) -> None:
    engine.cancel(handle)
