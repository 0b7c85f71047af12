"""A router follows the stores that its workers name, and sends a prompt's worker to the store that holds its prefix."""

import sys
from pathlib import Path

import pytest

from kvstore.index.index import KVIndex
from kvstore.node.follower import StoreFollower
from pdserve.engine.sim import expected_tokens
from pdserve.errors import ConfigError
from pdserve.rpc import Channel
from pdserve.types import Role
from router.stores import Stores

sys.path.insert(0, str(Path(__file__).parent.parent / "kvstore" / "node"))
from node_tools import running_store

PLACEMENT = {"policy": "conductor", "disaggregate": "always"}
SIM_BLOCK_BYTES = 256


def store_of(node_id):
    return running_store(block_bytes=SIM_BLOCK_BYTES, num_blocks=1024, node_id=node_id)


async def ask(core, sink, incoming, text):
    got = sink()
    handle = core.submit(incoming(text, max_tokens=4), got)
    await got.result()
    assert got.error is None
    return handle, got, core.catalog.find(handle.request_id)


async def test_what_only_another_store_has_is_named_to_the_worker(house, sink, incoming, wait_until):
    async with store_of("near") as near, store_of("far") as far:
        await house.worker(Role.PREFILL, "p0", store=far.address, store_fetch="always")
        await house.worker(Role.PREFILL, "p1", store=near.address, store_fetch="always")
        await house.worker(Role.DECODE, "d0")
        for worker in house.workers[:2]:
            await worker.store.link.attached.wait()
        core = await house.core(placement=PLACEMENT)
        links = {link.info.worker_id: link for link in house.fleets[0].links}
        text = "s" * 800
        links["p1"].draining = True
        house.fleets[0].changed()
        await ask(core, sink, incoming, text)
        keys = core.served[0].prompts.request(incoming(text), core.served[0].bounds()).block_keys
        fingerprint = links["p1"].info.fingerprint

        def found():
            return core.prefixes.match(keys, fingerprint).get(far.address)

        await wait_until(lambda: found() is not None and found().dram == 50)
        links["p0"].draining, links["p1"].draining = True, False
        house.fleets[0].changed()
        handle, got, record = await ask(core, sink, incoming, text)
        assert got.token_ids[0] == expected_tokens(house.sim, handle.request)
        assert record.prefill_worker == "p1"
        assert record.last.prefix_store == far.address
        assert record.last.forecast.num_fetched_tokens >= 784
        assert record.num_fetched_tokens >= 784
        assert core.prefixes.source(links["p1"].info) == "events"


async def test_a_store_that_nobody_names_any_more_is_left(house, wait_until):
    async with store_of("n1") as store:
        await house.worker(Role.PREFILL, "p0", store=store.address)
        await house.worker(Role.DECODE, "d0")
        core = await house.core()
        await wait_until(lambda: len(core.prefixes.index.live_nodes()) == 3)
        node = core.prefixes._stores.node_at(store.address)
        assert core.prefixes._stores.address_of(node) == store.address
        await house.workers[0].stop()
        await wait_until(lambda: len(house.fleets[0].links) == 1)
        assert len(core.prefixes._stores) == 0
        assert core.prefixes.index.live_nodes() == ["d0"]


async def test_a_name_belongs_to_the_store_that_is_heard_of(wait_until, caplog):
    index = KVIndex()
    stores = Stores(index, None)

    def believed():
        return (index.position("twin") or (0,))[0]

    try:
        async with store_of("twin") as first, store_of("twin") as second:
            stores.follow([first.address])
            await wait_until(lambda: believed() == first.parts.incarnation)
            stores.follow([first.address, second.address])
            await wait_until(lambda: "another store is called 'twin' too" in caplog.text)
            assert (stores.node_at(first.address), stores.node_at(second.address)) == ("twin", "")
            assert stores.address_of("twin") == first.address
            await first.stop()  # it comes back at another address
            await wait_until(lambda: stores.address_of("twin") == second.address)
            await wait_until(lambda: believed() == second.parts.incarnation)
    finally:
        await stores.close()


async def test_an_older_store_does_not_take_the_name_of_a_newer_one(wait_until):
    index = KVIndex()
    stores = Stores(index, None)
    try:
        async with store_of("twin") as older, store_of("twin") as newer:
            stores.follow([newer.address])
            await wait_until(lambda: (index.position("twin") or (0,))[0] == newer.parts.incarnation)
            follower = StoreFollower(Channel(older.address), index)
            with pytest.raises(ConfigError, match="a newer store is called 'twin' too"):
                await follower.run()
            assert follower.node == ""
            assert stores.node_at(newer.address) == "twin"
    finally:
        await stores.close()
