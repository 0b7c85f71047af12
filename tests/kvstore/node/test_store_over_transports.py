"""A node's store, read by another process's transports: each that can be had here."""

from __future__ import annotations

import pytest
from node_tools import BLOCK_BYTES, FINGERPRINT, channel_to, client_of, keys, pages, put, running_store

from kvstore.handover.verify import DigestPolicy
from kvstore.node.peer_client import PeerStoreClient
from kvstore.transports.registry import NAMES, OPTIONAL, make_transport
from kvstore.transports.shm import SharedMemoryPool
from pdserve.errors import ConfigError, HandoverError


@pytest.mark.parametrize("name", [*NAMES, *(pytest.param(name, marks=pytest.mark.transports) for name in OPTIONAL)])
async def test_another_nodes_worker_reads_the_pool(name: str) -> None:
    try:
        transport = make_transport(name)
    except ConfigError as error:
        pytest.skip(error.message)
    target = SharedMemoryPool(8, BLOCK_BYTES)
    async with running_store(transports=[name]) as store, client_of(store) as client, channel_to(store.address) as far:
        await put(client, keys("a", 5))
        reader = await PeerStoreClient.attach(far, "elsewhere", {name: transport}, block_bytes=BLOCK_BYTES)
        found = await reader.lookup(keys("a", 5), FINGERPRINT)
        reader.read(found, target, (6, 5, 0, 1, 2), DigestPolicy())
        assert (target.blocks[[6, 5, 0, 1, 2]] == pages(keys("a", 5))).all()
        await reader.release(found)
        await reader.close()
    transport.close()
    target.close()


async def test_a_store_and_a_reader_without_a_transport_in_common_are_told_so() -> None:
    transport = make_transport("tcp")
    async with running_store(transports=["shm"]) as store, channel_to(store.address) as far:
        with pytest.raises(HandoverError, match="no common transport"):
            await PeerStoreClient.attach(far, "elsewhere", {"tcp": transport}, block_bytes=BLOCK_BYTES)
    transport.close()
