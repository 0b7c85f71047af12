"""Turns an ended request into metrics. Labels are bound once; nothing here runs per token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

from prometheus_client import Counter

from pdserve.errors import PdserveError, from_fields
from pdserve.metrics import RouterMetrics
from pdserve.types import Role
from router.catalog import Record
from router.session import Link


class Observer:
    """Metrics of one served model."""

    def __init__(self, metrics: RouterMetrics, model: str, num_inflight: Callable[[], int]) -> None:
        self._metrics = metrics
        metrics.inflight.set_function(num_inflight)
        self._model = model
        self._ttft = metrics.ttft.labels(model)
        self._itl = metrics.itl.labels(model)
        self._e2e = metrics.e2e.labels(model)
        self._prompt_length = metrics.prompt_length.labels(model)
        self._output_length = metrics.output_length.labels(model)
        self._prompt_tokens = metrics.prompt_tokens.labels(model)
        self._cached_tokens = metrics.cached_tokens.labels(model)
        self._output_tokens = metrics.output_tokens.labels(model)
        self._leg = {leg: metrics.leg_seconds.labels(model, leg) for leg in _LEGS}
        self._placed = lru_cache(maxsize=1024)(lambda worker_id, role: metrics.placements.labels(worker_id, role))
        self._ended = lru_cache(maxsize=64)(self._bind_ended)

    def admitted(self, record: Record) -> None:
        self._prompt_tokens.inc(record.num_prompt_tokens)
        self._prompt_length.observe(record.num_prompt_tokens)
        for worker_id, role in ((record.prefill_worker, "prefill"), (record.decode_worker, "decode")):
            if worker_id is not None:
                self._placed(worker_id, role).inc()

    def refused(self, error: PdserveError) -> None:
        """It never reached a worker."""
        self._ended(error.reason).inc()

    def ended(self, record: Record) -> None:
        self._ended(record.outcome).inc()
        if record.num_cached_tokens:
            self._cached_tokens.inc(record.num_cached_tokens)
        self._output_tokens.inc(record.num_output_tokens)
        if record.outcome == "ok":
            self._observe_times(record)

    def _observe_times(self, record: Record) -> None:
        """Latencies of requests that ran to their end: those of failed ones would flatter or blur the rest."""
        self._output_length.observe(record.num_output_tokens)
        tokenised, first, started, ended = (
            record.tokenised_s, record.first_token_s, record.decode_started_s, record.ended_s
        )  # fmt: skip
        if tokenised is None or first is None or ended is None:
            return
        self._e2e.observe(ended)
        self._ttft.observe(first)
        per_choice = record.num_output_tokens / record.num_choices
        if per_choice > 1:
            self._itl.observe((ended - first) / (per_choice - 1))
        self._leg["tokenise"].observe(tokenised)
        self._leg["prefill"].observe(first - tokenised)
        if started is not None:
            self._leg["transfer"].observe(started - first)
            self._leg["decode"].observe(ended - started)

    def _bind_ended(self, outcome: str) -> Counter:
        status = {"ok": 200, "cancelled": 499}.get(outcome) or from_fields({"reason": outcome}).http_status
        return self._metrics.requests.labels(self._model, str(status), outcome)


def count_workers(metrics: RouterMetrics, links: Sequence[Link]) -> None:
    """Connected workers by role and state, anew."""
    for role in Role:
        of_role = [link for link in links if link.info.role is role]
        draining = sum(link.draining for link in of_role)
        metrics.workers.labels(role.value, "draining").set(draining)
        metrics.workers.labels(role.value, "ready").set(len(of_role) - draining)


_LEGS = ("tokenise", "prefill", "transfer", "decode")
assert {role.value for role in Role} < set(_LEGS)
