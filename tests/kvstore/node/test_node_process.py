"""`python -m kvstore` and `pdserve kv` as processes: start, status, crash of a client, drain, restart."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from node_tools import BLOCK_BYTES, FINGERPRINT, channel_to, get, keys, put

from kvstore.node.client import StoreClient
from pdserve.errors import PeerLost, TicketRefused, WorkerLost
from pdserve.rpc import Channel
from pdserve.wire import store as wire

ROOT = Path(__file__).parents[3]

WRITER = """
import asyncio, sys
from kvstore.node.client import StoreClient
from kvstore.transports.shm import SharedMemoryPool
from pdserve.rpc import Channel

async def main(address):
    own = SharedMemoryPool(1, 4096)  # as a worker's engine has one
    client = await StoreClient.attach(Channel(address), "doomed", alive_segment=own.name)
    reserved = await client.reserve([b"k" * 16, b"l" * 16], b"F" * 16)
    print(len(reserved.slots), flush=True)
    await asyncio.Event().wait()

asyncio.run(main(sys.argv[1]))
"""


async def _run(*arguments: str) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(sys.executable, *arguments, cwd=ROOT, stdout=pipe, stderr=pipe)


@dataclass
class StoreProcess:
    process: asyncio.subprocess.Process
    ready: dict[str, Any]

    async def get(self, path: str) -> tuple[int, str]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.ready["http_port"])
        writer.write(f"GET {path} HTTP/1.1\r\n\r\n".encode())
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        return int(head.split()[1]), body.decode()

    async def cli(self, *arguments: str) -> tuple[int, str]:
        """Exit code and stdout of `pdserve kv`."""
        action, *rest = arguments
        process = await _run("-m", "pdserve_cli", "kv", action, "--address", self.ready["address"], *rest)
        out, _ = await process.communicate()
        assert process.returncode is not None
        return process.returncode, out.decode()

    async def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return await asyncio.wait_for(self.process.wait(), 60)


@asynccontextmanager
async def store_process(**overrides: object) -> AsyncIterator[StoreProcess]:
    sets = {"block_bytes": BLOCK_BYTES, "num_blocks": 16, "eviction": "lru", **overrides}
    process = await _run("-m", "kvstore", *(p for k, v in sets.items() for p in ("--set", f"{k}={json.dumps(v)}")))
    try:
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), 60)
        if not line:
            raise AssertionError((await process.stderr.read()).decode())  # type: ignore[union-attr]
        yield StoreProcess(process, json.loads(line))
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _until(condition: Callable[[], Awaitable[object]]) -> None:
    async with asyncio.timeout(60):
        while not await condition():  # noqa: ASYNC110 (another process decides)
            await asyncio.sleep(0.05)


async def _stat(channel: Channel, condition: Callable[[wire.Stat], bool]) -> bool:
    return condition(await channel.call(wire.STAT, wire.StatQuery(), timeout_s=60))


async def test_a_store_serves_is_inspected_and_drains() -> None:
    async with store_process(scrub_blocks=0) as store, channel_to(store.ready["address"]) as channel:
        assert (await store.get("/healthz"))[0] == (await store.get("/readyz"))[0] == 200
        client = await StoreClient.attach(channel, "w")
        await put(client, keys("a", 3), tenant="t")
        assert await get(client, keys("a", 4)) == 3
        status, out = await store.cli("stat", "--json")
        assert (status, json.loads(out)["visible_blocks"]) == (0, 3)
        status, out = await store.cli("ls")
        assert re.search(rf"^{keys('a', 1)[0].hex()}/{FINGERPRINT.hex()} dram \d+ t leases=0$", out, re.M)
        client.pool.blocks[:] += 1
        status, out = await store.cli("verify", "--all", "--json")
        assert (status, len(json.loads(out)["corrupt"])) == (3, 3)
        await put(client, keys("b", 2))
        block = f"{keys('b', 1)[0].hex()}/{FINGERPRINT.hex()}"
        assert await store.cli("drop", block) == (0, "1 blocks dropped\n")
        metrics = (await store.get("/metrics"))[1]
        for line in (
            'pdserve_kvstore_hit_blocks_total{tier="dram"} 3.0',
            'pdserve_kvstore_evictions_total{reason="corrupt",tier="dram"} 3.0',
            'pdserve_kvstore_evictions_total{reason="dropped",tier="dram"} 1.0',
            'pdserve_kvstore_integrity_failures_total{tier="dram"} 3.0',
            'pdserve_kvstore_seconds_count{operation="reserve"} 2.0',
        ):
            assert line in metrics
        assert await store.end(signal.SIGTERM) == 0
        with pytest.raises(PeerLost):
            client.pool.check_alive()
        await client.close()


async def test_slots_of_a_killed_writer_come_free_when_its_reservation_lapses() -> None:
    async with store_process(reservation_s=1.0) as store, channel_to(store.ready["address"]) as channel:
        writer = await _run("-c", WRITER, store.ready["address"])
        try:
            assert writer.stdout is not None
            assert await asyncio.wait_for(writer.stdout.readline(), 60) == b"2\n"
            client = await StoreClient.attach(channel, "other")
            await _until(lambda: put(client, [b"k" * 16, b"l" * 16]))  # busy until it lapses
            stat = await channel.call(wire.STAT, wire.StatQuery(), timeout_s=60)
            assert (stat.visible_blocks, stat.reserved_blocks) == (2, 2)  # the silent writer lives: its slots rest
        finally:
            writer.kill()
            await writer.wait()
        await _until(lambda: _stat(channel, lambda stat: not stat.reserved_blocks))
        await client.close()


async def test_a_killed_store_comes_back_with_its_disk_and_nothing_of_its_memory(tmp_path: Path) -> None:
    disk = {"path": str(tmp_path / "kv"), "capacity_bytes": 1 << 22}
    settings = {"num_blocks": 8, "high_watermark": 0.75, "low_watermark": 0.5, "disk": disk}
    async with store_process(**settings) as store, channel_to(store.ready["address"]) as channel:
        client = await StoreClient.attach(channel, "w")
        await put(client, keys("a", 4))
        await put(client, keys("b", 4))
        await _until(lambda: _stat(channel, lambda stat: stat.disk_blocks >= 4))
        os.kill(store.ready["pid"], signal.SIGKILL)
        await store.process.wait()
        with pytest.raises(PeerLost):
            client.pool.check_alive()
        with pytest.raises(WorkerLost):
            await client.lookup(keys("a", 4), FINGERPRINT)
    async with store_process(**settings) as store, channel_to(store.ready["address"]) as channel:
        with pytest.raises(TicketRefused):
            await channel.call(
                wire.LOOKUP, wire.Lookup(client.attached.session, FINGERPRINT, tuple(keys("a", 4))), timeout_s=5
            )
        again = await StoreClient.attach(channel, "w")
        assert again.attached.incarnation != client.attached.incarnation
        assert await get(again, keys("a", 4)) == 4
        await again.close()


async def test_a_config_error_names_its_key_and_exits_with_2() -> None:
    process = await _run("-m", "kvstore", "--set", "block_bytes=0")
    _, err = await process.communicate()
    assert process.returncode == 2
    assert err.decode().startswith("kvstore: block_bytes: ")
