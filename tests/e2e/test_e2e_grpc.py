"""Generated gRPC clients against the whole cluster: our own service, Open Inference Protocol, health, reflection."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from e2e_tools import MODEL, all_blocks_free, eventually, sim_tokens
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from pdserve.oip import open_inference_pb2 as oip
from pdserve.oip import open_inference_pb2_grpc as oip_grpc
from pdserve.v1 import common_pb2 as common
from pdserve.v1 import inference_service_pb2 as pb
from pdserve.v1 import inference_service_pb2_grpc as pb_grpc
from pdserve_cli.cluster import Cluster

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

PROMPT = list(range(100, 200))


@pytest_asyncio.fixture(loop_scope="session")
async def channel(sim_cluster: Cluster) -> AsyncIterator[grpc.aio.Channel]:
    options = [("grpc.enable_http_proxy", 0), ("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(sim_cluster.grpc_address, options=options) as made:
        yield made


@pytest.fixture
def inference(channel: grpc.aio.Channel) -> pb_grpc.InferenceServiceStub:
    return pb_grpc.InferenceServiceStub(channel)


@pytest.fixture
def open_inference(channel: grpc.aio.Channel) -> oip_grpc.GRPCInferenceServiceStub:
    return oip_grpc.GRPCInferenceServiceStub(channel)


def token_ids(ids: list[int]) -> common.TokenIds:
    return common.TokenIds(token_ids=b"".join(i.to_bytes(4, "little") for i in ids))


def generate(ids: list[int] = PROMPT, **params: Any) -> pb.GenerateRequest:
    given = {"max_tokens": 12, "temperature": 0, "ignore_eos": True, **params}
    return pb.GenerateRequest(model=MODEL, prompt_token_ids=token_ids(ids), params=common.SamplingParams(**given))


def error_info(error: grpc.aio.AioRpcError) -> ErrorInfo:
    (raw,) = [value for key, value in error.trailing_metadata() if key == "grpc-status-details-bin"]
    info = ErrorInfo()
    (detail,) = Status.FromString(raw).details
    assert detail.Unpack(info)
    return info


def infer(text: str, request_id: str = "", stream: bool = False, **parameters: Any) -> oip.ModelInferRequest:
    request = oip.ModelInferRequest(model_name=MODEL, id=request_id)
    given = {"temperature": 0.0, "max_tokens": 6, "ignore_eos": True, **parameters}
    for name, value in given.items():
        kind = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}[type(value)]
        setattr(request.parameters[name], kind, value)
    tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(text.encode())
    if stream:
        flag = request.inputs.add(name="streaming", datatype="BOOL", shape=[1])
        flag.contents.bool_contents.append(True)
    return request


def output(response: oip.ModelInferResponse, name: str) -> list[bytes]:
    position = [tensor.name for tensor in response.outputs].index(name)
    if not response.raw_output_contents:
        return list(response.outputs[position].contents.bytes_contents)
    raw, values = response.raw_output_contents[position], []
    while raw:
        size = int.from_bytes(raw[:4], "little")
        values.append(raw[4 : 4 + size])
        raw = raw[4 + size :]
    return values


async def test_generate_streams_the_expected_tokens_and_usage_last(inference: pb_grpc.InferenceServiceStub) -> None:
    messages = [message async for message in inference.Generate(generate())]
    tokens = [token for message in messages for choice in message.choices for token in choice.token_ids]
    assert tokens == sim_tokens(PROMPT, max_tokens=12, temperature=0, ignore_eos=True)
    assert messages[-1].choices[-1].finish_reason == common.FINISH_REASON_LENGTH
    assert (messages[-1].usage.prompt_tokens, messages[-1].usage.completion_tokens) == (100, 12)
    assert len({message.request_id for message in messages}) == 1


async def test_generate_takes_text_and_chat(inference: pb_grpc.InferenceServiceStub) -> None:
    params = common.SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="hello")])
    for request in (
        pb.GenerateRequest(model=MODEL, prompt="hello there", params=params),
        pb.GenerateRequest(model=MODEL, chat=chat, params=params, request_id="chosen-1"),
    ):
        messages = [message async for message in inference.Generate(request)]
        assert "".join(choice.text for message in messages for choice in message.choices)
        assert messages[-1].usage.completion_tokens == 4
    assert messages[0].request_id == "chosen-1"


async def test_generate_gives_logprobs_and_choices(inference: pb_grpc.InferenceServiceStub) -> None:
    request = generate(n=2, seed=9, temperature=1.0, logprobs=2, max_tokens=3)
    deltas = [choice async for message in inference.Generate(request) for choice in message.choices]
    for index in (0, 1):
        entries = [entry for delta in deltas if delta.index == index for entry in delta.logprobs]
        ids = [token for delta in deltas if delta.index == index for token in delta.token_ids]
        assert [entry.token_id for entry in entries] == ids
        assert ids == sim_tokens(
            PROMPT, n=2, seed=9, temperature=1.0, logprobs=2, max_tokens=3, ignore_eos=True, choice=index
        )
        assert all(len(entry.top) == 2 and entry.logprob <= 0 for entry in entries)


@pytest.mark.parametrize(
    ("request_", "code", "reason", "param"),
    [
        (generate(temperature=-1), "INVALID_ARGUMENT", "invalid_value", "temperature"),
        (generate(max_tokens=0), "INVALID_ARGUMENT", "invalid_value", "max_tokens"),
        (generate(temperature=float("nan")), "INVALID_ARGUMENT", "invalid_value", "temperature"),
        (generate([]), "INVALID_ARGUMENT", "invalid_value", "prompt"),
        (generate([2**31]), "INVALID_ARGUMENT", "invalid_value", "prompt"),
        (generate(max_tokens=10**6), "INVALID_ARGUMENT", "context_length_exceeded", "max_tokens"),
        (pb.GenerateRequest(model="none", prompt="x"), "NOT_FOUND", "model_not_found", "model"),
        (pb.GenerateRequest(model=MODEL), "INVALID_ARGUMENT", "invalid_value", "prompt"),
        (pb.GenerateRequest(model=MODEL, prompt=""), "INVALID_ARGUMENT", "invalid_value", "prompt"),
        (
            pb.GenerateRequest(model=MODEL, prompt="x" * (9 << 20)),
            "RESOURCE_EXHAUSTED",
            "payload_too_large",
            "Generate",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else "",
)
async def test_errors_carry_status_and_error_info(
    inference: pb_grpc.InferenceServiceStub, request_: pb.GenerateRequest, code: str, reason: str, param: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        [message async for message in inference.Generate(request_)]
    info = error_info(caught.value)
    assert (caught.value.code().name, info.reason, info.domain) == (code, reason, "pdserve")
    assert info.metadata["param"] == param
    assert info.metadata["retryable"] == "false"
    assert [message async for message in inference.Generate(generate())]


async def test_a_message_beyond_all_limits_is_refused_and_harms_nobody(
    inference: pb_grpc.InferenceServiceStub,
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        [m async for m in inference.Generate(pb.GenerateRequest(model=MODEL, prompt="x" * (20 << 20)))]
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert [message async for message in inference.Generate(generate())]


async def test_a_cancelled_call_frees_both_workers(
    inference: pb_grpc.InferenceServiceStub, sim_cluster: Cluster
) -> None:
    call = inference.Generate(generate(max_tokens=50_000))
    assert await call.read() is not grpc.aio.EOF
    call.cancel()
    await all_blocks_free(sim_cluster)


async def test_models_are_listed(inference: pb_grpc.InferenceServiceStub) -> None:
    (model,) = (await inference.ListModels(pb.ListModelsRequest())).models
    assert (model.name, model.vocab_size) == (MODEL, 49_152)


async def test_open_inference_answers_once(open_inference: oip_grpc.GRPCInferenceServiceStub) -> None:
    response = await open_inference.ModelInfer(infer("hello there", "call-1"))
    assert (response.id, response.model_name) == ("call-1", MODEL)
    (text,) = output(response, "text_output")
    assert text.decode()
    assert output(response, "finish_reason") == [b"length"]
    assert response.parameters["completion_tokens"].int64_param == 6


async def test_open_inference_streams_several_requests_on_one_stream(
    open_inference: oip_grpc.GRPCInferenceServiceStub,
) -> None:
    call = open_inference.ModelStreamInfer()
    for number in range(3):
        await call.write(infer(f"request {number}", f"r{number}", stream=True))
    await call.write(infer("bad", "r3", stream=True, temperature=-1.0))
    await call.done_writing()
    texts: dict[str, str] = {}
    errors: dict[str, oip.ModelStreamInferResponse] = {}
    finals = []
    async for response in call:
        answer = response.infer_response
        if answer.parameters["triton_final_response"].bool_param:
            finals.append(answer.id)
        if response.error_message:
            errors[answer.id] = response
        else:
            texts[answer.id] = texts.get(answer.id, "") + b"".join(output(answer, "text_output")).decode()
    assert sorted(finals) == ["r0", "r1", "r2", "r3"]
    assert set(errors) == {"r3"}
    assert errors["r3"].infer_response.parameters["param"].string_param == "temperature"
    for number in range(3):
        (alone,) = output(await open_inference.ModelInfer(infer(f"request {number}")), "text_output")
        assert texts[f"r{number}"] == alone.decode()


async def test_open_inference_errors_are_typed(open_inference: oip_grpc.GRPCInferenceServiceStub) -> None:
    bad = infer("x")
    bad.inputs[0].name = "pixels"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await open_inference.ModelInfer(bad)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error_info(caught.value).metadata["param"] == "pixels"


async def test_open_inference_tells_of_server_and_model(open_inference: oip_grpc.GRPCInferenceServiceStub) -> None:
    assert (await open_inference.ServerLive(oip.ServerLiveRequest())).live
    assert (await open_inference.ServerReady(oip.ServerReadyRequest())).ready
    assert (await open_inference.ModelReady(oip.ModelReadyRequest(name=MODEL))).ready
    assert not (await open_inference.ModelReady(oip.ModelReadyRequest(name="none"))).ready
    metadata = await open_inference.ModelMetadata(oip.ModelMetadataRequest(name=MODEL))
    assert [tensor.name for tensor in metadata.outputs] == ["text_output", "finish_reason"]
    assert (await open_inference.ServerMetadata(oip.ServerMetadataRequest())).name == "pdserve"


async def test_health_serves_every_service(channel: grpc.aio.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    services = ("", "pdserve.v1.InferenceService", "inference.GRPCInferenceService")

    async def statuses() -> set[int]:
        return {(await stub.Check(health_pb2.HealthCheckRequest(service=each))).status for each in services}

    async def settled() -> bool:
        return len(await statuses()) == 1

    await eventually(settled)
    assert await statuses() == {health_pb2.HealthCheckResponse.SERVING}
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Check(health_pb2.HealthCheckRequest(service="pdserve.v1.None"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_reflection_describes_the_services(channel: grpc.aio.Channel) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="pdserve.v1.InferenceService"),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="inference.GRPCInferenceService"),
    ]
    listed, *files = [answer async for answer in stub.ServerReflectionInfo(iter(asked))]
    names = {service.name for service in listed.list_services_response.service}
    assert {"pdserve.v1.InferenceService", "inference.GRPCInferenceService", "grpc.health.v1.Health"} <= names
    assert all(answer.file_descriptor_response.file_descriptor_proto for answer in files)
