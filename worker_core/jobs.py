"""The requests on this worker: from a router's submission to the last token, whichever way it ends.

The table joins routers' sessions, the engine's thread and the two sides of the hand-over. It decides nothing about
compute or transfer; it makes sure that each request ends exactly once and that its end reaches the engine, the
hand-over and the router alike. All on the event loop, plain calls.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

from pdserve.engine.base import ExportedChunk, HandoverEngine
from pdserve.errors import DeadlineExceeded, Draining, InvalidRequest, ModelNotFound, PdserveError
from pdserve.metrics import WorkerMetrics
from pdserve.types import CacheDelta, Finish, FinishReason, Phase, PromptStats, Request, StepOutput
from pdserve.wire.session import Relay, Submission
from worker_core.deadlines import Deadlines
from worker_core.engine_thread import EngineThread, Round
from worker_core.session import HANDLE_BITS, HANDLE_MASK, Session
from worker_core.traces import WorkerTraces

log = logging.getLogger("pdserve.worker")


@dataclass(slots=True, eq=False)
class Job:
    """One request here. `key` is the engine's handle of its first choice."""

    key: int
    session: Session
    request: Request
    phase: Phase
    open_choices: set[int]
    """Keys of the choices that have not ended."""
    prefilled: bool = False
    """PREFILL: the router has all it asked for; what remains is the hold on exported blocks."""
    resumed: bool = False
    """DECODE: the KV has arrived."""
    work_done: bool = False
    """Tokens were sampled for it, here or before."""
    born_ns: int = field(default_factory=time.time_ns)
    resumed_ns: int = 0
    fetched_from: str = ""
    """Tier of the store that a part of its prompt came from."""
    fetched_ns: int = 0
    """When the last of it had come."""
    num_disk_tokens: int = 0
    """Of those, such as the node's store had on disk."""

    @property
    def tenant(self) -> str:
        """Whose quota its blocks in a store count against: tenants are told apart by the root of their keys."""
        root = self.request.cache_root
        return root.hex() if any(root) else ""

    @property
    def leg(self) -> str:
        if self.phase is Phase.PREFILL:
            return "prefill"
        return "decode" if self.resumed or self.phase is Phase.FULL else "transfer"


class Exports(Protocol):
    """The prefill side of hand-overs (`worker_core.exporter.Exporter`)."""

    def open(self, job: Job) -> None: ...
    def add_chunk(self, job: Job, chunk: ExportedChunk) -> None: ...
    def drop(self, job: Job) -> None:
        """Cancel it at the engine, and void its ticket."""
        ...


class Imports(Protocol):
    """The decode side of hand-overs (`worker_core.puller.Puller`)."""

    def __len__(self) -> int: ...
    def __contains__(self, key: int) -> bool: ...
    def open(self, job: Job) -> None: ...
    def relay(self, job: Job, relay: Relay) -> None: ...
    def drop(self, job: Job) -> None:
        """Stop what writes into the request's blocks, then cancel it at the engine."""
        ...


class Store(Protocol):
    """The node's store (`worker_core.store.StoreSide`)."""

    def __contains__(self, key: int) -> bool: ...
    def open(self, job: Job, prefix_store: str) -> bool:
        """Whether something is fetched for it first; it is submitted then by `JobTable.start`."""
        ...

    def drop(self, job: Job) -> None:
        """Stop what writes into blocks that were opened for it, then give them back."""
        ...

    def ended(self, key: int, job: Job) -> None:
        """A choice of this job, or a request's prompt at prefill, has all its blocks."""
        ...


class JobTable:
    """Every live request of the worker. Its first four methods are `worker_core.session.Jobs`."""

    exports: Exports
    imports: Imports
    store: Store

    def __init__(self, engine: EngineThread, model_name: str, metrics: WorkerMetrics) -> None:
        self._engine = engine
        self._model_name = model_name
        self._metrics = metrics
        self._jobs: dict[int, Job] = {}
        self._choices: dict[int, Job] = {}
        self._sessions: dict[int, Session] = {}
        self._deadlines = Deadlines(self._expire)
        self._finished = {
            reason: metrics.requests_finished.labels(metrics.model_name, reason.name.lower()) for reason in FinishReason
        }
        self.traces: WorkerTraces | None = None
        self.draining = False
        self._emptied = asyncio.Event()

    def __len__(self) -> int:
        return len(self._jobs)

    # ---- from routers ----

    def add_session(self, session: Session) -> None:
        self._sessions[session.number] = session

    def drop_session(self, session: Session) -> None:
        """The stream has ended: nobody waits for its requests any more."""
        if self._sessions.pop(session.number, None) is None:
            return
        for job in [job for job in self._jobs.values() if job.session is session]:
            self._end(job)

    @property
    def sessions(self) -> list[Session]:
        return list(self._sessions.values())

    def submit(self, session: Session, submission: Submission) -> None:
        """Take a request, or answer it with the error that says why not."""
        request = submission.request
        try:
            if request is None:
                raise submission.error or InvalidRequest("the submission holds no request")
            job = self._admit(session, submission, request)
        except PdserveError as error:
            session.add_error([submission.handle], error)
            return
        self._jobs[job.key] = job
        self._choices.update(dict.fromkeys(job.open_choices, job))
        if request.timeout_ms:
            self._deadlines.set(job.key, request.timeout_ms / 1000)
        if job.phase is Phase.DECODE or not self.store.open(job, submission.prefix_store):
            self.start(job)
        if job.phase is Phase.DECODE:
            self.imports.open(job)
        elif job.phase is Phase.PREFILL:
            self.exports.open(job)

    def start(self, job: Job) -> None:
        """Give it to the engine."""
        self._engine.submit(partial(_submit, job.request, job.key, job.phase), partial(self._refused, job))

    def job_of(self, choice: int) -> Job | None:
        """The request of a choice that runs."""
        return self._choices.get(choice)

    def _admit(self, session: Session, submission: Submission, request: Request) -> Job:
        if self.draining:
            raise Draining("this worker is going away; submit elsewhere")
        if request.model != self._model_name:
            raise ModelNotFound(f"this worker serves {self._model_name!r}, not {request.model!r}", param="model")
        if request.lora:
            raise ModelNotFound(f"this worker has no LoRA adapter {request.lora!r}", param="lora")
        key = session.key(submission.handle)
        choices = set(range(key, key + request.params.n))
        if submission.handle + request.params.n > HANDLE_MASK or not self._is_free(key, choices):
            raise InvalidRequest(f"handle {submission.handle} is in use or out of range", param="handle")
        self._engine.check_room()
        return Job(key, session, request, submission.phase, choices)

    def _is_free(self, key: int, choices: set[int]) -> bool:
        taken = key in self._jobs or key in self.imports or key in self.store
        return not taken and choices.isdisjoint(self._choices)

    def cancel(self, session: Session, handle: int) -> None:
        """Unknown handles are ignored: a cancel may cross the end."""
        job = self._jobs.get(session.key(handle))
        if job is not None:
            self._end(job)

    def cancel_choice(self, session: Session, handle: int) -> None:
        choice = session.key(handle)
        job = self._choices.pop(choice, None)
        if job is None:
            return
        job.open_choices.discard(choice)
        if job.open_choices:
            self._engine.post(lambda engine: engine.cancel_choice(choice))
        else:
            self._end(job)

    def relay(self, session: Session, relay: Relay) -> None:
        job = self._jobs.get(session.key(relay.handle))
        if job is not None and job.phase is Phase.DECODE:
            self.imports.relay(job, relay)

    # ---- ends ----

    def fail(self, job: Job, error: PdserveError) -> None:
        """End every open choice with an error and free what the request holds. Ended requests are ignored."""
        if self._jobs.get(job.key) is not job:
            return
        log.warning("request failed", extra={"request_id": job.request.request_id, "reason": error.reason})
        if not job.prefilled:
            self._tell_error(job, error)
        self._end(job)

    def _tell_error(self, job: Job, error: PdserveError) -> None:
        told = copy(error)  # one error may end many requests, each on its own leg
        told.leg = error.leg or job.leg
        told.work_done = error.work_done or job.work_done
        job.session.add_error([choice & HANDLE_MASK for choice in sorted(job.open_choices)], told)
        self._finished[FinishReason.ERROR].inc(len(job.open_choices))

    def fail_all(self, error: PdserveError) -> None:
        for job in list(self._jobs.values()):
            self.fail(job, error)

    def _refused(self, job: Job, error: PdserveError) -> None:
        self.fail(job, error)

    def _expire(self, key: int) -> None:
        job = self._jobs.get(key)
        if job is not None:
            limit = f"{job.request.timeout_ms} ms"
            self.fail(job, DeadlineExceeded(f"the {job.leg} leg did not end within {limit}", leg=job.leg))

    def _end(self, job: Job) -> None:
        """Forget a request that has not run to its end, and free what it holds."""
        self._forget(job)
        if job.phase is Phase.PREFILL:
            self.exports.drop(job)
        elif job.phase is Phase.DECODE and not job.resumed:
            self.imports.drop(job)
        else:
            self._engine.post(lambda engine: engine.cancel(job.key))

    def _forget(self, job: Job) -> None:
        del self._jobs[job.key]
        self.store.drop(job)
        self.store.ended(job.key, job)
        for choice in job.open_choices:
            self._choices.pop(choice, None)
            self.store.ended(choice, job)
        self._deadlines.clear(job.key)
        if self.traces is not None:
            self.traces.ended(job)
        if not self._jobs:
            self._emptied.set()

    async def wait_empty(self) -> None:
        """Until no request is left, blocks held for decode workers included."""
        while self._jobs:
            self._emptied.clear()
            await self._emptied.wait()

    def export_ended(self, job: Job) -> None:
        """The exporter holds nothing of a PREFILL request any more."""
        if self._jobs.get(job.key) is job and job.prefilled:
            self._forget(job)

    def close(self) -> None:
        self._deadlines.close()

    # ---- from the engine ----

    def on_round(self, round_: Round) -> None:
        """Spread one step over the routers it concerns. Hot path: no work per token but the columns'."""
        output = round_.result.output
        if output:
            self._metrics.step_seconds.observe(round_.duration_s)
            self._spread_tokens(output)
            self._spread_rest(output)
        for chunk in round_.result.exports:
            job = self._jobs.get(chunk.handle)
            if job is not None:
                self.exports.add_chunk(job, chunk)
        if output:
            for session in self._sessions.values():
                session.end_step()

    def tell_cache(self, delta: CacheDelta) -> None:
        """What changed in the engine's prefix cache, to every router."""
        for session in self._sessions.values():
            session.add_cache(delta)

    def _spread_tokens(self, output: StepOutput) -> None:
        handles = output.handles
        if not handles:
            return
        self._metrics.generation_tokens.inc(len(output.token_ids))
        number = handles[0] >> HANDLE_BITS
        if min(handles) >> HANDLE_BITS != number or max(handles) >> HANDLE_BITS != number:
            self._spread_mixed(output)
        elif (session := self._sessions.get(number)) is not None:
            own = [handle & HANDLE_MASK for handle in handles]
            session.add_tokens(own, output.first_indexes, output.counts, output.token_ids)

    def _spread_mixed(self, output: StepOutput) -> None:
        """The same for a batch that several routers share."""
        parts: defaultdict[int, StepOutput] = defaultdict(StepOutput)
        position = 0
        for handle, first, count in zip(output.handles, output.first_indexes, output.counts, strict=True):
            part = parts[handle >> HANDLE_BITS]
            part.handles.append(handle & HANDLE_MASK)
            part.first_indexes.append(first)
            part.counts.append(count)
            part.token_ids += output.token_ids[position : position + count]
            position += count
        for number, part in parts.items():
            session = self._sessions.get(number)
            if session is not None:
                session.add_tokens(part.handles, part.first_indexes, part.counts, part.token_ids)

    def _spread_rest(self, output: StepOutput) -> None:
        for entry in output.logprobs:
            if (job := self._choices.get(entry.handle)) is not None:
                job.session.add_logprobs(replace(entry, handle=entry.handle & HANDLE_MASK))
        for stats in output.prompts:
            if (job := self._jobs.get(stats.handle)) is not None:
                self._prompt_done(job, stats)
        for finish in output.finishes:
            if (job := self._choices.pop(finish.handle, None)) is not None:
                self._choice_done(job, finish)

    def _prompt_done(self, job: Job, stats: PromptStats) -> None:
        self._count_prompt(job, stats)
        job.work_done = True
        self.store.drop(job)  # computed sooner than fetched: nobody would take what comes now
        job.session.add_prompt(replace(stats, handle=stats.handle & HANDLE_MASK))
        if job.phase is Phase.PREFILL:
            job.prefilled = True
            self._deadlines.clear(job.key)
            self.store.ended(job.key, job)

    def _count_prompt(self, job: Job, stats: PromptStats) -> None:
        metrics = self._metrics
        metrics.prompt_tokens.inc(stats.num_prompt_tokens)
        num_fetched = min(stats.num_fetched_tokens, stats.num_cached_tokens)
        metrics.prefix_tokens["hbm"].inc(stats.num_cached_tokens - num_fetched)
        num_disk = min(job.num_disk_tokens, num_fetched)
        metrics.prefix_tokens["disk"].inc(num_disk)
        metrics.prefix_tokens[job.fetched_from or "dram"].inc(num_fetched - num_disk)
        metrics.prefix_tokens["computed"].inc(max(0, stats.num_prompt_tokens - stats.num_cached_tokens))

    def _choice_done(self, job: Job, finish: Finish) -> None:
        self._finished[finish.reason].inc()
        self.store.ended(finish.handle, job)
        job.session.add_finish(replace(finish, handle=finish.handle & HANDLE_MASK))
        job.open_choices.discard(finish.handle)
        if job.open_choices:
            return
        if job.phase is Phase.FULL or job.resumed:
            self._forget(job)
        else:
            self._end(job)  # prefill ended every choice: nobody will pull its blocks


def _submit(request: Request, key: int, phase: Phase, engine: HandoverEngine) -> None:
    engine.submit(request, key, phase)
