"""Turns an ended request into metrics. Labels are bound once; nothing here runs per token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from pdserve.errors import PdserveError, from_fields
from pdserve.loop_metrics import CounterChild
from pdserve.metrics import RouterMetrics
from pdserve.types import Role
from router.catalog import Attempt, Record
from router.session import Link


class Observer:
    """Metrics of one served model."""

    def __init__(self, metrics: RouterMetrics, model: str) -> None:
        self._metrics = metrics
        self._model = model
        self._ttft = metrics.ttft.labels(model)
        self._itl = metrics.itl.labels(model)
        self._e2e = metrics.e2e.labels(model)
        self._prompt_length = metrics.prompt_length.labels(model)
        self._output_length = metrics.output_length.labels(model)
        self._prompt_tokens = metrics.prompt_tokens.labels(model)
        self._cached_tokens = metrics.cached_tokens.labels(model)
        self._output_tokens = metrics.output_tokens.labels(model)
        self._forecast_error = metrics.forecast_error.labels(model)
        self._stall_spared = metrics.stall_spared.labels(model)
        self._transfer_spent = metrics.transfer_spent.labels(model)
        self._leg = {leg: metrics.leg_seconds.labels(model, leg) for leg in _LEGS}
        self._placed = lru_cache(maxsize=1024)(lambda worker_id, role: metrics.placements.labels(worker_id, role))
        self._ended = lru_cache(maxsize=64)(self._bind_ended)

    def admitted(self, record: Record) -> None:
        self._prompt_tokens.inc(record.num_prompt_tokens)
        self._prompt_length.observe(record.num_prompt_tokens)

    def refused(self, error: PdserveError) -> None:
        """It never reached a worker."""
        self._ended(error.reason).inc()

    def ended(self, record: Record) -> None:
        self._ended(record.outcome).inc()
        if record.num_cached_tokens:
            self._cached_tokens.inc(record.num_cached_tokens)
        self._output_tokens.inc(record.num_output_tokens)
        for attempt in record.attempts:
            self._observe_placement(attempt)
        for failed in record.attempts[:-1]:
            self._metrics.retries.labels(self._model, failed.outcome).inc()
        if record.outcome == "ok" and record.attempts:
            self._observe_times(record, record.attempts[-1])

    def _observe_placement(self, attempt: Attempt) -> None:
        if attempt.prefill_worker is not None:
            self._placed(attempt.prefill_worker, "prefill").inc()
        if attempt.decode_worker is not None:
            self._placed(attempt.decode_worker, "decode").inc()
        if reason := attempt.alone:
            self._metrics.alone.labels(self._model, reason).inc()

    def _observe_times(self, record: Record, last: Attempt) -> None:
        """Latencies of requests that ran to their end: those of failed ones would flatter or blur the rest. Of one that
        was placed again, the legs are those of its last placement."""
        self._output_length.observe(record.num_output_tokens)
        tokenised, first, ended = record.tokenised_s, record.first_token_s, record.ended_s
        if tokenised is None or first is None or ended is None:
            return
        self._e2e.observe(ended)
        self._ttft.observe(first)
        per_choice = record.num_output_tokens / record.num_choices
        if per_choice > 1:
            self._itl.observe((ended - first) / (per_choice - 1))
        self._leg["tokenise"].observe(tokenised)
        self._leg["queue_prefill"].observe(last.waited_s)
        if last.first_token_s is not None:
            self._observe_legs(last, last.first_token_s, ended)

    def _observe_legs(self, last: Attempt, first: float, ended: float) -> None:
        self._leg["prefill"].observe(first - last.bound_s)
        if last.forecast.ttft_s > 0:
            self._forecast_error.observe((first - last.bound_s) / last.forecast.ttft_s)
        started = last.decode_started_s
        if started is None:
            return
        arrived = max(first, min(last.kv_arrived_s or started, started))
        self._leg["transfer"].observe(arrived - first)
        self._leg["queue_decode"].observe(started - arrived)
        self._leg["decode"].observe(ended - started)
        self._transfer_spent.inc(started - first)
        self._stall_spared.inc(last.spared_s)

    def _bind_ended(self, outcome: str) -> CounterChild:
        status = {"ok": 200, "cancelled": 499}.get(outcome) or from_fields({"reason": outcome}).http_status
        return self._metrics.requests.labels(self._model, str(status), outcome)


def count_workers(metrics: RouterMetrics, links: Sequence[Link]) -> None:
    """Connected workers by role and state, anew."""
    for role in Role:
        of_role = [link for link in links if link.info.role is role]
        draining = sum(link.draining for link in of_role)
        metrics.workers.labels(role.value, "draining").set(draining)
        metrics.workers.labels(role.value, "ready").set(len(of_role) - draining)


_LEGS = ("tokenise", "queue_prefill", "prefill", "transfer", "queue_decode", "decode")
assert {role.value for role in Role} < set(_LEGS)
