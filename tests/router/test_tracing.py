"""Spans of a request from the router and both workers in one trace, sent by OTLP to a real receiver."""

import asyncio
import sys

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from pdserve.config import TracingConfig
from pdserve.errors import NoWorker
from pdserve.tracing import tracer_of
from pdserve.types import Role
from router.traces import RouterTraces

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TRACE_ID = bytes.fromhex(PARENT.split("-")[1])


class Receiver:
    def __init__(self):
        self.spans = []

    async def export(self, data, context):
        for resource in ExportTraceServiceRequest.FromString(data).resource_spans:
            service = {a.key: a.value.string_value for a in resource.resource.attributes}["service.name"]
            for scope in resource.scope_spans:
                self.spans += [(service, span) for span in scope.spans]
        return ExportTraceServiceResponse().SerializeToString()

    def named(self, name):
        return [span for _, span in self.spans if span.name == name]

    def one(self, name):
        (span,) = self.named(name)
        return span


@pytest.fixture
async def receiver():
    server, receiver = grpc.aio.server(), Receiver()
    handlers = {"Export": grpc.unary_unary_rpc_method_handler(receiver.export)}
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("opentelemetry.proto.collector.trace.v1.TraceService", handlers),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    receiver.config = TracingConfig(endpoint=f"http://127.0.0.1:{port}")
    yield receiver
    await server.stop(None)


async def traced_house(house, receiver):
    for role, name in ((Role.PREFILL, "p0"), (Role.DECODE, "d0")):
        await house.worker(role, name, tracing=receiver.config)
    return await house.core(traces=RouterTraces(tracer_of(receiver.config, "pdserve-router", "r0")))


async def flush(house):
    for traces in (house.cores[0]._traces, *(worker.jobs.traces for worker in house.workers)):
        await asyncio.to_thread(traces.close)


async def test_one_trace_goes_through_all_processes(house, sink, incoming, receiver):
    core, got = await traced_house(house, receiver), sink()
    handle = core.submit(incoming("secret words " * 20, max_tokens=6, traceparent=PARENT), got)
    await got.result()
    await house.wait_idle()
    await flush(house)
    assert {span.trace_id for _, span in receiver.spans} == {TRACE_ID}
    request = receiver.one("request")
    assert request.parent_span_id.hex() == PARENT.split("-")[2]
    for name in ("tokenise", "queue", "prefill", "transfer", "queue_decode", "decode", "worker.prefill"):
        span = receiver.one(name)
        assert span.parent_span_id == request.span_id
        assert request.start_time_unix_nano <= span.end_time_unix_nano
    at_decode = next(span for span in receiver.named("worker.decode") if span.parent_span_id == request.span_id)
    assert receiver.one("worker.pull").parent_span_id == at_decode.span_id
    values = {attribute.key: attribute.value for attribute in request.attributes}
    assert values["pdserve.request_id"].string_value == handle.request_id
    assert values["gen_ai.usage.output_tokens"].int_value == 6
    assert not any(b"secret" in span.SerializeToString() for _, span in receiver.spans)


async def test_a_refused_request_has_a_span_that_says_so(house, sink, incoming, receiver):
    core = await traced_house(house, receiver)
    for link in house.fleets[0].links:
        link.draining = True
    house.fleets[0].changed()
    with pytest.raises(NoWorker):
        core.submit(incoming(), sink())
    await flush(house)
    assert receiver.one("request").status.message == "no_worker"


async def test_a_caller_that_does_not_sample_gets_no_spans(house, sink, incoming, receiver):
    core, got = await traced_house(house, receiver), sink()
    core.submit(incoming(traceparent=PARENT[:-1] + "0"), got)
    await got.result()
    await house.wait_idle()
    await flush(house)
    assert not receiver.spans


async def test_without_an_endpoint_nothing_is_loaded():
    code = "import sys, router.app, worker_core.main; print([m for m in sys.modules if m.startswith('opentelemetry')])"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    assert (await process.communicate())[0].strip() == b"[]"
    assert tracer_of(TracingConfig(), "s", "i") is None
