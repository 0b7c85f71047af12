"""SIGTERM: what runs is finished, what comes is refused with a reason, the process ends with 0 and leaves nothing."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import grpc
import httpx
import pytest
from e2e_tools import (
    MODEL,
    TEXT,
    WAIT_S,
    Streaming,
    all_blocks_free,
    completion,
    eventually,
    sim_tokens,
)

from pdserve.v1 import common_pb2 as common
from pdserve.v1 import inference_service_pb2 as pb
from pdserve.v1 import inference_service_pb2_grpc as pb_grpc
from pdserve_cli.cluster import Cluster, Member

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

SHORT = [*range(100, 140)]
LONG = [*range(100, 100 + 64 * 10)]


def ask(prompt: list[int] = SHORT, **fields: Any) -> dict[str, Any]:
    return completion(prompt, ignore_eos=True, return_token_ids=True, **fields)


def of_role(cluster: Cluster, role: str) -> Member:
    return next(member for member in cluster.members if member.role == role)


async def refusal(http: httpx.AsyncClient) -> str:
    """The code of the 503 that a new request gets, once it gets one. A request that crosses the close of an idle
    kept-alive connection is lost, as ever in HTTP/1.1."""

    async def refused() -> str:
        try:
            response = await http.post(TEXT, json=ask(max_tokens=2))
        except httpx.TransportError:
            return ""
        return str(response.json()["error"]["code"]) if response.status_code == 503 else ""

    return str(await eventually(refused))


async def ended(member: Member) -> int:
    return await asyncio.wait_for(member.process.wait(), WAIT_S)


async def test_a_decode_worker_finishes_its_streams(start_sim: Any, http_to: Any) -> None:
    cluster = await start_sim()
    http, decode = http_to(cluster), of_role(cluster, "decode")
    streams = [Streaming(http, ask([*SHORT, number], max_tokens=100)) for number in range(3)]
    for stream in streams:
        await stream.has(3)
    assert cluster.segments()
    decode.process.terminate()
    assert await refusal(http) in ("draining", "no_worker")  # a submission may cross the worker's notice
    assert (await cluster.get("/readyz"))[0] == 503
    for number, stream in enumerate(streams):
        events = await stream.result()
        assert (events.done, events.error) == (True, None), events.error
        expected = sim_tokens([*SHORT, number], max_tokens=100, ignore_eos=True, temperature=0)
        assert events.token_ids == expected
    assert await ended(decode) == 0
    assert not [name for name in cluster.segments() if f"-{decode.process.pid}-" in name]
    await all_blocks_free(cluster)


async def test_a_prefill_worker_finishes_its_prompts_and_their_hand_over(start_sim: Any, http_to: Any) -> None:
    cluster = await start_sim(prefill=2)
    http = http_to(cluster)
    streams = [Streaming(http, ask([*LONG, number], max_tokens=10)) for number in range(4)]
    leaving = of_role(cluster, "prefill")

    async def computing() -> bool:
        return await cluster.metric(leaving, "vllm:num_requests_running") > 0

    await eventually(computing)
    leaving.process.terminate()
    for number, stream in enumerate(streams):
        events = await stream.result()
        assert (events.done, events.error) == (True, None), events.error
        assert events.token_ids == sim_tokens([*LONG, number], max_tokens=10, ignore_eos=True, temperature=0)
    assert await ended(leaving) == 0
    response = await http.post(TEXT, json=ask(max_tokens=3), headers={"x-request-id": "after"})
    assert response.status_code == 200
    assert (await http.get("/v1/requests/after")).json()["prefill_worker"] == "prefill-1"
    await all_blocks_free(cluster)


async def test_a_router_finishes_its_streams_and_refuses_newcomers(start_sim: Any, http_to: Any) -> None:
    cluster = await start_sim()
    http, newcomer = http_to(cluster), http_to(cluster)
    stream = Streaming(http, ask(max_tokens=250))
    whole = asyncio.create_task(http.post(TEXT, json=ask(LONG, max_tokens=10)))
    options = [("grpc.enable_http_proxy", 0)]
    async with grpc.aio.insecure_channel(cluster.grpc_address, options=options) as channel:
        stub = pb_grpc.InferenceServiceStub(channel)
        ids = common.TokenIds(token_ids=b"".join(i.to_bytes(4, "little") for i in SHORT))
        params = common.SamplingParams(max_tokens=250, temperature=0, ignore_eos=True)
        call = stub.Generate(pb.GenerateRequest(model=MODEL, prompt_token_ids=ids, params=params))
        first = await call.read()
        await stream.has(3)
        cluster.router.process.terminate()
        assert await refusal(newcomer) == "draining"
        assert (await newcomer.get("/readyz")).json()["reason"] == "draining"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(pb.GenerateRequest(model=MODEL, prompt="x", params=params)).read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        messages = [first]
        while (message := await call.read()) is not grpc.aio.EOF:
            messages.append(message)
    tokens = [token for message in messages for choice in message.choices for token in choice.token_ids]
    assert tokens == sim_tokens(SHORT, max_tokens=250, ignore_eos=True, temperature=0)
    events = await stream.result()
    assert (events.done, events.token_ids) == (True, tokens)
    response = await asyncio.wait_for(whole, WAIT_S)
    assert response.json()["choices"][0]["token_ids"] == sim_tokens(LONG, max_tokens=10, ignore_eos=True, temperature=0)
    assert await ended(cluster.router) == 0
    await all_blocks_free(cluster)


async def test_a_second_sigterm_ends_at_once_with_an_error_event(start_sim: Any, http_to: Any) -> None:
    cluster = await start_sim()
    stream = Streaming(http_to(cluster), ask(max_tokens=5000))
    await stream.has(3)
    cluster.router.process.terminate()
    assert await refusal(http_to(cluster)) == "draining"
    cluster.router.process.terminate()
    events = await stream.result()
    assert ((events.error or {})["code"], events.done) == ("draining", False)
    assert await ended(cluster.router) == 0
    await all_blocks_free(cluster)


async def test_a_drain_that_takes_too_long_ends_with_a_typed_error(start_sim: Any, http_to: Any) -> None:
    cluster = await start_sim(drain_timeout_s=0.3)
    stream = Streaming(http_to(cluster), ask(max_tokens=5000))
    await stream.has(3)
    decode = of_role(cluster, "decode")
    decode.process.terminate()
    events = await stream.result()
    assert ((events.error or {})["code"], events.done) == ("draining", False)
    assert await ended(decode) == 0
    await all_blocks_free(cluster)


async def test_a_stopped_cluster_leaves_no_process_and_no_memory(start_sim: Any) -> None:
    cluster = await start_sim()
    assert cluster.segments()
    await cluster.stop()
    assert [member.process.returncode for member in cluster.members] == [0, 0, 0]
    assert not cluster.segments()


async def test_ctrl_c_drains_as_sigterm_does(start_sim: Any) -> None:
    cluster = await start_sim()
    for member in cluster.members:
        member.process.send_signal(signal.SIGINT)
    assert [await ended(member) for member in cluster.members] == [0, 0, 0]
    assert not cluster.segments()
