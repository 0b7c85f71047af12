"""Two models, a slow link and a worker that lies of its cache in one cluster: every placement of a run is explained,
the link is left alone by forecast or breaker, and the audit finds the liar."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path

import httpx
import pytest
from e2e_tools import TEXT, all_blocks_free, eventually

from pdserve_cli import explain
from pdserve_cli.cluster import Cluster, ClusterSpec, run_cluster

FAULTY = str(Path(__file__).parent / "faulty_worker.py")
LIAR, SLOW_LINK = "prefill-0", ("prefill-1", "decode-0")
BAD_IN_A_ROW = 3
NUM_REQUESTS, NUM_SESSIONS, AT_ONCE = 200, 24, 8
PREFIX_TOKENS, TURN_TOKENS = 480, 24
OTHER = {"model_name": "other"}

SPEC = ClusterSpec(
    prefill=3,
    decode=3,
    engine="sim",
    worker={
        "num_blocks": 2048, "transports": ["tcp"], "sim.timing": "fixed", "sim.prefill_ms": 4.0, "sim.decode_ms": 1.0,
        "chunk_tokens": 512,
    },
    members={LIAR: {"num_blocks": 48}, "prefill-2": OTHER, "decode-2": OTHER},
    programs={
        LIAR: (FAULTY, "prefill", "forgetful"),
        "decode-0": (FAULTY, "decode", f"slow:{SLOW_LINK[0]}:4000"),
    },
    router={
        "models": {"smollm2-135m": {"aliases": ["tiny"]}, "other": {"aliases": ["second"]}},
        "disaggregate": "always",
        "timing": "llama-3.1-8b-h100-tp1",
        "breaker.failures": BAD_IN_A_ROW,
        "breaker.slow_ms": 1500.0,  # far from both: a busy machine's hand-over, and the slow link's
        "breaker.rest_s": 30.0,
    },
)  # fmt: skip


class Load:
    """Conversations whose turns share a long prefix, a few at once."""

    def __init__(self, cluster: Cluster) -> None:
        self.url = cluster.http_url
        rng = random.Random(7)
        self._prefixes = [[rng.randrange(100, 9000) for _ in range(PREFIX_TOKENS)] for _ in range(NUM_SESSIONS)]
        self._rng = rng
        self._gate = asyncio.Semaphore(AT_ONCE)

    async def run(self) -> list[str]:
        async with httpx.AsyncClient(base_url=self.url, timeout=60, trust_env=False) as client:
            return await asyncio.gather(*(self._ask(client, number) for number in range(NUM_REQUESTS)))

    async def _ask(self, client: httpx.AsyncClient, number: int) -> str:
        model = ("smollm2-135m", "tiny", "smollm2-135m", "other", "smollm2-135m", "second")[number % 6]
        turn = [self._rng.randrange(100, 9000) for _ in range(TURN_TOKENS)]
        prompt = self._prefixes[number % NUM_SESSIONS] + turn
        body = {"model": model, "prompt": prompt, "max_tokens": 4, "temperature": 0}
        request_id = f"placed-{number}"
        async with self._gate:
            answer = await client.post(TEXT, json=body, headers={"x-request-id": request_id})
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-request-id"] == request_id
        return request_id


async def all_models(cluster: Cluster) -> None:
    """One that can be served makes the router ready: wait for the other, and for every worker."""

    async def there() -> bool:
        _, body = await cluster.get("/v1/models")
        connected = await cluster.metric(cluster.router, "pdserve_workers", state="ready")
        return len(json.loads(body)["data"]) == 4 and connected == 6

    await eventually(there)


def check_explained(record: explain.Fields) -> None:
    """Every worker that was used was chosen by a pick that names its rivals and why it won, and what was predicted for
    it stands beside what came."""
    assert record["outcome"] == "ok"
    models = {"prefill-2": "other", "decode-2": "other"}
    for attempt in record["attempts"]:
        picks = {pick["role"]: pick for pick in attempt["picks"]}
        for role in ("prefill", "decode"):
            worker = attempt[f"{role}_worker"]
            if worker is None:
                continue
            pick = picks[role]
            assert pick["worker"] == worker
            assert models.get(worker, "smollm2-135m") == record["model"]
            assert pick["scores"] or pick["notes"]
            if pick["candidates"]:
                assert pick["candidates"][worker] == min(pick["candidates"].values())
        assert attempt["forecast"]["ttft_s"] > 0
        assert attempt["observed"]["ttft_s"] > 0
        assert attempt["num_cached_tokens"] is not None
    text = "\n".join(explain.lines(record))
    for attempt in record["attempts"]:
        assert (attempt["decode_worker"] or attempt["prefill_worker"]) in text
        assert "to first token" in text


@pytest.mark.e2e
async def test_every_placement_is_explained_and_the_liar_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    async with run_cluster(SPEC) as cluster:
        await all_models(cluster)
        ids = await Load(cluster).run()
        records = await asyncio.gather(*(asyncio.to_thread(explain.fetch, cluster.http_url, each) for each in ids))
        for record in records:
            check_explained(record)
        router = cluster.router
        assert await cluster.metric(router, "pdserve_prefix_distrusted_total", worker_id=LIAR) == 1
        assert await cluster.metric(router, "pdserve_prefix_distrusted_total") == 1
        assert "holds less than it was believed to" in router.log.read_text()
        trips = await cluster.metric(router, "pdserve_link_trips_total", model_name="smollm2-135m", reason="slow")
        rests = f"the link from {SLOW_LINK[0]} to {SLOW_LINK[1]} rests" in router.log.read_text()
        slow = [r for r in records if (r["prefill_worker"], r["decode_worker"]) == SLOW_LINK]
        # The forecast learns from the first of them, and may keep the rest off the link before the breaker has to.
        assert rests == (trips >= 1)
        assert trips >= 1 if len(slow) >= BAD_IN_A_ROW else trips == 0
        assert await cluster.metric(router, "pdserve_link_trips_total") == trips
        assert len(slow) < NUM_REQUESTS / 10
        assert await asyncio.to_thread(explained, cluster.http_url, ids[0], capsys)
        assert all_ids_and_no_prompt(router.log.read_text(), records)
        await all_blocks_free(cluster)


def explained(url: str, request_id: str, capsys: pytest.CaptureFixture[str]) -> bool:
    from pdserve_cli.__main__ import main

    assert main(["explain", request_id, "--url", url]) == 0
    assert request_id in capsys.readouterr().out
    assert main(["explain", request_id, "--url", url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["request_id"] == request_id
    assert main(["explain", "nobody", "--url", url]) == 1
    assert "not_found" in capsys.readouterr().err
    return True


def all_ids_and_no_prompt(log: str, records: list[explain.Fields]) -> bool:
    """No list of token ids anywhere."""
    return "prompt_token_ids" not in log and not any("token_ids" in json.dumps(record) for record in records)
