"""A real node store in this process, reached by real gRPC and shared memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import numpy as np
from numpy.typing import NDArray

from kvstore.node.client import StoreClient
from kvstore.node.process import NodeStore
from pdserve.config import KvstoreConfig, from_mapping
from pdserve.rpc import Channel, Tls

BLOCK_BYTES = 4096
FINGERPRINT = b"F" * 16


def keys(prefix: str, length: int) -> list[bytes]:
    return [f"{prefix}{i}".encode().ljust(16, b".") for i in range(length)]


def pages(block_keys: list[bytes]) -> NDArray[np.uint8]:
    """A block a key; the bytes follow from the key."""
    return np.stack(
        [np.random.default_rng(int.from_bytes(key)).integers(0, 256, BLOCK_BYTES, np.uint8) for key in block_keys]
    )


@asynccontextmanager
async def running_store(**overrides: object) -> AsyncIterator[NodeStore]:
    tree = {"block_bytes": BLOCK_BYTES, "num_blocks": 16, "eviction": "lru", "high_watermark": 1.0,
            "low_watermark": 1.0, "node_id": "n1", "drain_timeout_s": 0.2, **overrides}  # fmt: skip
    store = NodeStore(from_mapping(KvstoreConfig, tree))
    try:
        await store.start()
        yield store
    finally:
        await store.stop()


@asynccontextmanager
async def channel_to(address: str, tls: Tls | None = None) -> AsyncIterator[Channel]:
    channel = Channel(address, tls=tls)
    try:
        yield channel
    finally:
        await channel.close()


@asynccontextmanager
async def client_of(store: NodeStore, name: str = "w", tls: Tls | None = None) -> AsyncIterator[StoreClient]:
    async with channel_to(store.address, tls) as channel:
        client = await StoreClient.attach(channel, name, block_bytes=BLOCK_BYTES)
        try:
            yield client
        finally:
            await client.close()


async def put(client: StoreClient, block_keys: list[bytes], **options: object) -> int:
    rows = range(len(block_keys))
    return await client.put(block_keys, FINGERPRINT, pages(block_keys), rows, **options)  # type: ignore[arg-type]


async def get(client: StoreClient, block_keys: list[bytes], **options: object) -> int:
    """How many leading blocks were there; their bytes are checked."""
    found = await client.lookup(block_keys, FINGERPRINT, **options)  # type: ignore[arg-type]
    count = len(found.slots)
    into = np.zeros((max(count, 1), BLOCK_BYTES), np.uint8)
    client.read(found, into, range(count))
    assert (into[:count] == pages(block_keys)[:count]).all()
    await client.release(found)
    return count


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 (what it waits for tells nobody)
            await asyncio.sleep(0.01)
