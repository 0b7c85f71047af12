"""An index that follows a real store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from node_tools import FINGERPRINT, channel_to, client_of, keys, put, running_store, until

from kvstore.index.index import KVIndex
from kvstore.node.follower import StoreFollower
from kvstore.node.process import NodeStore


@asynccontextmanager
async def following(store: NodeStore, index: KVIndex, node: str = "") -> AsyncIterator[None]:
    async with channel_to(store.address) as channel:
        task = asyncio.ensure_future(StoreFollower(channel, index, node=node, retry_s=0.01).run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])


def dram(index: KVIndex, chain: list[bytes]) -> int:
    reach = index.match(b"".join(chain), FINGERPRINT).get("n1")
    return reach.dram if reach else 0


async def test_an_index_follows_puts_evictions_and_drops() -> None:
    index = KVIndex()
    async with running_store(num_blocks=4) as store, client_of(store) as client:
        await put(client, keys("a", 3))
        async with following(store, index):
            await until(lambda: dram(index, keys("a", 3)) == 3)  # by snapshot
            await put(client, keys("b", 2))
            await until(lambda: dram(index, keys("b", 2)) == 2)  # by event
            await until(lambda: dram(index, keys("a", 3)) == 2)
            assert index.counts.gaps == 0
            position = index.position("n1")
        assert position is not None
        store.parts.tiers.drop([key + FINGERPRINT for key in keys("b", 1)])
        async with following(store, index, "n1"):
            await until(lambda: dram(index, keys("b", 2)) == 0)
        assert index.counts.snapshots == 1  # it went on where it was
        assert index.position("n1") == (position[0], position[1] + 1, position[2])


async def test_a_restarted_store_leaves_nothing_stale_behind(tmp_path: Path) -> None:
    index = KVIndex()
    disk = {"path": str(tmp_path / "kv"), "capacity_bytes": 1 << 22}
    async with running_store(num_blocks=4, disk=disk) as store, client_of(store) as client, following(store, index):
        await put(client, keys("a", 2))
        await put(client, keys("b", 2))
        await put(client, keys("c", 2))  # a goes down
        await store.parts.tiers.drain()
        await until(lambda: dram(index, keys("a", 1)) == 0 and len(store.parts.tiers.disk or ()) == 2)
    async with running_store(num_blocks=4, disk=disk) as store, following(store, index):
        await until(lambda: (at := index.position("n1")) is not None and at[0] == store.parts.incarnation)
        assert dram(index, keys("b", 2)) == 0
        assert index.match(b"".join(keys("a", 2)), FINGERPRINT)["n1"].disk == 2


async def test_a_log_that_is_too_short_makes_a_slow_follower_start_from_a_snapshot() -> None:
    index = KVIndex()
    async with running_store(num_blocks=4) as store, client_of(store) as client:
        store.parts.dram.events._events = type(store.parts.dram.events._events)(maxlen=2)
        async with following(store, index):
            await put(client, keys("a", 1))
            await until(lambda: dram(index, keys("a", 1)) == 1)
        for prefix in "bcdef":
            await put(client, keys(prefix, 2))
        async with following(store, index, "n1"):
            await until(lambda: dram(index, keys("f", 2)) == 2)
        assert dram(index, keys("b", 2)) == 0
        assert index.counts.snapshots == 2
