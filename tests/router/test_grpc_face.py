"""Both gRPC faces, called with generated stubs as any client would."""

import asyncio
import json
import struct

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from pdserve.engine.sim import expected_tokens
from pdserve.engine.timing import LinearTiming
from pdserve.oip import open_inference_pb2 as oip
from pdserve.oip.open_inference_pb2_grpc import GRPCInferenceServiceStub
from pdserve.rpc import RpcServer
from pdserve.v1 import common_pb2 as common
from pdserve.v1 import inference_service_pb2 as pb
from pdserve.v1.inference_service_pb2_grpc import InferenceServiceStub
from router.grpc_face import InferenceFace
from router.grpc_sink import BatchSink
from router.oip_face import OpenInferenceFace

SLOW = LinearTiming(0, 0, 0, 5.0, 0, 0)


class Served:
    def __init__(self, house, core, channel):
        self.house, self.core, self.channel = house, core, channel
        self.ours = InferenceServiceStub(channel)
        self.oip = GRPCInferenceServiceStub(channel)

    def expected(self, request_id, choice=0):
        return expected_tokens(self.house.sim, self.requests[request_id], choice)


@pytest.fixture
async def serve(house):
    closing = []

    async def start(timing=None, **options):
        await house.pair(timing)
        core = await house.core(**options)
        server = RpcServer("127.0.0.1:0", max_message_bytes=1 << 20)
        InferenceFace(core, 1 << 20).add_to(server)
        OpenInferenceFace(core, 1 << 20, "1.2.3").add_to(server)
        port = await server.start()
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        closing.append((channel, server))
        served = Served(house, core, channel)
        served.requests = {}
        submit = core.submit

        def remember(incoming, sink):
            handle = submit(incoming, sink)
            served.requests[handle.request_id] = handle.request
            return handle

        core.submit = remember
        return served

    yield start
    for channel, server in closing:
        await channel.close()
        await server.stop(0)


def ask(prompt="hello", model="tiny", **params):
    given = {"max_tokens": 8, "temperature": 0.0, **params}
    return pb.GenerateRequest(model=model, prompt=prompt, params=common.SamplingParams(**given))


def error_info(error):
    status = Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    info = ErrorInfo()
    assert status.details[0].Unpack(info)
    return info


async def read_all(call):
    while await call.read():
        pass


# ---- pdserve.v1.InferenceService ----


async def test_generate_streams_tokens_text_and_usage(serve):
    served = await serve()
    chunks = [chunk async for chunk in served.ours.Generate(ask("x" * 60, n=2, max_tokens=9))]
    request_id = chunks[0].request_id
    for choice in range(2):
        deltas = [delta for chunk in chunks for delta in chunk.choices if delta.index == choice]
        token_ids = [token_id for delta in deltas for token_id in delta.token_ids]
        assert token_ids == served.expected(request_id, choice)
        assert "".join(delta.text for delta in deltas) == served.house.tokenizer.decode(token_ids)
        assert deltas[-1].finish_reason == common.FINISH_REASON_LENGTH
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (60, 18)
    assert {chunk.request_id for chunk in chunks} == {request_id}


async def test_generate_takes_chat_and_token_ids(serve):
    served = await serve()
    chat = pb.GenerateRequest(
        model="tiny", params=common.SamplingParams(max_tokens=1),
        chat=pb.ChatMessages(messages=[pb.ChatMessage(role="u", content="hi")]),
    )  # fmt: skip
    ids = pb.GenerateRequest(
        model="tiny", request_id="mine", params=common.SamplingParams(max_tokens=1),
        prompt_token_ids=common.TokenIds(token_ids=struct.pack("<3I", 5, 6, 7)),
    )  # fmt: skip
    for request in (chat, ids):
        chunks = [chunk async for chunk in served.ours.Generate(request)]
        assert chunks[-1].usage.completion_tokens == 1
    assert served.requests["mine"].prompt_token_ids == (5, 6, 7)


async def test_generate_gives_logprobs_with_their_tokens(serve):
    served = await serve()
    chunks = [chunk async for chunk in served.ours.Generate(ask(logprobs=2, max_tokens=4))]
    deltas = [delta for chunk in chunks for delta in chunk.choices]
    entries = [entry for delta in deltas for entry in delta.logprobs]
    assert [entry.token_id for entry in entries] == [token_id for delta in deltas for token_id in delta.token_ids]
    assert all(len(entry.top) == 2 and entry.top[0].token_id == entry.token_id for entry in entries)


@pytest.mark.parametrize(
    ("request_", "code", "reason", "param"),
    [
        (ask(model="nope"), grpc.StatusCode.NOT_FOUND, "model_not_found", "model"),
        (ask(""), grpc.StatusCode.INVALID_ARGUMENT, "invalid_value", "prompt"),
        (ask(temperature=-1.0), grpc.StatusCode.INVALID_ARGUMENT, "invalid_value", "temperature"),
        (ask(temperature=float("nan")), grpc.StatusCode.INVALID_ARGUMENT, "invalid_value", "temperature"),
        (ask(max_tokens=0), grpc.StatusCode.INVALID_ARGUMENT, "invalid_value", "max_tokens"),
        (ask(n=0), grpc.StatusCode.INVALID_ARGUMENT, "invalid_value", "n"),
        (ask("x" * 5000), grpc.StatusCode.INVALID_ARGUMENT, "context_length_exceeded", "prompt"),
        (pb.GenerateRequest(model="tiny"), grpc.StatusCode.INVALID_ARGUMENT, "invalid_value", "prompt"),
        (
            pb.GenerateRequest(model="tiny", prompt_token_ids=common.TokenIds(token_ids=b"abc")),
            grpc.StatusCode.INVALID_ARGUMENT, "invalid_value", "prompt_token_ids",
        ),
        (ask("x" * (3 << 20)), grpc.StatusCode.RESOURCE_EXHAUSTED, "payload_too_large", "Generate"),
    ],
)  # fmt: skip
async def test_generate_refuses_with_a_status_and_error_info(serve, request_, code, reason, param):
    served = await serve()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in served.ours.Generate(request_):
            pass
    info = error_info(caught.value)
    assert (caught.value.code(), info.reason, info.metadata["param"]) == (code, reason, param)
    assert [chunk async for chunk in served.ours.Generate(ask())]  # the server is unharmed


async def test_a_lost_worker_ends_the_stream_with_its_status_after_the_tokens(serve):
    served = await serve(SLOW)
    call = served.ours.Generate(ask(max_tokens=2000))
    for _ in range(4):
        assert (await call.read()).choices
    await served.house.workers[1]._server._server.stop(0)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read_all(call)
    info = error_info(caught.value)
    assert (info.reason, info.metadata["leg"], info.metadata["work_done"]) == ("worker_lost", "decode", "true")
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_client_that_cancels_frees_both_workers(serve):
    served = await serve(SLOW)
    call = served.ours.Generate(ask(max_tokens=2000))
    await call.read()
    call.cancel()
    await served.house.wait_idle()
    assert served.core.admission.num_inflight == 0


async def test_a_clients_deadline_frees_both_workers(serve, wait_until):
    served = await serve(SLOW)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in served.ours.Generate(ask(max_tokens=2000), timeout=0.2):
            pass
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await wait_until(lambda: served.core.admission.num_inflight == 0)
    await served.house.wait_idle()


async def test_list_models(serve):
    served = await serve(models={"tiny": ("alias",)})
    models = (await served.ours.ListModels(pb.ListModelsRequest())).models
    assert [(model.name, model.max_model_len) for model in models] == [("tiny", 4096), ("alias", 4096)]


# ---- inference.GRPCInferenceService ----


def tensor(name, *values):
    if isinstance(values[0], bool):
        contents = oip.InferTensorContents(bool_contents=values)
        return oip.ModelInferRequest.InferInputTensor(
            name=name, datatype="BOOL", shape=[len(values)], contents=contents
        )
    contents = oip.InferTensorContents(bytes_contents=values)
    return oip.ModelInferRequest.InferInputTensor(name=name, datatype="BYTES", shape=[len(values)], contents=contents)


def infer(*inputs, name_="", **parameters):
    request = oip.ModelInferRequest(model_name="tiny", id=name_, inputs=inputs)
    for name, value in {"max_tokens": 8, "temperature": 0.0, **parameters}.items():
        kind = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}[type(value)]
        setattr(request.parameters[name], kind, value)
    return request


def output(response, name):
    found = next(each for each in response.outputs if each.name == name)
    return [value.decode() for value in found.contents.bytes_contents]


async def test_server_and_model_metadata(serve):
    served = await serve()
    assert (await served.oip.ServerLive(oip.ServerLiveRequest())).live
    assert (await served.oip.ServerReady(oip.ServerReadyRequest())).ready
    metadata = await served.oip.ServerMetadata(oip.ServerMetadataRequest())
    assert (metadata.name, metadata.version) == ("pdserve", "1.2.3")
    assert (await served.oip.ModelReady(oip.ModelReadyRequest(name="tiny"))).ready
    assert not (await served.oip.ModelReady(oip.ModelReadyRequest(name="tiny", version="9"))).ready
    assert not (await served.oip.ModelReady(oip.ModelReadyRequest(name="nope"))).ready
    model = await served.oip.ModelMetadata(oip.ModelMetadataRequest(name="tiny"))
    assert {each.name: each.datatype for each in model.inputs}["text_input"] == "BYTES"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.oip.ModelMetadata(oip.ModelMetadataRequest(name="nope"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_model_infer_answers_at_once(serve):
    served = await serve()
    answer = await served.oip.ModelInfer(infer(tensor("text_input", b"hello"), name_="q1", n=2))
    want = [served.house.tokenizer.decode(served.expected("q1", choice)) for choice in range(2)]
    assert output(answer, "text_output") == want
    assert output(answer, "finish_reason") == ["length", "length"]
    assert answer.id == "q1"
    assert answer.parameters["completion_tokens"].int64_param == 16


async def test_raw_contents_and_json_sampling_parameters(serve):
    served = await serve()
    request = oip.ModelInferRequest(model_name="tiny", id="q2")
    for name, datatype in (("text_input", "BYTES"), ("stream", "BOOL"), ("sampling_parameters", "BYTES")):
        request.inputs.add(name=name, datatype=datatype, shape=[1])
    sampling = json.dumps({"max_tokens": 5, "temperature": "0", "stop": ["zz"]}).encode()
    for raw in (struct.pack("<I", 2) + b"hi", b"\0", struct.pack("<I", len(sampling)) + sampling):
        request.raw_input_contents.append(raw)
    answer = await served.oip.ModelInfer(request)
    assert output(answer, "text_output") == [served.house.tokenizer.decode(served.expected("q2"))]
    assert served.requests["q2"].params.stop == ("zz",)


BAD = [
    (infer(), "text_input"),
    (infer(tensor("text_input", b"a", b"b")), "text_input"),
    (infer(tensor("text_input", b"\xff")), "text_input"),
    (infer(tensor("text_input", True)), "text_input"),
    (infer(tensor("text_input", b"a"), tensor("prompt", b"a")), "text_input"),
    (infer(tensor("text_input", b"a"), tensor("text_input", b"a")), "inputs"),
    (infer(tensor("image", b"a")), "image"),
    (infer(tensor("text_input", b"a"), tensor("streaming", True)), "streaming"),
    (infer(tensor("text_input", b"a"), tensor("sampling_parameters", b"{")), "sampling_parameters"),
    (infer(tensor("text_input", b"a"), temperture=1.0), "temperture"),
    (infer(tensor("text_input", b"a"), max_tokens=1.5), "max_tokens"),
    (infer(tensor("text_input", b"a"), max_tokens=0), "max_tokens"),
    (infer(tensor("text_input", b"a"), stop="[1]"), "stop"),
    (
        oip.ModelInferRequest(
            model_name="tiny", raw_input_contents=[b"\x09\0\0\0a"],
            inputs=[oip.ModelInferRequest.InferInputTensor(name="text_input", datatype="BYTES", shape=[1])],
        ),
        "text_input",
    ),
    (oip.ModelInferRequest(model_name="tiny", raw_input_contents=[b"a"]), "raw_input_contents"),
    (
        oip.ModelInferRequest(
            model_name="tiny", inputs=[oip.ModelInferRequest.InferInputTensor(name="text_input", datatype="FP32")]
        ),
        "text_input",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("request_", "param"), BAD)
async def test_bad_tensors_and_parameters_are_refused_by_name(serve, request_, param):
    served = await serve()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.oip.ModelInfer(request_)
    assert caught.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED)
    assert error_info(caught.value).metadata["param"] == param


async def test_a_stream_answers_several_requests_each_to_its_end(serve):
    served = await serve()
    call = served.oip.ModelStreamInfer()
    for name, streaming in (("s1", True), ("s2", True), ("w", False)):
        await call.write(infer(tensor("text_input", name.encode()), tensor("streaming", streaming), name_=name))
    await call.write(infer(tensor("image", b"a"), name_="bad"))
    await call.done_writing()
    answers = {}
    async for answer in call:
        answers.setdefault(answer.infer_response.id, []).append(answer)
    for name in ("s1", "s2", "w"):
        text = "".join("".join(output(each.infer_response, "text_output")) for each in answers[name])
        assert text == served.house.tokenizer.decode(served.expected(name))
        finals = [each.infer_response.parameters["triton_final_response"].bool_param for each in answers[name]]
        assert finals == [False] * (len(finals) - 1) + [True]
        assert output(answers[name][-1].infer_response, "finish_reason") == ["length"]
    assert len(answers["s1"]) > 1
    assert len(answers["w"]) == 1
    assert answers["bad"][0].error_message.startswith("invalid_value: unknown input 'image'")
    assert answers["bad"][0].infer_response.parameters["param"].string_param == "image"


async def test_a_stream_whose_client_goes_frees_everything(serve, wait_until):
    served = await serve(SLOW)
    call = served.oip.ModelStreamInfer()
    for name in ("a", "b"):
        await call.write(infer(tensor("text_input", b"x"), tensor("streaming", True), name_=name, max_tokens=2000))
    await call.read()
    call.cancel()
    await wait_until(lambda: served.core.admission.num_inflight == 0)
    await served.house.wait_idle()


async def test_a_unary_call_whose_client_goes_frees_everything(serve, wait_until):
    served = await serve(SLOW)
    call = served.oip.ModelInfer(infer(tensor("text_input", b"x"), max_tokens=2000))
    await wait_until(lambda: served.core.admission.num_inflight == 1)
    call.cancel()
    await wait_until(lambda: served.core.admission.num_inflight == 0)
    await served.house.wait_idle()


# ---- the sink between ----


async def test_a_slow_client_is_cut_off_and_told():
    class Cancelled:
        cancels = 0

        def cancel(self):
            self.cancels += 1

    sink = BatchSink(100)
    sink.handle = Cancelled()
    for _ in range(20):
        sink.on_tokens(0, "word", (1,), ())
        if sink.handle.cancels:
            break
    assert sink.handle.cancels == 1
    assert (await sink.next()).deltas[0].texts
    with pytest.raises(Exception, match="reads too slowly") as caught:
        await sink.next()
    assert caught.value.reason == "overloaded"


async def test_what_gathers_while_a_client_reads_is_one_batch():
    sink = BatchSink(None)
    waiting = asyncio.ensure_future(sink.next())
    await asyncio.sleep(0)
    sink.on_tokens(0, "a", (1,), ())
    sink.on_tokens(0, "b", (2,), ())
    sink.on_tokens(1, "c", (3,), ())
    batch = await waiting
    assert (batch.deltas[0].text, batch.deltas[0].token_ids, batch.deltas[1].text) == ("ab", [1, 2], "c")
