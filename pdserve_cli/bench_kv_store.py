"""Put and get of 1 MB blocks, 16 a request: our node's store, Mooncake Store and Redis, each a process of its own.

`put` is reserve, copy, digest and commit of fresh keys; `get` is a look-up with a lease, the fenced copy, the digests
of all blocks, and the release. Mooncake Store runs as `mooncake_master`, a node that gives the memory, and this client
with registered buffers (`batch_put_from`, `batch_get_into`). Redis is spoken to by pipelined RESP over one socket; its
own Python client is slower. Neither of the two checks a digest.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from kvstore.handover.verify import DigestPolicy
from kvstore.node.client import StoreClient
from kvstore.transports.shm import SharedMemoryPool
from pdserve.rpc import Channel
from pdserve_cli.bench_ways import Way

BLOCK_BYTES = 1 << 20
REQUEST_BLOCKS = 16
NBYTES = REQUEST_BLOCKS * BLOCK_BYTES
POOL_BLOCKS = 512
"""Rounds put less than this, so nobody evicts."""
FINGERPRINT = b"benchmark-layout"
START_S = 20.0

Keys = Iterator[list[bytes]]


def store_ways(stack: ExitStack, missing: dict[str, str]) -> dict[str, Way]:
    """Ways by name; what is not installed is told in `missing`."""
    ours = _Ours(stack)
    ways = ours.ways()
    makers: dict[str, Callable[[], dict[str, Way]]] = {
        "mooncake_store": lambda: _MooncakeStore(stack).ways(),
        "redis": lambda: _Redis(stack).ways(),
    }
    for name, make in makers.items():
        try:
            ways |= make()
        except (ImportError, FileNotFoundError) as error:
            missing[name] = str(error)
    return ways


def fresh_keys() -> Keys:
    for n in itertools.count():
        yield [(n * REQUEST_BLOCKS + i).to_bytes(16, "little") for i in range(REQUEST_BLOCKS)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start(stack: ExitStack, *command: str, **options: Any) -> subprocess.Popen[str]:
    process = stack.enter_context(
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options)
    )
    stack.callback(process.kill)
    return process


def cpu_of(*processes: subprocess.Popen[str]) -> Callable[[], float]:
    """CPU seconds of other processes so far."""
    tick = os.sysconf("SC_CLK_TCK")

    def seconds() -> float:
        stats = [Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split() for process in processes]
        return sum(int(fields[11]) + int(fields[12]) for fields in stats) / tick

    return seconds


def request_bytes(seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (REQUEST_BLOCKS, BLOCK_BYTES), dtype=np.uint8)


class _Ours:
    """`python -m kvstore`, and a client of it."""

    def __init__(self, stack: ExitStack) -> None:
        settings = {"block_bytes": BLOCK_BYTES, "num_blocks": POOL_BLOCKS, "log_level": "error"}
        options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        process = start(stack, sys.executable, "-m", "kvstore", *options)
        assert process.stdout is not None
        address = json.loads(process.stdout.readline())["address"]
        self._runner = stack.enter_context(asyncio.Runner())
        self.cpu_s = cpu_of(process)
        self._engine = SharedMemoryPool(2 * REQUEST_BLOCKS, BLOCK_BYTES)
        self._engine.blocks[:REQUEST_BLOCKS] = request_bytes(0)
        stack.callback(self._engine.close)
        self._client = self._runner.run(self._attach(address))
        self._keys = fresh_keys()
        self._stored: list[bytes] = []

    async def _attach(self, address: str) -> StoreClient:
        return await StoreClient.attach(Channel(address), "bench", alive_segment=self._engine.name)

    async def _put(self) -> None:
        self._stored = next(self._keys)
        assert await self._client.put(self._stored, FINGERPRINT, self._engine.blocks, range(REQUEST_BLOCKS))

    async def _get(self) -> None:
        found = await self._client.lookup(self._stored, FINGERPRINT)
        rows = range(REQUEST_BLOCKS, 2 * REQUEST_BLOCKS)
        await asyncio.to_thread(self._client.read, found, self._engine.blocks, rows, DigestPolicy())
        await self._client.release(found)

    def ways(self) -> dict[str, Way]:
        put = Way(NBYTES, lambda: self._runner.run(self._put()), cpu_s=self.cpu_s)
        get = Way(NBYTES, lambda: self._runner.run(self._get()), cpu_s=self.cpu_s)
        return {"put": put, "get": get}


class _MooncakeStore:
    """`mooncake_master`, a node with memory in a process of its own, a client without any."""

    def __init__(self, stack: ExitStack) -> None:
        os.environ.setdefault("GLOG_minloglevel", "2")
        from mooncake.store import MooncakeDistributedStore

        master = shutil.which("mooncake_master", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        if master is None:
            raise FileNotFoundError("mooncake_master is not on the path")
        port, metrics = free_port(), free_port()
        quiet = {"stderr": subprocess.DEVNULL}
        options = [f"--rpc_port={port}", f"--metrics_port={metrics}", "--rpc_thread_num=2"]
        start(stack, master, "--rpc_address=127.0.0.1", *options, **quiet)
        wait_for(port)
        node = start(stack, sys.executable, "-m", "pdserve_cli.bench_kv_store", str(port), **quiet)
        assert node.stdout is not None
        node.stdout.readline()
        self._client = MooncakeDistributedStore()
        self._client.setup(f"127.0.0.1:{free_port()}", "P2PHANDSHAKE", 0, 64 << 20, "tcp", "", f"127.0.0.1:{port}")
        self._source, self._target = request_bytes(1), np.zeros((REQUEST_BLOCKS, BLOCK_BYTES), dtype=np.uint8)
        for memory in (self._source, self._target):
            self._client.register_buffer(memory.ctypes.data, memory.nbytes)
        self._keys = fresh_keys()
        self._stored: list[str] = []

    def _put(self) -> None:
        self._stored = [key.hex() for key in next(self._keys)]
        done = self._client.batch_put_from(self._stored, self._addresses(self._source), [BLOCK_BYTES] * REQUEST_BLOCKS)
        assert all(status == 0 for status in done), done

    def _get(self) -> None:
        done = self._client.batch_get_into(self._stored, self._addresses(self._target), [BLOCK_BYTES] * REQUEST_BLOCKS)
        assert all(count == BLOCK_BYTES for count in done), done

    def _addresses(self, memory: np.ndarray[Any, Any]) -> list[int]:
        return [memory.ctypes.data + i * BLOCK_BYTES for i in range(REQUEST_BLOCKS)]

    def ways(self) -> dict[str, Way]:
        return {"mooncake_store_put": Way(NBYTES, self._put), "mooncake_store_get": Way(NBYTES, self._get)}


class _Redis:
    """`redis-server` without persistence."""

    def __init__(self, stack: ExitStack) -> None:
        binary = shutil.which("redis-server")
        if binary is None:
            raise FileNotFoundError("redis-server is not on the path")
        port = free_port()
        options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        start(stack, binary, *options, stderr=subprocess.DEVNULL)
        wait_for(port)
        self._sock = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._source, self._target = request_bytes(2), np.zeros((REQUEST_BLOCKS, BLOCK_BYTES), dtype=np.uint8)
        self._keys = fresh_keys()
        self._stored: list[bytes] = []

    def _put(self) -> None:
        self._stored = next(self._keys)
        for key, block in zip(self._stored, self._source, strict=True):
            self._sock.sendall(b"*3\r\n$3\r\nSET\r\n$16\r\n%b\r\n$%d\r\n" % (key, BLOCK_BYTES))
            self._sock.sendall(block.data)
            self._sock.sendall(b"\r\n")
        answers = bytearray(REQUEST_BLOCKS * len(b"+OK\r\n"))
        self._sock.recv_into(answers, len(answers), socket.MSG_WAITALL)
        assert answers == b"+OK\r\n" * REQUEST_BLOCKS

    def _get(self) -> None:
        self._sock.sendall(b"".join(b"*2\r\n$3\r\nGET\r\n$16\r\n%b\r\n" % key for key in self._stored))
        head = b"$%d\r\n" % BLOCK_BYTES
        for block in self._target:
            assert self._sock.recv(len(head), socket.MSG_WAITALL) == head
            self._sock.recv_into(block.data, BLOCK_BYTES, socket.MSG_WAITALL)
            self._sock.recv(2, socket.MSG_WAITALL)

    def ways(self) -> dict[str, Way]:
        return {"redis_put": Way(NBYTES, self._put), "redis_get": Way(NBYTES, self._get)}


def wait_for(port: int) -> None:
    """Until somebody listens there. Raises `TimeoutError`."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
            return
        except OSError:
            time.sleep(0.02)
    raise TimeoutError(f"nobody listens on port {port}")


def give_memory(port: int) -> None:
    """The node of Mooncake Store: `python -m pdserve_cli.bench_kv_store PORT`."""
    from mooncake.store import MooncakeDistributedStore

    store = MooncakeDistributedStore()
    size = POOL_BLOCKS * BLOCK_BYTES
    store.setup(f"127.0.0.1:{free_port()}", "P2PHANDSHAKE", size, 16 << 20, "tcp", "", f"127.0.0.1:{port}")
    print("ready", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    give_memory(int(sys.argv[1]))
