"""Clients side by side on a store that is far too small, disk tier included: whatever is read is right."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
from node_tools import BLOCK_BYTES, FINGERPRINT, channel_to, client_of, get, keys, put, running_store, until

from kvstore.index.index import KVIndex
from kvstore.node.client import StoreClient
from kvstore.node.compaction import compact
from kvstore.node.follower import StoreFollower
from kvstore.node.process import NodeStore
from pdserve.errors import QuotaExceeded, StaleBlock
from pdserve.wire import store as wire

CHAINS = [[*keys("shared", 2), *keys(f"own{i}-", 5)] for i in range(8)]


async def _work(store: NodeStore, client: StoreClient, seed: int, steps: int) -> int:
    """Puts, gets, drops, compactions; a get checks bytes. Returns blocks that were found."""
    dice = random.Random(seed)
    found = 0
    for _ in range(steps):
        chain = dice.choice(CHAINS)[: dice.randint(1, 7)]
        action = dice.random()
        try:
            if action < 0.45:
                await put(client, chain, tenant=dice.choice(["limited", "free"]))
            elif action < 0.9:
                found += await get(client, chain)
            elif action < 0.95:
                store.parts.tiers.drop([chain[-1] + FINGERPRINT])
            else:
                compact(store.parts.dram, 2)
                store.tick()
        except (QuotaExceeded, StaleBlock):
            pass
    return found


def _everywhere(store: NodeStore, index: KVIndex) -> bool:
    """Whether the index says of each block what the store does."""
    disk = store.parts.tiers.disk
    on_disk = {block.key for block in disk.ids()} if disk is not None else set()
    in_dram = {entry.key for entry in store.parts.dram.entries.values()}
    told = {key: {int(place.tier) for place in index.locate(key, FINGERPRINT)} for chain in CHAINS for key in chain}
    return all(tiers == {t for t, here in ((1, in_dram), (2, on_disk)) if key in here} for key, tiers in told.items())


@pytest.mark.parametrize("seed", [1, 2])
async def test_what_is_read_is_right_and_the_index_agrees(tmp_path: Path, seed: int) -> None:
    index = KVIndex()
    disk = {"path": str(tmp_path / "kv"), "capacity_bytes": 1 << 20, "threads": 2}
    overrides = {"num_blocks": 14, "high_watermark": 0.9, "low_watermark": 0.7, "eviction": "hazard", "disk": disk,
                 "quotas": {"limited": 6 * BLOCK_BYTES}, "digest_every": 1}  # fmt: skip
    async with (
        running_store(**overrides) as store,
        channel_to(store.address) as channel,
        client_of(store, "a") as a,
        client_of(store, "b") as b,
        client_of(store, "c") as c,
    ):
        following = asyncio.ensure_future(StoreFollower(channel, index, retry_s=0.01).run())
        found = await asyncio.gather(*(_work(store, client, 10 * seed + i, 120) for i, client in enumerate((a, b, c))))
        assert sum(found) > 50
        await store.parts.tiers.drain()
        store.parts.dram.check_integrity()
        assert len(store.parts.dram.reservations) == len(store.parts.dram.leases) == 0
        for metric, labels in (
            ("hit_blocks_total", {"tier": "disk"}),
            ("evictions_total", {"tier": "dram", "reason": "capacity"}),
            ("evictions_total", {"tier": "dram", "reason": "quota"}),
        ):
            assert store.registry.get_sample_value(f"pdserve_kvstore_{metric}", labels)
        await until(lambda: _everywhere(store, index))
        assert index.counts.gaps == 0
        verified = await channel.call(wire.VERIFY, wire.Verify(all=True), timeout_s=60)
        assert (verified.corrupt, verified.corrupt_on_disk) == ((), 0)
        following.cancel()
        await asyncio.wait([following])
