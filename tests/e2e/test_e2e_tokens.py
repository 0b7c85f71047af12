"""The tokens of the cluster are those of the model: of the sim engine's own arithmetic, and of one engine alone."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import httpx
import pytest
from e2e_tools import MODEL, TEXT, all_blocks_free, completion, sim_tokens

from pdserve_cli.cluster import Cluster
from pdserve_cli.parity_alone import generate_alone
from pdserve_cli.parity_cases import make_cases
from pdserve_cli.parity_types import SEEDED

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]


def mixed_requests(count: int) -> list[tuple[list[int], dict[str, Any]]]:
    """Prompts of 1 to 3,000 tokens, many with common beginnings; greedy and drawn; one to three choices."""
    rng = random.Random(7)
    trunks = [[rng.randrange(100, 40_000) for _ in range(3000)] for _ in range(3)]
    requests = []
    for number in range(count):
        trunk = trunks[number % 3]
        size = min(3000, int(4 ** rng.uniform(0, 5.8)))
        params: dict[str, Any] = {"max_tokens": rng.choice((1, 2, 5, 17, 40)), "ignore_eos": rng.random() < 0.5}
        params["temperature"] = rng.choice((0.0, 1.0))
        if params["temperature"]:
            params |= {"seed": number, "n": rng.choice((1, 1, 3))}
        requests.append(([*trunk[: size - 1], 50 + number], params))
    return requests


async def test_a_hundred_mixed_requests_at_once_get_the_models_tokens(
    sim_cluster: Cluster, http: httpx.AsyncClient
) -> None:
    requests = mixed_requests(100)

    async def ask(prompt: list[int], params: dict[str, Any]) -> dict[str, Any]:
        response = await http.post(TEXT, json=completion(prompt, **params, return_token_ids=True))
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    answers = await asyncio.gather(*(ask(prompt, params) for prompt, params in requests))
    for (prompt, params), answer in zip(requests, answers, strict=True):
        for choice in answer["choices"]:
            expected = sim_tokens(prompt, **params, choice=choice["index"])
            assert choice["token_ids"] == expected, (len(prompt), params)
        assert answer["usage"]["prompt_tokens"] == len(prompt)
    await all_blocks_free(sim_cluster)
    for member in sim_cluster.workers:
        figure = "pdserve_kv_pulled_bytes_total" if member.role == "decode" else "vllm:prompt_tokens_total"
        assert await sim_cluster.metric(member, figure) > 0, f"{member.name} had no share of the work"


async def test_records_name_the_workers_and_hold_no_text(sim_cluster: Cluster, http: httpx.AsyncClient) -> None:
    response = await http.post(TEXT, json=completion("a secret word", max_tokens=3), headers={"x-request-id": "rec-1"})
    assert response.status_code == 200
    record = (await http.get("/v1/requests/rec-1")).json()
    assert record["prefill_worker"] in {"prefill-0", "prefill-1"}
    assert record["decode_worker"] in {"decode-0", "decode-1"}
    assert (record["outcome"], record["num_output_tokens"]) == ("ok", 3)
    assert "secret" not in str(record)
    assert response.json()["choices"][0]["text"] not in str(record)
    missing = await http.get("/v1/requests/never")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")


@pytest.mark.torch_model
async def test_two_pools_give_the_tokens_of_one_engine(torch_cluster: Cluster, http_to: Any) -> None:
    """Greedy and seeded, all at once, in chunks, twice over (so the second round finds cached prefixes)."""
    cases = make_cases(4, seed=1, model="embedded", max_prompt=140)
    alone = await asyncio.to_thread(generate_alone, "torch", "embedded", "bf16", cases, 6)
    http = http_to(torch_cluster)

    async def ask(prompt: tuple[int, ...], **fields: Any) -> tuple[int, ...]:
        body = completion(list(prompt), max_tokens=6, ignore_eos=True, return_token_ids=True, deterministic=True)
        response = await http.post(TEXT, json={**body, **fields})
        assert response.status_code == 200, response.text
        return tuple(response.json()["choices"][0]["token_ids"])

    greedy = await asyncio.gather(*(ask(case.prompt) for case in cases))
    assert greedy == [run.greedy for run in alone]
    seeded = await asyncio.gather(*(ask(case.prompt, **SEEDED, seed=case.seed) for case in cases))
    assert seeded == [run.seeded for run in alone]
    decode = next(member for member in torch_cluster.workers if member.role == "decode")
    assert await torch_cluster.metric(decode, "pdserve_kv_pulled_bytes_total") > 0


async def test_model_name_is_what_tests_assume(sim_cluster: Cluster) -> None:
    assert await sim_cluster.model_name() == MODEL
