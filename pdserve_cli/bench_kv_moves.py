"""Ways to move KV between two processes, for `pdserve bench kv`."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np

from kvstore.handover.verify import PoolDescriptor, digest_policy, pull_blocks
from kvstore.ranges import coalesce
from kvstore.transports.base import Peer, Range
from kvstore.transports.registry import make_transport
from kvstore.transports.shm import SharedMemoryPool
from kvstore.transports.tcp import TcpOptions
from kvstore.transports.tcp_stream import tune
from pdserve.engine.base import ImportTarget
from pdserve.types import KVManifest
from pdserve_cli.bench_kv_peers import PEERS, Reader
from pdserve_cli.bench_kv_server import BLOCK_BYTES, NUM_BLOCKS, REQUEST
from pdserve_cli.bench_ways import Way

SIZES = {"64KB": 64 << 10, "1MB": 1 << 20, "16MB": 16 << 20, "256MB": 256 << 20}
NUM_MOVED = 64
SOURCE = tuple(range(NUM_MOVED))
TARGET = ImportTarget(tuple((i * 37) % NUM_MOVED for i in range(NUM_MOVED)))
"""A permutation without neighbours: no two blocks merge."""
OUR_NAMES = {"nixl": "nixl_transport"}
"""Where a transport of ours would be mistaken for the library itself."""


class Exporter:
    """The other process, and all connections to it."""

    def __init__(self, stack: ExitStack) -> None:
        command = [sys.executable, "-m", "pdserve_cli.bench_kv_server"]
        self._process = stack.enter_context(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
        stack.callback(self._process.kill)
        hello: dict[str, Any] = json.loads(self._line())
        self.missing: dict[str, str] = hello["missing"]
        self.digests = tuple(bytes.fromhex(digest) for digest in hello["digests"])
        self.sources = {n: PoolDescriptor.decode(bytes.fromhex(offer)) for n, offer in hello["offers"].items()}
        self.raw: dict[str, list[Any]] = hello["raw"]
        self.sockets = {name: self._connect(hello["port"], name, stack) for name in ("sockets", "sockets_tuned")}
        self.pool = SharedMemoryPool(NUM_BLOCKS, BLOCK_BYTES)
        stack.callback(self.pool.close)
        self.peers = {name: self._peer(name, stack) for name in self.sources}
        self.readers: dict[str, Reader] = {n: PEERS[n](address, self.pool.region) for n, address in self.raw.items()}

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def _connect(self, port: int, name: str, stack: ExitStack) -> socket.socket:
        sock = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if name == "sockets_tuned":
            tune(sock, TcpOptions().buffer_bytes, 10.0)
        return sock

    def _peer(self, name: str, stack: ExitStack) -> Peer:
        transport = make_transport(name)
        stack.callback(transport.close)
        transport.register(self.pool.region)
        return transport.connect(self.sources[name].region)

    def cpu_s(self) -> float:
        assert self._process.stdin is not None
        print("cpu", file=self._process.stdin, flush=True)
        return float(self._line())

    def by_socket(self, name: str, ranges: Sequence[Range]) -> None:
        """All asked for at once, so that the sender never waits."""
        sock, memory = self.sockets[name], self.pool.region.data
        sock.sendall(b"".join(REQUEST.pack(r.remote, r.length) for r in ranges))
        for r in ranges:
            sock.recv_into(memory[r.local : r.local + r.length], r.length, socket.MSG_WAITALL)

    def pull(self, name: str, manifest: KVManifest) -> None:
        pull_blocks(self.peers[name], self.sources[name], manifest, self.pool, TARGET, digest_policy(name))


@contextmanager
def move_ways(sizes: Sequence[str]) -> Iterator[tuple[dict[str, dict[str, Way]], dict[str, str]]]:
    """Ways by case, and what is missing."""
    with ExitStack() as stack:
        exporter = Exporter(stack)
        source = np.ones(NUM_BLOCKS * BLOCK_BYTES, dtype=np.uint8)
        cases = {size: _reads(exporter, source, [Range(0, 0, SIZES[size])]) for size in sizes}
        cases["handover"] = _hand_over(exporter, source)
        yield cases, exporter.missing


def _reads(exporter: Exporter, source: Any, ranges: list[Range]) -> dict[str, Way]:
    """The bare read of these ranges, each way."""
    nbytes = sum(r.length for r in ranges)
    region = exporter.pool.region

    def memcpy() -> None:
        for r in ranges:
            region[r.local : r.local + r.length] = source[r.remote : r.remote + r.length]

    ways = {"memcpy": Way(nbytes, memcpy)}
    for name in exporter.sockets:
        ways[name] = Way(nbytes, partial(exporter.by_socket, name, ranges))
    for name, reader in exporter.readers.items():
        ways[name] = Way(nbytes, partial(reader.read, ranges))
    for name, peer in exporter.peers.items():
        ways[OUR_NAMES.get(name, name)] = Way(nbytes, partial(peer.read, ranges, region))
    for way in ways.values():
        way.cpu_s = exporter.cpu_s
    return ways


def _hand_over(exporter: Exporter, source: Any) -> dict[str, Way]:
    ranges = coalesce(SOURCE, TARGET.blocks, BLOCK_BYTES)
    manifest = KVManifest(0, 0, 16 * NUM_MOVED, SOURCE, (0,) * NUM_MOVED, exporter.digests[:NUM_MOVED], True)
    ways = _reads(exporter, source, ranges)
    for name in exporter.peers:
        ways[OUR_NAMES.get(name, name)].run = partial(exporter.pull, name, manifest)
    return ways
