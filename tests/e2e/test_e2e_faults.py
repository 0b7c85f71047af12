"""Clients that go away and workers that die: everything is freed, every request ends, and with the right error."""

from __future__ import annotations

import asyncio
import os
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
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from pdserve.v1 import common_pb2 as common
from pdserve.v1 import inference_service_pb2 as pb
from pdserve.v1 import inference_service_pb2_grpc as pb_grpc
from pdserve_cli.cluster import Cluster, Member

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

SHORT = [*range(100, 140)]
LONG = [*range(100, 100 + 64 * 15)]
"""Fifteen chunks: one and a half seconds of prefill."""
ENDLESS = [*range(100, 100 + 64 * 60)]
"""Six seconds, for what is to happen in the middle, on a busy machine too."""


def ask(prompt: list[int] = SHORT, **fields: Any) -> dict[str, Any]:
    return completion(prompt, ignore_eos=True, return_token_ids=True, **fields)


def of_role(cluster: Cluster, role: str) -> Member:
    return next(member for member in cluster.workers if member.role == role and member.alive)


async def running(cluster: Cluster, member: Member) -> None:
    async def some() -> bool:
        return await cluster.metric(member, "vllm:num_requests_running") > 0

    await eventually(some)


async def killed(cluster: Cluster, member: Member) -> None:
    cluster.kill_member(member)
    await asyncio.wait_for(member.process.wait(), WAIT_S)


async def ready(cluster: Cluster, wanted: int = 200) -> None:
    async def is_so() -> bool:
        return (await cluster.get("/readyz"))[0] == wanted

    await eventually(is_so)


async def answers(http: httpx.AsyncClient, prompt: list[int] = SHORT) -> None:
    response = await http.post(TEXT, json=ask(prompt, max_tokens=4))
    assert response.status_code == 200, response.text
    expected = sim_tokens(prompt, max_tokens=4, ignore_eos=True, temperature=0)
    assert response.json()["choices"][0]["token_ids"] == expected


async def refused(http: httpx.AsyncClient) -> str:
    response = await http.post(TEXT, json=ask(max_tokens=4))
    assert response.status_code == 503, response.text
    assert response.headers["x-should-retry"] == "true"
    code: str = response.json()["error"]["code"]
    return code


async def outcome(http: httpx.AsyncClient, request_id: str) -> str:
    found: str = (await http.get(f"/v1/requests/{request_id}")).json()["outcome"]
    return found


# ---- clients ----


async def test_a_client_that_leaves_mid_stream_frees_both_workers(slow_cluster: Cluster, http_to: Any) -> None:
    http = http_to(slow_cluster)
    streams = [Streaming(http, ask([*SHORT, number], max_tokens=5000), f"leaves-{number}") for number in range(4)]
    for stream in streams:
        await stream.has(3)
        await stream.drop()
    await all_blocks_free(slow_cluster)
    assert [await outcome(http, f"leaves-{number}") for number in range(4)] == ["cancelled"] * 4
    await answers(http)


async def test_a_client_that_leaves_during_prefill_frees_both_workers(slow_cluster: Cluster, http_to: Any) -> None:
    http = http_to(slow_cluster)
    stream = Streaming(http, ask(ENDLESS, max_tokens=50))
    await running(slow_cluster, of_role(slow_cluster, "prefill"))
    await stream.drop()
    await all_blocks_free(slow_cluster)
    assert not stream.events.token_ids
    await answers(http)


async def test_a_client_that_does_not_wait_for_a_whole_answer_frees_both_workers(
    slow_cluster: Cluster, http_to: Any
) -> None:
    http = http_to(slow_cluster)
    named = {"x-request-id": "impatient"}
    waiting = asyncio.create_task(http.post(TEXT, json=ask(max_tokens=5000), headers=named))
    await running(slow_cluster, of_role(slow_cluster, "decode"))
    waiting.cancel()
    await all_blocks_free(slow_cluster)
    assert await outcome(http, "impatient") == "cancelled"
    await answers(http)


async def test_the_requests_own_timeout_is_kept_and_typed(slow_cluster: Cluster, http_to: Any) -> None:
    http = http_to(slow_cluster)
    response = await http.post(TEXT, json=ask(LONG, max_tokens=50), headers={"x-request-timeout-ms": "300"})
    assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
    await all_blocks_free(slow_cluster)


# ---- workers ----


async def test_a_prefill_worker_killed_mid_request_is_a_503_and_its_successor_serves(
    start_sim: Any, http_to: Any
) -> None:
    cluster = await start_sim()
    http = http_to(cluster)
    prefill = of_role(cluster, "prefill")
    whole = asyncio.create_task(http.post(TEXT, json=ask(ENDLESS, max_tokens=50)))
    stream = Streaming(http, ask([1, *ENDLESS], max_tokens=50))
    await running(cluster, prefill)
    await killed(cluster, prefill)
    response = await asyncio.wait_for(whole, WAIT_S)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["type"]) == (503, "worker_lost", "server_error")
    assert response.headers["x-should-retry"] == "true"
    events = await stream.result()
    assert (events.status, events.done) == (503, False)
    assert (events.error or {})["code"] in ("worker_lost", "no_worker")  # the latter if it still stood in the queue
    await all_blocks_free(cluster)
    await ready(cluster, 503)
    assert await refused(http) == "no_worker"
    left_behind = cluster.segments()
    successor = await cluster.restart(prefill)
    assert successor.ready["address"] == prefill.ready["address"]
    await ready(cluster)
    await answers(http)
    await answers(http, LONG)
    assert not any(f"-{prefill.process.pid}-" in name for name in left_behind & cluster.segments())


async def test_a_decode_worker_killed_mid_stream_is_an_error_event_and_no_done(start_sim: Any, http_to: Any) -> None:
    cluster = await start_sim()
    http = http_to(cluster)
    decode = of_role(cluster, "decode")
    streams = [Streaming(http, ask([*SHORT, number], max_tokens=5000)) for number in range(3)]
    for stream in streams:
        await stream.has(3)
    whole = asyncio.create_task(http.post(TEXT, json=ask(max_tokens=5000)))
    call = await _grpc_stream(cluster)
    await killed(cluster, decode)
    for stream in streams:
        events = await stream.result()
        assert (events.status, (events.error or {})["code"], events.done) == (200, "worker_lost", False)
        count = len(events.token_ids)
        number = streams.index(stream)
        assert events.token_ids == sim_tokens([*SHORT, number], max_tokens=count, ignore_eos=True, temperature=0)
    response = await asyncio.wait_for(whole, WAIT_S)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "worker_lost")
    await call
    await all_blocks_free(cluster)
    await cluster.restart(decode)
    await ready(cluster)
    await answers(http)


async def _grpc_stream(cluster: Cluster) -> asyncio.Task[None]:
    """Reads a few tokens; the task it gives then expects the typed end."""
    channel = grpc.aio.insecure_channel(cluster.grpc_address, options=[("grpc.enable_http_proxy", 0)])
    ids = common.TokenIds(token_ids=b"".join(i.to_bytes(4, "little") for i in SHORT))
    params = common.SamplingParams(max_tokens=5000, temperature=0, ignore_eos=True)
    call = pb_grpc.InferenceServiceStub(channel).Generate(
        pb.GenerateRequest(model=MODEL, prompt_token_ids=ids, params=params)
    )
    for _ in range(3):
        assert await call.read() is not grpc.aio.EOF

    async def rest() -> None:
        while await call.read() is not grpc.aio.EOF:
            pass

    async def expect() -> None:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(rest(), WAIT_S)
        await channel.close()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        (raw,) = [value for key, value in caught.value.trailing_metadata() if key == "grpc-status-details-bin"]
        info = ErrorInfo()
        assert Status.FromString(raw).details[0].Unpack(info)
        assert info.reason == "worker_lost"
        metadata = {key: info.metadata[key] for key in ("leg", "retryable", "work_done")}
        assert metadata == {"leg": "decode", "retryable": "true", "work_done": "true"}

    return asyncio.create_task(expect())


async def test_what_runs_goes_on_elsewhere_when_a_decode_worker_dies(start_sim: Any, http_to: Any) -> None:
    cluster = await start_sim(decode=2)
    http = http_to(cluster)
    prompts = [[*SHORT, number] for number in range(6)]
    streams = [Streaming(http, ask(prompt, max_tokens=300)) for prompt in prompts]
    for stream in streams:
        await stream.has(2)
    await killed(cluster, of_role(cluster, "decode"))
    for prompt, stream in zip(prompts, streams, strict=True):
        events = await stream.result()
        assert (events.done, events.error) == (True, None)
        assert events.token_ids == sim_tokens(prompt, max_tokens=300, ignore_eos=True, temperature=0)
    assert await cluster.metric(cluster.router, "pdserve_retries_total", reason="worker_lost") > 0
    await all_blocks_free(cluster)
    for prompt in prompts[:3]:
        await answers(http, prompt)


async def test_without_retries_what_ran_on_the_dead_worker_is_told(start_sim: Any, http_to: Any) -> None:
    cluster = await start_sim(decode=2, router={"max_retries": 0})
    http = http_to(cluster)
    prompts = [[*SHORT, number] for number in range(6)]
    streams = [Streaming(http, ask(prompt, max_tokens=300)) for prompt in prompts]
    for stream in streams:
        await stream.has(2)
    await killed(cluster, of_role(cluster, "decode"))
    results = [await stream.result() for stream in streams]
    ends = [(events.done, (events.error or {}).get("code")) for events in results]
    assert set(ends) == {(True, None), (False, "worker_lost")}
    for prompt, events in zip(prompts, results, strict=True):
        if events.done:
            assert events.token_ids == sim_tokens(prompt, max_tokens=300, ignore_eos=True, temperature=0)


async def test_prefill_may_die_once_decode_runs(start_sim: Any, http_to: Any) -> None:
    cluster = await start_sim()
    stream = Streaming(http_to(cluster), ask(LONG, max_tokens=60))
    await stream.has(3)
    await killed(cluster, of_role(cluster, "prefill"))
    events = await stream.result()
    assert (events.done, events.error) == (True, None)
    assert events.token_ids == sim_tokens(LONG, max_tokens=60, ignore_eos=True, temperature=0)
    await all_blocks_free(cluster)


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_worker_that_freezes_is_a_timeout_and_not_a_hang(start_sim: Any, http_to: Any, role: str) -> None:
    timeouts = dict.fromkeys(("prefill_timeout_s", "transfer_timeout_s", "decode_timeout_s"), 2.5)
    cluster = await start_sim(router=timeouts)
    http = http_to(cluster)
    frozen = of_role(cluster, role)
    stream = Streaming(http, ask(ENDLESS if role == "prefill" else SHORT, max_tokens=5000))
    if role == "prefill":
        await running(cluster, frozen)
    else:
        await stream.has(3)
    os.kill(frozen.process.pid, signal.SIGSTOP)
    try:
        events = await stream.result()
    finally:
        os.kill(frozen.process.pid, signal.SIGCONT)
    assert ((events.error or {})["code"], events.done) == ("deadline_exceeded", False)
    assert events.status == (504 if role == "prefill" else 200)
    await all_blocks_free(cluster)
    await answers(http)


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_what_ran_on_a_worker_that_freezes_goes_on_elsewhere(start_sim: Any, http_to: Any, role: str) -> None:
    """Connected and silent: its heartbeats tell. What it says when it thaws is of a session that is over."""
    cluster = await start_sim(prefill=2, decode=2, router={"heartbeats_missed": 8})
    http = http_to(cluster)
    prompt = LONG if role == "prefill" else SHORT
    stream = Streaming(http, ask(prompt, max_tokens=400))
    if role == "decode":
        await stream.has(3)
    frozen = await eventually(lambda: busy_member(cluster, role))
    os.kill(frozen.process.pid, signal.SIGSTOP)
    try:
        seen = len(stream.events.token_ids)
        await stream.has(seen + 20)
    finally:
        os.kill(frozen.process.pid, signal.SIGCONT)
    events = await stream.result()
    assert (events.done, events.error) == (True, None)
    assert events.token_ids == sim_tokens(prompt, max_tokens=400, ignore_eos=True, temperature=0)
    assert await cluster.metric(cluster.router, "pdserve_retries_total", reason="worker_lost") >= 1

    async def is_back() -> bool:
        return await cluster.metric(cluster.router, "pdserve_workers", role=role, state="ready") == 2

    await eventually(is_back)
    await all_blocks_free(cluster)
    for number in range(4):
        await answers(http, [*prompt, number])


async def busy_member(cluster: Cluster, role: str) -> Member | None:
    """Who has the only request that runs."""
    for member in cluster.workers:
        if member.role == role and await cluster.metric(member, "vllm:num_requests_running") > 0:
            return member
    return None


async def test_a_router_that_dies_leaves_no_work_behind(start_sim: Any, http_to: Any) -> None:
    cluster = await start_sim()
    stream = Streaming(http_to(cluster), ask(max_tokens=5000))
    await stream.has(3)
    await stream.drop()
    second = Streaming(http_to(cluster), ask(max_tokens=5000))
    await second.has(3)
    await killed(cluster, cluster.router)
    await asyncio.wait([second.task])
    assert not second.events.done, "an answer that was cut off must not look whole"
    await all_blocks_free(cluster)
