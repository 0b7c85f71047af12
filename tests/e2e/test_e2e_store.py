"""A cluster with a KV store: what it saves, and that nothing depends on it."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from e2e_tools import TEXT, WAIT_S, all_blocks_free, completion, eventually, sim_tokens

from pdserve_cli import store_calls
from pdserve_cli.chaos_rest import at_rest
from pdserve_cli.cluster import Cluster, ClusterSpec, Member, run_cluster

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

ALWAYS = {
    "disaggregate": "always", "connect_backoff_s": 0.2, "breaker.slow_ms": 60_000.0, "heartbeats_missed": 60,
}  # fmt: skip
SIM = {"num_blocks": 1024, "store_fetch": "always", "store_timeout_s": 60.0}
TURN_TOKENS, NEW_TOKENS, OUTPUTS = 4000, 32, 32
BLOCK = 16


def prompt_of(number: int, size: int) -> list[int]:
    rng = random.Random(number)
    return [rng.randrange(100, 40_000) for _ in range(size)]


@asynccontextmanager
async def http_of(router: Member) -> AsyncIterator[httpx.AsyncClient]:
    url = f"http://127.0.0.1:{router.ready['http_port']}"
    async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False, verify=False) as http:
        yield http


async def ask(router: Member, prompt: list[int], outputs: int = OUTPUTS) -> dict[str, Any]:
    body = completion(prompt, max_tokens=outputs, ignore_eos=True, return_token_ids=True)
    async with http_of(router) as http:
        response = await asyncio.wait_for(http.post(TEXT, json=body), 4 * WAIT_S)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def right(router: Member, prompt: list[int], outputs: int = OUTPUTS) -> int:
    """Ask, check the answer; how much of the prompt was cached."""
    answer = await ask(router, prompt, outputs)
    expected = sim_tokens(prompt, max_tokens=outputs, ignore_eos=True, temperature=0)
    assert answer["choices"][0]["token_ids"] == expected
    return int((answer["usage"].get("prompt_tokens_details") or {}).get("cached_tokens", 0))


async def attached(cluster: Cluster) -> None:
    """Every worker has a session with its store."""

    async def all_are() -> bool:
        figures = [await cluster.metric(member, "pdserve_store_attached") for member in cluster.workers]
        return all(figures)

    await eventually(all_are)


async def stored(store: Member, blocks: int) -> None:
    """The store has so many blocks, on both tiers together."""

    async def so_many() -> bool:
        stat = await store_calls.stat(store)
        return stat.visible_blocks + stat.disk_blocks >= blocks

    await eventually(so_many)


async def computed(cluster: Cluster, member: Member) -> float:
    return await cluster.metric(member, "pdserve_prefix_tokens_total", tier="computed")


async def _second_turn(cluster: Cluster, turn_tokens: int = TURN_TOKENS) -> None:
    """The first turn is prefilled on one worker, the second can only go to the other."""
    one, other = cluster.of_role("prefill")
    decode = cluster.of_role("decode")
    first_router = await cluster.start_router("first", [one, *decode])
    second_router = await cluster.start_router("second", [other, *decode])
    prompt = prompt_of(1, turn_tokens)
    first = (await ask(first_router, prompt))["choices"][0]["token_ids"]
    await stored(cluster.stores[0], (turn_tokens + OUTPUTS - 1) // BLOCK)
    second_prompt = [*prompt, *first, *prompt_of(2, NEW_TOKENS)]
    before = await computed(cluster, other)
    await ask(second_router, second_prompt)
    new = await computed(cluster, other) - before
    assert NEW_TOKENS <= new <= NEW_TOKENS + BLOCK, "all but the new tokens and a partial block come from the store"
    fetched = await cluster.metric(other, "pdserve_prefix_tokens_total", tier="dram")
    assert fetched == len(second_prompt) - new
    assert await computed(cluster, one) == turn_tokens


async def test_a_second_turn_on_another_prefill_worker_computes_only_the_new_tokens() -> None:
    spec = ClusterSpec(prefill=2, engine="sim", store={"num_blocks": 1024}, worker=SIM, router=ALWAYS)
    async with run_cluster(spec) as cluster:
        await attached(cluster)
        await _second_turn(cluster)
        await all_blocks_free(cluster)
        assert not await at_rest(cluster)


@pytest.mark.torch_model
async def test_a_second_turn_with_the_embedded_model_computes_only_the_new_tokens() -> None:
    worker = {"num_blocks": 100, "store_fetch": "always"}
    async with run_cluster(ClusterSpec(prefill=2, store={"num_blocks": 100}, worker=worker, router=ALWAYS)) as cluster:
        await attached(cluster)
        await _second_turn(cluster, turn_tokens=1000)


# ---- stores that fail ----


def _two_prefill_one_store(store: dict[str, object]) -> ClusterSpec:
    worker = {**SIM, "num_blocks": 128, "store_timeout_s": 0.5}
    return ClusterSpec(prefill=2, engine="sim", store=store, worker=worker, router=ALWAYS, stable_ports=True)


async def test_serving_goes_on_while_the_store_is_dead_and_finds_again_what_its_disk_kept(tmp_path: Path) -> None:
    store = {"num_blocks": 128, "disk.path": str(tmp_path), "disk.capacity_bytes": 64 << 20}
    async with run_cluster(_two_prefill_one_store(store)) as cluster:
        await attached(cluster)
        prompts = [prompt_of(number, 640) for number in range(8)]
        for prompt in prompts:
            await right(cluster.router, prompt)
        (member,) = cluster.stores
        await _on_disk(member, 128)
        cluster.kill_member(member)
        await member.process.wait()
        for prompt in prompts:
            await right(cluster.router, [*prompt, 50])
        await cluster.restart(member)
        await attached(cluster)
        assert (await store_calls.stat(cluster.stores[0])).disk_blocks >= 128
        for prompt in prompts:
            await right(cluster.router, [*prompt, 60])
        found = await cluster.metric(cluster.stores[0], "pdserve_kvstore_hit_blocks_total", tier="disk")
        assert found > 0
        assert not await at_rest(cluster)
    assert not cluster.segments()


async def _on_disk(store: Member, blocks: int) -> None:
    async def so_many() -> bool:
        return (await store_calls.stat(store)).disk_blocks >= blocks

    await eventually(so_many)


async def test_serving_goes_on_while_the_store_stands_still() -> None:
    async with run_cluster(_two_prefill_one_store({"num_blocks": 1024})) as cluster:
        await attached(cluster)
        prompt = prompt_of(1, 1600)
        await right(cluster.router, prompt)
        (member,) = cluster.stores
        os.kill(member.pid, signal.SIGSTOP)
        try:
            for number in range(6):
                await right(cluster.router, prompt_of(10 + number, 640))
        finally:
            os.kill(member.pid, signal.SIGCONT)
        await attached(cluster)
        assert not await at_rest(cluster)
        await right(cluster.router, [*prompt, 50])


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a file system of its own needs root and mount(8)")
    try:
        _mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder))
    except subprocess.CalledProcessError as error:
        pytest.skip(f"mount(8) may not mount here: {error.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


async def test_a_full_disk_costs_hits_and_no_answer(small_disk: Path) -> None:
    """The tier may take 8 MiB, the disk has one: writes fail, reads go on."""
    store = {"num_blocks": 96, "disk.path": str(small_disk), "disk.capacity_bytes": 8 << 20}
    async with run_cluster(_two_prefill_one_store(store)) as cluster:
        await attached(cluster)
        (member,) = cluster.stores
        prompts = [prompt_of(number, 640) for number in range(16)]

        async def refused() -> bool:
            for prompt in prompts:
                await right(cluster.router, prompt)
            return await cluster.metric(member, "pdserve_kvstore_demotion_failures_total") > 0

        await eventually(refused)
        for prompt in prompts:
            await right(cluster.router, [*prompt, 50])
        assert member.alive
        assert not (await store_calls.verify(member)).corrupt_on_disk
        assert not await at_rest(cluster)


async def _came_from_disk(cluster: Cluster, prompts: list[list[int]]) -> bool:
    """Ask again; other prompts in between take the workers' own caches."""
    for number, prompt in enumerate(prompts):
        await right(cluster.router, prompt_of(200 + number, 640))
        await right(cluster.router, [*prompt, 50])
    return await cluster.metric(cluster.stores[0], "pdserve_kvstore_hit_blocks_total", tier="disk") > 0


async def test_a_disk_that_is_read_only_after_a_restart_still_gives_what_it_has(small_disk: Path) -> None:
    roomy = {"high_watermark": 0.5, "low_watermark": 0.25}
    store = {"num_blocks": 96, **roomy, "disk.path": str(small_disk), "disk.capacity_bytes": 1 << 20}
    async with run_cluster(_two_prefill_one_store(store)) as cluster:
        await attached(cluster)
        (member,) = cluster.stores
        prompts = [prompt_of(number, 320) for number in range(3)]
        for prompt in prompts:
            await right(cluster.router, prompt)
        member.process.terminate()  # drains: what is in memory goes to disk
        await member.process.wait()
        _mount("-o", "remount,ro", str(small_disk))
        store_again = await cluster.restart(member)
        await attached(cluster)
        for number in range(16):
            await right(cluster.router, prompt_of(100 + number, 640))
        await eventually(lambda: _came_from_disk(cluster, prompts))
        assert await cluster.metric(store_again, "pdserve_kvstore_disk_state") > 0
        assert not (await store_calls.verify(store_again)).corrupt_on_disk
        assert not await at_rest(cluster)
