"""Traces by OpenTelemetry: spans of a request in every process it passes through, joined by its W3C traceparent.

Off by default: then `tracer_of` gives None, no OpenTelemetry module is imported and a request pays one comparison. On,
spans are made when a request has ended, from times that are kept anyway, and sent by a thread of the SDK. No prompt,
no output and no token id is in any span.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pdserve.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

    from pdserve.config import TracingConfig

Value = str | int | float | bool
SPAN_LIMIT_S = 5
"""For the last spans to leave when a process ends."""


class Tracer:
    """Makes spans of one service and sends them. `exporter`: instead of OTLP, for tests."""

    def __init__(
        self, config: TracingConfig, service: str, instance: str, exporter: SpanExporter | None = None
    ) -> None:
        """Raises `ConfigError` (key "tracing.endpoint") when the packages are missing."""
        try:
            from opentelemetry import propagate, trace
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"tracing needs the package {error.name!r}: pip install 'pdserve[otel]'", key="tracing.endpoint"
            ) from error
        resource = Resource.create({"service.name": service, "service.instance.id": instance})
        self._provider = TracerProvider(ParentBasedTraceIdRatio(config.sample_ratio), resource)
        sent_by = exporter or OTLPSpanExporter(config.endpoint, insecure=not config.tls)
        self._provider.add_span_processor(BatchSpanProcessor(sent_by))
        self._tracer = self._provider.get_tracer("pdserve")
        self._trace, self._propagate = trace, propagate

    def begin(self, name: str, traceparent: str, start_ns: int) -> Span:
        """A span that will have others below it; end it with `end`. An empty or wrong `traceparent` starts a trace."""
        parent = self._propagate.extract({"traceparent": traceparent} if traceparent else {})
        return self._tracer.start_span(name, parent, start_time=start_ns)

    def traceparent(self, span: Span) -> str:
        """What the next process is given."""
        carrier: dict[str, str] = {}
        self._propagate.inject(carrier, self._trace.set_span_in_context(span))
        return carrier.get("traceparent", "")

    def end(self, span: Span, end_ns: int, attributes: Mapping[str, Value], error: str = "") -> None:
        span.set_attributes(dict(attributes))
        if error:
            span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, error))
        span.end(end_ns)

    def child(self, span: Span, name: str, start_ns: int, end_ns: int, attributes: Mapping[str, Value]) -> None:
        """A finished part of `span`."""
        context = self._trace.set_span_in_context(span)
        part = self._tracer.start_span(name, context, attributes=dict(attributes), start_time=start_ns)
        part.end(max(start_ns, end_ns))

    def close(self) -> None:
        """Send what is left. Blocks, at most `SPAN_LIMIT_S`."""
        self._provider.force_flush(SPAN_LIMIT_S * 1000)
        self._provider.shutdown()


def tracer_of(config: TracingConfig, service: str, instance: str) -> Tracer | None:
    """None where tracing is off."""
    return Tracer(config, service, instance) if config.endpoint else None
