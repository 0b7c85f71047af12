"""The other process of `pdserve bench kv`: owns memory, offers it by everything that is installed, answers on stdin.

    python -m pdserve_cli.bench_kv_server

Prints one JSON line, then obeys: `cpu` prints its CPU seconds so far. A plain socket asks by (offset, length) pairs and
gets the bytes, sent with `sendall`: what tcp costs without any transport.
"""

from __future__ import annotations

import json
import socket
import struct
import sys
import threading
import time

import numpy as np

from kvstore.handover.verify import PoolDescriptor, digest_blocks
from kvstore.transports.base import Transport
from kvstore.transports.registry import NAMES, OPTIONAL, make_transport
from kvstore.transports.shm import SharedMemoryPool
from kvstore.transports.tcp import TcpOptions
from kvstore.transports.tcp_stream import tune
from pdserve.errors import ConfigError
from pdserve_cli.bench_kv_peers import PEERS, PeerMissing, RawServer

BLOCK_BYTES = 2 << 20
NUM_BLOCKS = 128
REQUEST = struct.Struct("<QQ")


def main() -> None:
    pool = SharedMemoryPool(NUM_BLOCKS, BLOCK_BYTES)
    pool.blocks[:] = np.random.default_rng(0).integers(0, 256, pool.blocks.shape, dtype=np.uint8)
    transports, missing = open_all()
    offers = {n: PoolDescriptor.of(pool, t.register(pool.region)).encode().hex() for n, t in transports.items()}
    raw: dict[str, RawServer] = {}
    for name, peer in PEERS.items():
        try:
            raw[name] = peer.serve(pool.region)
        except PeerMissing as error:
            missing[name] = str(error)
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=accept, args=(listener, pool.region.data), daemon=True).start()
    hello = {
        "offers": offers,
        "raw": {name: server.address for name, server in raw.items()},
        "missing": missing,
        "digests": [digest.hex() for digest in digest_blocks(pool, range(NUM_BLOCKS))],
        "port": listener.getsockname()[1],
    }
    print(json.dumps(hello), flush=True)
    for _ in sys.stdin:
        print(time.process_time(), flush=True)
    for transport in transports.values():
        transport.close()
    pool.close()


def open_all() -> tuple[dict[str, Transport], dict[str, str]]:
    """Every transport that can be had here, and why the others can't."""
    found: dict[str, Transport] = {}
    missing: dict[str, str] = {}
    for name in (*NAMES, *OPTIONAL):
        try:
            found[name] = make_transport(name)
        except ConfigError as error:
            missing[name] = error.message
    return found, missing


def accept(listener: socket.socket, memory: memoryview) -> None:
    """The first connection keeps the kernel's buffers, the second gets ours."""
    for tuned in (False, True):
        sock, _ = listener.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tuned:
            tune(sock, TcpOptions().buffer_bytes, 10.0)
        threading.Thread(target=send, args=(sock, memory), daemon=True).start()


def send(sock: socket.socket, memory: memoryview) -> None:
    while request := sock.recv(REQUEST.size, socket.MSG_WAITALL):
        offset, length = REQUEST.unpack(request)
        sock.sendall(memory[offset : offset + length])


if __name__ == "__main__":
    main()
