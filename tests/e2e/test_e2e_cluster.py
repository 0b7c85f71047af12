"""The harness itself: stores of several nodes, what a member's successor keeps, the size of a block."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from e2e_tools import TEXT, all_blocks_free, completion

from kvstore.types import KEY_BYTES
from pdserve.rpc import Channel
from pdserve.wire import store as wire
from pdserve_cli.block_bytes import block_bytes
from pdserve_cli.cluster import ClusterSpec, run_cluster

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]


async def _stat(address: str) -> wire.Stat:
    channel = Channel(address)
    try:
        return await channel.call(wire.STAT, wire.StatQuery(), timeout_s=60)
    finally:
        await channel.close()


async def test_each_node_has_a_store_of_its_own_for_the_workers_blocks(tmp_path: Path) -> None:
    store = {"num_blocks": 64, "disk.path": str(tmp_path), "disk.capacity_bytes": 8 << 20}
    spec = ClusterSpec(prefill=2, decode=1, engine="sim", nodes=2, store=store, worker={"num_blocks": 64})
    async with run_cluster(spec) as cluster:
        stats = [await _stat(member.ready["address"]) for member in cluster.stores]
        assert [(stat.node, stat.num_blocks) for stat in stats] == [("kvstore-0", 64), ("kvstore-1", 64)]
        assert {stat.block_bytes for stat in stats} == {block_bytes({"engine": "sim"})}
        assert sorted(path.name for path in tmp_path.iterdir()) == ["kvstore-0", "kvstore-1"]
        assigned = {member.name: member.config["store"] for member in cluster.workers}
        first, second = (member.ready["address"] for member in cluster.stores)
        assert assigned == {"prefill-0": first, "prefill-1": second, "decode-0": first}
    assert not cluster.segments()


async def test_every_member_can_be_killed_and_comes_back_at_its_addresses() -> None:
    spec = ClusterSpec(engine="sim", store={"num_blocks": 64}, worker={"num_blocks": 64}, stable_ports=True)
    async with run_cluster(spec) as cluster:
        before = {member.name: (member.pid, member.addresses()) for member in cluster.members}
        for member in list(cluster.members):
            cluster.kill_member(member)
            await cluster.restart(member)
        after = {member.name: (member.pid, member.addresses()) for member in cluster.members}
        assert {name: addresses for name, (_, addresses) in after.items()} == {
            name: addresses for name, (_, addresses) in before.items()
        }
        assert not {pid for pid, _ in before.values()} & {pid for pid, _ in after.values()}
        await cluster.wait_answering()
        await all_blocks_free(cluster)
    assert len(cluster.pids) == 8
    assert not cluster.segments()


async def test_a_second_router_finds_the_same_keys() -> None:
    """Both salt with the cluster's secret: what one's clients cached, the other's find."""
    spec = ClusterSpec(engine="sim", worker={"num_blocks": 256})
    async with run_cluster(spec) as cluster:
        other = await cluster.start_router("router-1", cluster.workers)
        prompt = list(range(100, 100 + 8 * KEY_BYTES))
        model = await cluster.model_name()
        cached = []
        for router in (cluster.router, other):
            status, cached_tokens = await asyncio.to_thread(_ask, router.ready["http_port"], model, prompt)
            assert status == 200
            cached.append(cached_tokens)
        assert cached[0] == 0
        assert cached[1] > 0


def _ask(port: int, model: str, prompt: list[int]) -> tuple[int, int]:
    import httpx

    body = {**completion(prompt, max_tokens=2), "model": model, "cache_salt": "someone"}
    with httpx.Client(trust_env=False, verify=False) as http:
        response = http.post(f"http://127.0.0.1:{port}{TEXT}", json=body)
    details = response.json()["usage"].get("prompt_tokens_details") or {}
    return response.status_code, details.get("cached_tokens", 0)
