"""A pool with no free slot, over a disk: what is asked for comes up, its victims go down first."""

from __future__ import annotations

from pathlib import Path

from node_tools import client_of, get, keys, put, running_store, until


async def test_a_promotion_into_a_full_pool_waits_for_its_victims(tmp_path: Path) -> None:
    disk = {"disk": {"path": str(tmp_path), "capacity_bytes": 64 << 20}}
    async with running_store(num_blocks=16, **disk) as store, client_of(store) as client:
        dram = store.parts.dram
        assert [await put(client, keys(name, 8)) for name in "ab"] == [8, 8]
        await put(client, keys("c", 8))
        await until(lambda: dram.slots.free == 8)
        assert await put(client, keys("c", 8)) == 8
        assert dram.slots.free == 0
        assert await get(client, keys("a", 8)) == 8, "at the first time of asking"
        assert await get(client, keys("b", 8)) == 8
        dram.check_integrity()
        assert not len(dram.leases)
        assert not len(dram.reservations)
