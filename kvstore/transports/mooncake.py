"""`mooncake`: Mooncake's TransferEngine, for RDMA (and tcp, where its tests run). Extra `mooncake`.

Engines find each other by "P2PHANDSHAKE": a peer's host and port is all it takes, no metadata server. That handshake
asks for no identity. So this transport's port must be reachable by the pool's own machines only, and descriptors (host,
port, addresses) are handed out as all others: after mutual TLS or a ticket. See `docs/adr/0011-optional-transports.md`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvstore.transports.one_sided import MAX_BATCH_BYTES, Link, OneSidedTransport, Operation
from pdserve.errors import ConfigError, PeerLost, TransferTimeout

RDMA_DEVICES = Path("/sys/class/infiniband")
MIN_TIMEOUT_S = 5
"""The engine takes no less, and whole seconds only."""


@dataclass(frozen=True, slots=True)
class MooncakeOptions:
    """How the engine is reached and what it moves bytes by."""

    host: str = "127.0.0.1"
    """Where peers reach this engine; the engine picks the port."""
    protocol: str = "tcp"
    """tcp | rdma."""
    device: str = ""
    """RDMA devices, comma-separated; empty: all that the engine finds."""
    progress_timeout_s: float = 10.0


def make_mooncake(options: MooncakeOptions | None = None) -> OneSidedTransport:
    """Raises `ConfigError` that names the package, the system library or the device that is missing."""
    return OneSidedTransport("mooncake", MooncakeLibrary(options or MooncakeOptions()))


class MooncakeLibrary:
    """A `kvstore.transports.one_sided.Library`."""

    def __init__(self, options: MooncakeOptions) -> None:
        _check_device(options)
        self._timeout_s = max(MIN_TIMEOUT_S, int(options.progress_timeout_s))
        # rdma: the NIC gives a request up after its retries, some seconds, so that after a time-out nothing arrives
        self.landing_bytes = 0 if options.protocol == "rdma" else MAX_BATCH_BYTES
        self._engine = _engine_class(self._timeout_s)()
        if self._engine.initialize(options.host, "P2PHANDSHAKE", options.protocol, options.device):
            raise ConfigError(
                f"Mooncake's engine does not start on {options.host} by {options.protocol}: see its log",
                key="transports",
            )
        self._name = f"{options.host}:{self._engine.get_rpc_port()}"

    def register(self, address: int, nbytes: int) -> None:
        if self._engine.register_memory(address, nbytes):
            raise ConfigError(f"Mooncake's engine cannot register {nbytes} bytes: see its log", key="transports")

    def deregister(self, address: int, nbytes: int) -> None:
        self._engine.unregister_memory(address)

    def endpoint(self) -> bytes:
        return self._name.encode()

    def connect(self, endpoint: bytes) -> Link:
        try:
            name = endpoint.decode("ascii")
        except UnicodeDecodeError as error:
            raise PeerLost("the peer's mooncake descriptor names no host") from error
        return MooncakeLink(self._engine, name, self._timeout_s)

    def close(self) -> None:
        self._engine = None  # its destructor stops the threads and the port


class MooncakeLink:
    """A `kvstore.transports.one_sided.Link`. The engine keeps the connections."""

    def __init__(self, engine: Any, name: str, timeout_s: float) -> None:
        self._name, self._timeout_s = name, timeout_s
        self._calls = {"read": engine.batch_transfer_sync_read, "write": engine.batch_transfer_sync_write}

    def move(self, operation: Operation, remote: Sequence[int], local: Sequence[int], lengths: Sequence[int]) -> None:
        call = self._calls.get(operation)
        if call is None:
            raise PeerLost("this peer was closed")
        began = time.monotonic()
        if not call(self._name, list(local), list(remote), list(lengths)):
            return
        if time.monotonic() - began >= self._timeout_s:
            raise TransferTimeout(f"{self._name} did not finish a transfer within {self._timeout_s} s")
        raise PeerLost(f"{self._name} is gone, or its memory is not registered any more (Mooncake says no more)")

    def close(self) -> None:
        self._calls = {}


def _check_device(options: MooncakeOptions) -> None:
    if options.protocol not in ("tcp", "rdma"):
        raise ConfigError(f"mooncake.protocol is {options.protocol!r}: choose tcp or rdma", key="mooncake.protocol")
    if options.protocol == "rdma" and not (RDMA_DEVICES.is_dir() and any(RDMA_DEVICES.iterdir())):
        raise ConfigError(
            f"mooncake.protocol is rdma, but this machine has no RDMA device ({RDMA_DEVICES} is empty): give the pod "
            "one, or set mooncake.protocol to tcp",
            key="mooncake.protocol",
        )


def _engine_class(timeout_s: int) -> Any:
    """An engine reads its settings from the environment when it is made."""
    os.environ["MC_TRANSFER_TIMEOUT"] = str(timeout_s)
    os.environ.setdefault("MC_TCP_ENABLE_CONNECTION_POOL", "1")  # batches of 64 KB pieces: 1.3 to 2.2 times as fast
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
    os.environ.setdefault("GLOG_minloglevel", "2")
    try:
        from mooncake.engine import TransferEngine
    except ModuleNotFoundError as error:
        raise ConfigError(
            "the transport mooncake needs its engine: pip install 'pdserve[mooncake]' (host memory), or "
            "mooncake-transfer-engine for CUDA",
            key="transports",
        ) from error
    except ImportError as error:
        raise ConfigError(
            f"Mooncake's engine does not load ({error}): on Debian and Ubuntu apt-get install libibverbs1",
            key="transports",
        ) from error
    return TransferEngine
