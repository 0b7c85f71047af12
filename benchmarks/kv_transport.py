"""How fast our transports move a prompt's KV between two processes, beside plain sockets and memcpy.

    python benchmarks/kv_transport.py --json

128 MB as 64 blocks of 2 MB, scattered so that no two merge. Every round runs each way once, in turn, so that all see
the same machine; figures are medians over the rounds. `plain_sockets` is sendall + recv_into of the same blocks over
one connection with the kernel's default buffers, `plain_sockets_tuned` the same with our buffer size. CPU seconds
count both processes. `pull` is the whole verified read (generations twice, digests) over that transport.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from kvstore.handover.verify import PoolDescriptor, digest_blocks, digest_policy, pull_blocks
from kvstore.ranges import coalesce
from kvstore.transports.base import Peer
from kvstore.transports.registry import NAMES, make_transport
from kvstore.transports.shm import SharedMemoryPool
from kvstore.transports.tcp import TcpOptions
from kvstore.transports.tcp_stream import tune
from pdserve.engine.base import ImportTarget
from pdserve.types import KVManifest

NUM_BLOCKS, BLOCK_BYTES = 64, 2 << 20
TOTAL = NUM_BLOCKS * BLOCK_BYTES
SOURCE = tuple(range(NUM_BLOCKS))
TARGET = ImportTarget(tuple((i * 37) % NUM_BLOCKS for i in range(NUM_BLOCKS)))
"""A permutation without neighbours."""


def serve() -> None:
    """The exporter: registers its pool with every transport, sends plain blocks on demand, reports its CPU time."""
    pool = SharedMemoryPool(NUM_BLOCKS, BLOCK_BYTES)
    pool.blocks[:] = np.random.default_rng(0).integers(0, 256, pool.blocks.shape, dtype=np.uint8)
    transports = {name: make_transport(name) for name in NAMES}
    regions = {name: PoolDescriptor.of(pool, t.register(pool.region)).encode().hex() for name, t in transports.items()}
    digests = [d.hex() for d in digest_blocks(pool, SOURCE)]
    with socket.create_server(("127.0.0.1", 0)) as server:
        print(json.dumps({"regions": regions, "digests": digests, "port": server.getsockname()[1]}), flush=True)
        plain = {"plain_sockets": server.accept()[0], "plain_sockets_tuned": server.accept()[0]}
        tune(plain["plain_sockets_tuned"], TcpOptions().buffer_bytes, 10.0)
        for line in sys.stdin:
            if line.strip() in plain:
                for i in SOURCE:
                    plain[line.strip()].sendall(pool.blocks[i].data)
            else:
                print(time.process_time(), flush=True)
    for transport in transports.values():
        transport.close()
    pool.close()


class Exporter:
    """The other process, seen from here."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        hello = json.loads(self.process.stdout.readline())
        self.regions = {name: PoolDescriptor.decode(bytes.fromhex(r)) for name, r in hello["regions"].items()}
        self.digests = tuple(bytes.fromhex(d) for d in hello["digests"])
        self.port = hello["port"]

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        print(line, file=self.process.stdin, flush=True)

    def cpu_s(self) -> float:
        self.tell("cpu")
        assert self.process.stdout is not None
        return float(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def receive(sock: socket.socket, pool: SharedMemoryPool) -> None:
    for block in TARGET.blocks:
        view = pool.blocks[block].data
        done = 0
        while done < BLOCK_BYTES:
            done += sock.recv_into(view[done:])


def ways(exporter: Exporter, pool: SharedMemoryPool) -> dict[str, Callable[[], None]]:
    """Every way to fill the pool, by name."""
    plain = {
        name: socket.create_connection(("127.0.0.1", exporter.port))
        for name in ("plain_sockets", "plain_sockets_tuned")
    }
    tune(plain["plain_sockets_tuned"], TcpOptions().buffer_bytes, 10.0)
    manifest = KVManifest(0, 0, 1, SOURCE, (0,) * NUM_BLOCKS, exporter.digests, True)
    ranges = coalesce(SOURCE, TARGET.blocks, BLOCK_BYTES)
    other = np.ones((NUM_BLOCKS, BLOCK_BYTES), dtype=np.uint8)

    def memcpy() -> None:
        for i, block in enumerate(TARGET.blocks):
            pool.blocks[block] = other[i]

    def sockets(name: str) -> None:
        exporter.tell(name)
        receive(plain[name], pool)

    def pull(name: str, peer: Peer) -> None:
        pull_blocks(peer, exporter.regions[name], manifest, pool, TARGET, digest_policy(name))

    found: dict[str, Callable[[], None]] = {"memcpy": memcpy}
    found |= {name: lambda name=name: sockets(name) for name in plain}
    for name in NAMES:
        peer = make_transport(name).connect(exporter.regions[name].region)
        found[name] = lambda peer=peer: peer.read(ranges, pool.region)
        found[f"{name}_pull"] = lambda name=name, peer=peer: pull(name, peer)
    return found


def measure(rounds: int) -> dict[str, object]:
    exporter, pool = Exporter(), SharedMemoryPool(NUM_BLOCKS, BLOCK_BYTES)
    runs = ways(exporter, pool)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, float] = dict.fromkeys(runs, 0.0)
    for n in range(rounds + 1):
        for name, run in runs.items():
            cpu_before = time.process_time() + exporter.cpu_s()
            before = time.perf_counter()
            run()
            took = time.perf_counter() - before
            if n:  # the first round warms up
                seconds[name].append(took)
                cpu[name] += time.process_time() + exporter.cpu_s() - cpu_before
    exporter.close()
    pool.close()
    return report(seconds, cpu, rounds)


def report(seconds: dict[str, list[float]], cpu: dict[str, float], rounds: int) -> dict[str, object]:
    gb_per_s = {name: TOTAL / 1e9 / statistics.median(took) for name, took in seconds.items()}
    sockets = max(gb_per_s["plain_sockets"], gb_per_s["plain_sockets_tuned"])
    return {
        "bytes": TOTAL,
        "blocks": NUM_BLOCKS,
        "rounds": rounds,
        "gb_per_s": {name: round(value, 2) for name, value in gb_per_s.items()},
        "cpu_s_per_gb": {name: round(value / (rounds * TOTAL / 1e9), 3) for name, value in cpu.items()},
        "tcp_vs_plain_sockets": round(gb_per_s["tcp"] / sockets, 2),
        "shm_vs_memcpy": round(gb_per_s["shm"] / gb_per_s["memcpy"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Transports against plain sockets and memcpy, 128 MB as 64 blocks.")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    result = measure(options.rounds)
    print(json.dumps(result, indent=None if options.json else 2))


if __name__ == "__main__":
    main()
