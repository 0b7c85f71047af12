"""A request's span at a worker: from its submission to the moment that nothing of it is left here."""

from __future__ import annotations

import time
from typing import Protocol

from pdserve.config import TracingConfig
from pdserve.tracing import Tracer, Value, tracer_of
from pdserve.types import Phase, Request, WorkerInfo


class TracedJob(Protocol):
    """What a span tells of a job."""

    @property
    def request(self) -> Request: ...

    @property
    def phase(self) -> Phase: ...

    @property
    def born_ns(self) -> int: ...

    @property
    def resumed_ns(self) -> int:
        """When a DECODE request had all its KV; 0: it had not."""
        ...

    @property
    def fetched_from(self) -> str:
        """Tier of the store that a part of its prompt came from; empty: none did."""
        ...

    @property
    def fetched_ns(self) -> int: ...


class WorkerTraces:
    """One a worker."""

    def __init__(self, tracer: Tracer, worker_id: str) -> None:
        self._tracer = tracer
        self._worker_id = worker_id

    def ended(self, job: TracedJob) -> None:
        now = time.time_ns()
        span = self._tracer.begin(f"worker.{job.phase.name.lower()}", job.request.traceparent, job.born_ns)
        if span.is_recording() and job.resumed_ns:
            self._tracer.child(span, "worker.pull", job.born_ns, job.resumed_ns, {})
            self._tracer.child(span, "worker.decode", job.resumed_ns, now, {})
        if span.is_recording() and job.fetched_from:
            tier: dict[str, Value] = {"pdserve.tier": job.fetched_from}
            self._tracer.child(span, "worker.fetch", job.born_ns, job.fetched_ns, tier)
        attributes: dict[str, Value] = {
            "pdserve.worker": self._worker_id,
            "pdserve.request_id": job.request.request_id,
            "gen_ai.usage.input_tokens": len(job.request.prompt_token_ids),
        }
        self._tracer.end(span, now, attributes)

    def close(self) -> None:
        self._tracer.close()


def make_traces(config: TracingConfig, info: WorkerInfo) -> WorkerTraces | None:
    """None where tracing is off. Raises `ConfigError`."""
    tracer = tracer_of(config, "pdserve-worker", info.worker_id)
    return None if tracer is None else WorkerTraces(tracer, info.worker_id)
