"""`pdserve up --engine vllm` as processes: router, one prefill and one decode worker, each with its own vLLM."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import httpx
import psutil
import pytest
import pytest_asyncio
from vllm_pair import BUDGET, Driven, make_request, renamed

from pdserve.types import Request
from pdserve_cli import store_calls
from pdserve_cli.cluster import Cluster, ClusterSpec, run_cluster

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(400)]

WORKER = {
    "dtype": "fp32",
    "max_model_len": 1024,
    "max_num_batched_tokens": BUDGET,
    "max_num_seqs": 16,
    "kv_memory_bytes": 192 << 20,
    "vllm.enforce_eager": True,
    "vllm.kv_cache_memory_bytes": 1 << 30,
    "store_fetch": "always",
}
STORE = {"block_bytes": 30 * 2 * 3 * 16 * 64 * 4, "num_blocks": 256}
"""Blocks of the embedded model in fp32."""


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def cluster() -> AsyncIterator[Cluster]:
    router = {"disaggregate": "always"}
    spec = ClusterSpec(engine="vllm", worker=WORKER, store=STORE, router=router, start_timeout_s=300.0)
    async with run_cluster(spec) as cluster:
        yield cluster


@pytest_asyncio.fixture(loop_scope="session")
async def http(cluster: Cluster) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=cluster.http_url, timeout=120, trust_env=False) as client:
        yield client


def body_of(request: Request) -> dict[str, object]:
    params = request.params
    return {
        "model": request.model,
        "prompt": list(request.prompt_token_ids),
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "seed": params.seed,
        "return_token_ids": True,
    }


async def tokens_of(http: httpx.AsyncClient, request: Request) -> list[int]:
    answer = await http.post("/v1/completions", json=body_of(request))
    assert answer.status_code == 200, answer.text
    tokens: list[int] = answer.json()["choices"][0]["token_ids"]
    return tokens


async def test_six_prompts_answer_as_one_vllm_does(http: httpx.AsyncClient, cluster: Cluster, decode: Driven) -> None:
    lengths = (3, 31, 64, 150, 333, 700)
    greedy = [make_request(f"cluster {n}", n, 12) for n in lengths]
    seeded = [make_request(f"cluster s{n}", n, 12, temperature=0.9, seed=n) for n in lengths]
    requests = greedy + seeded
    expected = decode.run_alone(*(renamed(request, "a" + request.request_id) for request in requests))
    found = await asyncio.gather(*(tokens_of(http, request) for request in requests))
    assert [[tokens] for tokens in found] == expected
    (worker,) = [member for member in cluster.workers if member.role == "decode"]
    assert await cluster.metric(worker, "pdserve_kv_pulled_bytes_total") > 0


async def test_a_second_turn_brings_from_the_store_what_the_other_worker_generated(
    http: httpx.AsyncClient, cluster: Cluster, decode: Driven
) -> None:
    (prefiller,) = cluster.of_role("prefill")
    first = make_request("turns", 120, 60, ignore_eos=True)
    store = cluster.stores[0]
    before = (await store_calls.stat(store)).visible_blocks
    answer = await tokens_of(http, first)
    num_blocks = (120 + 59) // 16
    prompt = (*first.prompt_token_ids, *answer, 70, 71, 72)
    second = replace(make_request("turns", 1, 8), prompt_token_ids=prompt)
    (expected,) = decode.run_alone(renamed(second, "turns alone"))[0]
    async with asyncio.timeout(60):
        while (await store_calls.stat(store)).visible_blocks < before + num_blocks:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.05)
    computed = await cluster.metric(prefiller, "pdserve_prefix_tokens_total", tier="computed")
    assert await tokens_of(http, second) == expected
    new = await cluster.metric(prefiller, "pdserve_prefix_tokens_total", tier="computed") - computed
    assert new == len(prompt) - num_blocks * 16
    fetched = await cluster.metric(prefiller, "pdserve_prefix_tokens_total", tier="dram")
    assert fetched >= (num_blocks - 120 // 16) * 16, "the first prompt it may have computed itself"


async def test_a_client_that_leaves_frees_both_workers(http: httpx.AsyncClient, cluster: Cluster) -> None:
    """Another full-length request fits right after each, many more than staging could hold at once."""
    for number in range(6):
        body = body_of(make_request(f"leaves {number}", 900, 100))
        async with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            assert answer.status_code == 200
            await anext(answer.aiter_lines())
    last = make_request("stays", 900, 4)
    assert len(await tokens_of(http, last)) == 4


async def test_a_bad_request_is_refused_with_the_fields_name(http: httpx.AsyncClient) -> None:
    body = {**body_of(make_request("grammar", 10)), "response_format": None, "max_tokens": 0}
    answer = await http.post("/v1/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "max_tokens"
    assert len(await tokens_of(http, make_request("after", 10, 3))) == 3


async def test_a_killed_worker_takes_its_vllm_along(cluster: Cluster) -> None:
    """Last: the cluster is a decode worker short from here on."""
    (worker,) = [member for member in cluster.workers if member.role == "decode"]
    processes = psutil.Process(worker.process.pid).children(recursive=True)
    assert len(processes) >= 2, "vLLM's core and its worker"
    cluster.kill_member(worker)
    _, alive = await asyncio.to_thread(psutil.wait_procs, processes, 60)
    assert not alive
