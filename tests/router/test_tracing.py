"""Spans of a request from the router and both workers in one trace, sent by OTLP to a real receiver."""

import asyncio
import sys

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from kvstore.node.client_session import open_session
from kvstore.node.process import NodeStore
from pdserve.config import DiskConfig, KvstoreConfig, TracingConfig
from pdserve.errors import NotSupported, NoWorker
from pdserve.rpc import Channel
from pdserve.tracing import tracer_of
from pdserve.types import Role
from pdserve.wire import store as wire
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


def values_of(span):
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


@pytest.fixture
async def store(receiver, tmp_path):
    """A pool of 32 blocks over a disk: of two prompts of 20 blocks one's tail goes down."""
    config = KvstoreConfig(
        block_bytes=256, num_blocks=32, high_watermark=1.0, low_watermark=1.0, node_id="n1",
        disk=DiskConfig(path=str(tmp_path / "kv")), tracing=receiver.config,
    )  # fmt: skip
    store = NodeStore(config)
    await store.start()
    yield store
    await store.stop()


async def test_what_stores_do_for_a_request_is_in_its_trace(house, sink, incoming, receiver, store, wait_until):
    settings = {"store": store.address, "store_fetch": "always", "store_timeout_s": 60.0, "tracing": receiver.config}
    workers = [await house.worker(Role.PREFILL, name, **settings) for name in ("p0", "p1")]
    decode = await house.worker(Role.DECODE, "d0", tracing=receiver.config)
    for worker in workers:
        await worker.store.link.attached.wait()
    traces = RouterTraces(tracer_of(receiver.config, "pdserve-router", "r0"))
    first, second = [await house.core(addresses=[worker.address, decode.address], traces=traces) for worker in workers]

    async def ask(core, text, trace, stored):
        got = sink()
        handle = core.submit(incoming(text, max_tokens=2, traceparent=trace), got)
        await got.result()
        await wait_until(stored)
        await workers[0].store.publisher.flush()
        await tiers.drain()
        return handle.record.num_fetched_tokens // 16

    dram, tiers = store.parts.dram, store.parts.tiers
    again = PARENT.replace("0af7", "1bf7", 1)
    await ask(first, "secret words " * 25, PARENT, lambda: len(dram.entries) == 20)
    known = set(dram.entries)
    await ask(first, "other words. " * 25, "", lambda: len(tiers.disk) > 0)
    tiers.drop([name for name in dram.entries if name not in known])  # what comes up again finds room
    fetched = await ask(second, "secret words " * 25, again, lambda: True)
    await house.wait_idle()
    await flush(house)
    await store.stop()
    reserve, commit = ([span for span in receiver.named(name) if span.trace_id == TRACE_ID]
                       for name in ("store.reserve", "store.commit"))  # fmt: skip
    requests = {span.trace_id: span.span_id for span in receiver.named("request")}
    assert {span.parent_span_id for span in (*reserve, *commit)} == {requests[TRACE_ID]}
    assert sum(values_of(span)["pdserve.blocks_committed"] for span in commit) == 20
    (found,) = [span for span in receiver.named("store.lookup") if span.trace_id.hex() == again.split("-")[1]]
    assert found.parent_span_id == requests[found.trace_id]
    told = values_of(found)
    assert (told["pdserve.node"], told["pdserve.by_peer"], told["pdserve.blocks_found"]) == ("n1", False, fetched)
    read = receiver.one("store.disk_read")
    assert read.parent_span_id == found.span_id
    assert values_of(read)["pdserve.blocks"] == told["pdserve.blocks_from_disk"] > 0
    fetch = receiver.one("worker.fetch")
    assert (fetch.trace_id, values_of(fetch)) == (found.trace_id, {"pdserve.tier": "dram"})
    services = {service for service, _ in receiver.spans}
    assert services == {"pdserve-router", "pdserve-worker", "pdserve-kvstore"}
    assert not any(b"secret" in span.SerializeToString() for _, span in receiver.spans)


async def test_a_store_tells_of_peers_of_failures_and_of_nothing_without_a_trace(receiver, store):
    channel = Channel(store.address)
    attached, stream = await open_session(channel, wire.Attach("far", "elsewhere"))
    for trace in ("", PARENT):
        lookup = wire.Lookup(attached.session, bytes(16), (b"k" * 16,), traceparent=trace)
        await channel.call(wire.LOOKUP, lookup, timeout_s=60)
        reserve = wire.Reserve(attached.session, bytes(16), (b"k" * 16,), traceparent=trace)
        with pytest.raises(NotSupported):
            await channel.call(wire.RESERVE, reserve, timeout_s=60)
    await stream.aclose()
    await channel.close()
    await store.stop()
    (looked,) = receiver.named("store.lookup")
    assert values_of(looked)["pdserve.by_peer"]
    assert receiver.one("store.reserve").status.message == "not_supported"
    assert {span.trace_id for _, span in receiver.spans} == {TRACE_ID}
    assert not any(b"k" * 16 in span.SerializeToString() for _, span in receiver.spans)


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
    code = (
        "import sys, router.app, worker_core.main, kvstore.node.main; "
        "print([m for m in sys.modules if m.startswith('opentelemetry')])"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    assert (await process.communicate())[0].strip() == b"[]"
    assert tracer_of(TracingConfig(), "s", "i") is None
