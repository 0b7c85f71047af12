"""The decode side of hand-overs: carries out what the `ImportLedger` decides.

Control goes by gRPC to the exporter, bytes are read by threads straight into the engine's blocks, and every outcome
goes back to the ledger. The ledger frees blocks only after the last thread that writes into them has ended; that is
why the job table leaves the cancel of a DECODE request to this module until the request runs.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

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
from kvstore.handover.importer import ImportLedger
from kvstore.handover.incoming import ImportLimits
from kvstore.handover.verify import DigestPolicy, pull_blocks
from pdserve.config import WorkerConfig
from pdserve.engine.base import HandoverEngine, ImportTarget
from pdserve.errors import (
    DeadlineExceeded,
    HandoverError,
    PdserveError,
    PeerLost,
    ServiceError,
    TicketRefused,
    TransferTimeout,
    WorkerLost,
)
from pdserve.metrics import WorkerMetrics
from pdserve.types import KVTicket, PromptStats, WorkerInfo
from pdserve.wire import handover as wire
from pdserve.wire.session import Relay
from worker_core.engine_thread import EngineThread
from worker_core.identity import num_context_tokens
from worker_core.jobs import Job, JobTable
from worker_core.memory_port import MemoryPort
from worker_core.peers import Peers, Source
from worker_core.session import HANDLE_MASK

TICK_S = 0.25
"""While imports are open: far below a third of a lease (10 s), and below it in tests with short ones."""

log = logging.getLogger("pdserve.worker")


@dataclass(slots=True, eq=False)
class _Running:
    """A pull in a thread."""

    action: Pull
    source: Source
    stop: threading.Event = field(default_factory=threading.Event)
    started: float = field(default_factory=time.monotonic)


class Puller:
    """One a worker."""

    def __init__(
        self,
        config: WorkerConfig,
        info: WorkerInfo,
        engine: EngineThread,
        jobs: JobTable,
        metrics: WorkerMetrics,
        port: MemoryPort,
    ) -> None:
        self._info = info
        self._engine = engine
        self._pool = port.pool
        self._jobs = jobs
        self._metrics = metrics
        self._offered = tuple(port.transports)
        self._control_timeout_s = config.bind_timeout_s
        self._bulk = ThreadPoolExecutor(config.pull_threads, "pull")
        policies = {"shm": DigestPolicy(every=config.digest_every)}
        self._peers = Peers(port, policies, config.tls.rpc())
        limits = ImportLimits(announce_s=config.relay_timeout_s, max_bytes_in_flight=config.pull_credit_bytes)
        self._ledger = ImportLedger(
            info.fingerprint, info.block_tokens, self._pool.block_bytes, clock=time.monotonic, limits=limits
        )
        self._open: dict[int, Job] = {}
        self._sources: dict[int, dict[bytes, Source]] = {}
        """By handle and ticket nonce, from bind until the ledger forgets the request."""
        self._running: dict[int, _Running] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._ticking: asyncio.TimerHandle | None = None
        self.bytes_pulled = 0

    def __len__(self) -> int:
        """Requests whose KV is on its way, or whose blocks a thread still writes."""
        return len(self._ledger)

    def __contains__(self, key: int) -> bool:
        return key in self._ledger

    # ---- from the job table ----

    def open(self, job: Job) -> None:
        """A DECODE request was taken."""
        self._ledger.expect(job.key, num_context_tokens(job.request))
        self._open[job.key] = job
        if self._ticking is None:
            self._schedule_tick()

    def relay(self, job: Job, relay: Relay) -> None:
        """What the router passed on. Bytes that can't be read end the request."""
        try:
            ticket = wire.decode_ticket(relay.ticket) if relay.ticket else None
            manifests = [wire.decode_manifest(data) for data in relay.manifests]
        except PdserveError as error:
            self._jobs.fail(job, error)
            return
        self._run(self._ledger.relay(job.key, ticket, manifests, relay.outputs))

    def drop(self, job: Job) -> None:
        """The request has ended before it ran: stop its pulls, then free its blocks."""
        self._open.pop(job.key, None)
        self._run(self._ledger.cancel(job.key))

    # ---- carrying out ----

    def _run(self, actions: Iterable[ImportAction]) -> None:
        actions = list(actions)
        ended = {a.ticket.nonce for a in actions if isinstance(a, ReleaseRemote) and a.chunk_indexes is None}
        for action in actions:
            match action:
                case Reserve():
                    self._reserve(action)
                case Bind():
                    self._spawn(self._bind(action))
                case Pull():
                    self._pull(action)
                case AbortPull(pull_id):
                    self._abort(pull_id)
                case Commit(handle, first_token, num_tokens):
                    self._command(handle, partial(_commit, handle, first_token, num_tokens))
                case Resume():
                    self._resume(action)
                case Renew():
                    self._spawn(self._renew(action))
                case ReleaseRemote(ticket, chunk_indexes):
                    if chunk_indexes is None or ticket.nonce not in ended:  # else the whole is released just below
                        self._spawn(self._release(ticket, chunk_indexes))
                case Failed(handle, error):
                    self._failed(handle, error)
                case FreeLocal(handle):
                    self._sources.pop(handle, None)
                    self._engine.post(partial(_cancel, handle))

    def _command(self, handle: int, command: partial[None]) -> None:
        self._engine.submit(command, partial(self._failed, handle))

    def _failed(self, handle: int, error: PdserveError) -> None:
        job = self._open.pop(handle, None)
        if job is not None:
            self._metrics.handover_failures.labels(error.reason).inc()
            self._jobs.fail(job, error)

    def _reserve(self, action: Reserve) -> None:
        command = partial(_import_blocks, action.handle, action.first_token, action.num_tokens)
        reserved: asyncio.Future[ImportTarget] = self._engine.call_when_possible(command)
        reserved.add_done_callback(partial(self._reserved, action))

    def _reserved(self, action: Reserve, reserved: asyncio.Future[ImportTarget]) -> None:
        if reserved.cancelled():
            return
        error = reserved.exception()
        if error is None:
            self._run(self._ledger.reserved(action, reserved.result()))
        elif isinstance(error, PdserveError):
            self._failed(action.handle, error)
        elif not isinstance(error, KeyError):  # KeyError: the request has ended at the engine
            raise error

    async def _bind(self, action: Bind) -> None:
        ticket = action.ticket
        request = wire.Bind(
            nonce=ticket.nonce,
            exporter_incarnation=ticket.incarnation,
            decode_worker_id=self._info.worker_id,
            decode_incarnation=self._info.incarnation,
            fingerprint=self._info.fingerprint,
            host_id=self._info.host_id,
            transports=self._offered,
        )
        try:
            channel = self._peers.channel(ticket)
            bound = await channel.call(wire.BIND, request, timeout_s=self._control_timeout_s)
            source = await self._peers.connect(ticket, bound)
        except PdserveError as error:
            self._run(self._ledger.bind_failed(action.handle, ticket.nonce, as_handover(error)))
            return
        if action.handle in self._ledger:
            self._sources.setdefault(action.handle, {})[ticket.nonce] = source
            self._run(self._ledger.bound(action.handle, ticket.nonce))

    def _pull(self, action: Pull) -> None:
        running = _Running(action, self._sources[action.handle][action.ticket.nonce])
        self._running[action.pull_id] = running
        pulling = asyncio.get_running_loop().run_in_executor(
            self._bulk,
            pull_blocks,
            running.source.peer,
            running.source.memory,
            action.manifest,
            self._pool,
            action.target,
            running.source.policy,
            running.stop.is_set,
        )
        pulling.add_done_callback(partial(self._pulled, running))

    def _pulled(self, running: _Running, pulling: asyncio.Future[int]) -> None:
        """The thread has ended and writes no more."""
        pull_id = running.action.pull_id
        del self._running[pull_id]
        error = PeerLost("this worker stops") if pulling.cancelled() else pulling.exception()
        if error is None:
            self._count_pull(running, pulling.result())
            self._run(self._ledger.pulled(pull_id))
            return
        if isinstance(error, PeerLost):
            self._peers.drop(running.action.ticket)
        if not isinstance(error, PdserveError):
            log.error("pull failed", exc_info=error)
            error = HandoverError(f"the pull failed: {type(error).__name__}: {error}")
        self._run(self._ledger.pull_failed(pull_id, error))

    def _count_pull(self, running: _Running, nbytes: int) -> None:
        self.bytes_pulled += nbytes
        transport = running.source.transport
        self._metrics.kv_bytes_pulled.labels(transport).inc(nbytes)
        self._metrics.kv_pull_seconds.labels(transport).observe(time.monotonic() - running.started)

    def _abort(self, pull_id: int) -> None:
        running = self._running.get(pull_id)
        if running is not None:
            running.stop.set()

    def _resume(self, action: Resume) -> None:
        self._sources.pop(action.handle, None)
        job = self._open.pop(action.handle)
        job.resumed = job.work_done = True
        job.resumed_ns = time.time_ns()
        num_tokens = num_context_tokens(job.request)
        job.session.add_prompt(PromptStats(action.handle & HANDLE_MASK, num_tokens, num_tokens))  # the router's clocks
        command = partial(_resume, action.handle, action.output_token_ids, action.finished)
        self._engine.submit(command, partial(self._jobs.fail, job))

    async def _renew(self, action: Renew) -> None:
        ticket = action.ticket
        channel = self._peers.channel(ticket)
        try:
            await channel.call(wire.RENEW, wire.Renew(ticket.nonce), timeout_s=self._control_timeout_s)
        except TicketRefused as error:
            self._run(self._ledger.renew_refused(action.handle, ticket.nonce, error))
        except WorkerLost as error:
            lost = PeerLost(f"the prefill worker cannot be reached: {error.message}")
            self._run(self._ledger.renew_refused(action.handle, ticket.nonce, lost))
        except PdserveError as error:
            log.info("renewal failed", extra={"reason": error.reason})  # the next one comes well within the lease

    async def _release(self, ticket: KVTicket, chunk_indexes: tuple[int, ...] | None) -> None:
        """Best effort: the ticket's lease is the backstop."""
        request = wire.Release(ticket.nonce, chunk_indexes or (), all=chunk_indexes is None)
        try:
            channel = self._peers.channel(ticket)
            await channel.call(wire.RELEASE, request, timeout_s=self._control_timeout_s)
        except PdserveError as error:
            log.info("release failed", extra={"request_id": ticket.request_id, "reason": error.reason})

    # ---- time and the end ----

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _schedule_tick(self) -> None:
        self._ticking = asyncio.get_running_loop().call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        """Runs only while something is open: an idle worker sleeps."""
        self._ticking = None
        self._run(self._ledger.tick())
        if len(self._ledger):
            self._schedule_tick()

    async def stop(self) -> None:
        """Abort pulls, wait until no thread writes any more, close connections."""
        if self._ticking is not None:
            self._ticking.cancel()
        for running in self._running.values():
            running.stop.set()
        await asyncio.get_running_loop().run_in_executor(None, self._bulk.shutdown)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._peers.close()


def as_handover(error: PdserveError) -> PdserveError:
    """A failed control call, as the error of the hand-over that it is."""
    if isinstance(error, WorkerLost):
        return PeerLost(f"the prefill worker cannot be reached: {error.message}")
    if isinstance(error, DeadlineExceeded):
        return TransferTimeout(f"the prefill worker did not answer in time: {error.message}")
    if isinstance(error, ServiceError):
        return HandoverError(error.message)
    return error


# ---- commands, run in the engine's thread ----


def _import_blocks(handle: int, first_token: int, num_tokens: int, engine: HandoverEngine) -> ImportTarget | None:
    return engine.import_blocks(handle, first_token, num_tokens)


def _commit(handle: int, first_token: int, num_tokens: int, engine: HandoverEngine) -> None:
    try:
        engine.import_commit(handle, first_token, num_tokens)
    except KeyError as error:
        raise HandoverError("the engine has dropped this request") from error


def _resume(
    handle: int, outputs: tuple[tuple[int, ...], ...], finished: tuple[bool, ...], engine: HandoverEngine
) -> None:
    try:
        engine.resume(handle, outputs, finished)
    except KeyError as error:
        raise HandoverError("the engine has dropped this request") from error


def _cancel(handle: int, engine: HandoverEngine) -> None:
    engine.cancel(handle)
