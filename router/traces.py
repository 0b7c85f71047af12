"""A request's spans at the router, made from its record once it has ended."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from pdserve.tracing import Tracer, Value
from pdserve.types import Request
from router.catalog import Attempt, Record

if TYPE_CHECKING:
    from opentelemetry.trace import Span

Part = tuple[str, float, float, dict[str, Value]]
"""Name, start and end in seconds since arrival, attributes."""


class RouterTraces:
    """Names of attributes are OpenTelemetry's for generative AI where there is one."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def begin(self, request: Request, record: Record) -> tuple[Span, Request]:
        """The request's span, and the request as workers get it: with that span for a parent."""
        span = self._tracer.begin("request", request.traceparent, _ns(record, 0.0))
        return span, replace(request, traceparent=self._tracer.traceparent(span))

    def end(self, span: Span, record: Record) -> None:
        if span.is_recording():
            for name, start, end, attributes in parts(record):
                self._tracer.child(span, name, _ns(record, start), _ns(record, end), attributes)
        failed = "" if record.outcome in ("ok", "cancelled") else record.outcome
        self._tracer.end(span, _ns(record, record.ended_s or 0.0), _attributes(record), failed)

    def refused(self, span: Span, record: Record, reason: str) -> None:
        record.outcome = reason
        self._tracer.end(span, _ns(record, record.tokenised_s or 0.0), _attributes(record), reason)

    def close(self) -> None:
        self._tracer.close()


def parts(record: Record) -> Iterator[Part]:
    """Its legs, one after the other; those of every placement."""
    tokenised = record.tokenised_s or 0.0
    yield "tokenise", 0.0, tokenised, {}
    for number, attempt in enumerate(record.attempts, 1):
        base: dict[str, Value] = {"pdserve.placement": number}
        yield "queue", attempt.bound_s - attempt.waited_s, attempt.bound_s, base
        yield from _legs(attempt, base)


def _legs(attempt: Attempt, base: dict[str, Value]) -> Iterator[Part]:
    first, ended = attempt.first_token_s, attempt.ended_s
    if first is None or ended is None:
        return
    worker, _ = attempt.computes
    yield "prefill", attempt.bound_s, first, {**base, "pdserve.worker": worker}
    started = attempt.decode_started_s
    if attempt.link is None or started is None:
        yield "decode", first, ended, {**base, "pdserve.worker": worker}
        return
    arrived = max(first, min(attempt.kv_arrived_s or started, started))
    decode = {**base, "pdserve.worker": attempt.link[1]}
    yield "transfer", first, arrived, decode
    yield "queue_decode", arrived, started, decode
    yield "decode", started, ended, decode


def _attributes(record: Record) -> dict[str, Value]:
    return {
        "gen_ai.request.model": record.model,
        "gen_ai.usage.input_tokens": record.num_prompt_tokens,
        "gen_ai.usage.output_tokens": record.num_output_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.num_cached_tokens,
        "pdserve.request_id": record.request_id,
        "pdserve.outcome": record.outcome,
        "pdserve.policy": record.policy,
        "pdserve.placements": len(record.attempts),
    }


def _ns(record: Record, age_s: float) -> int:
    return int((record.arrived_at + age_s) * 1e9)
