"""The peers of `pdserve bench kv`, used as their own documentation does: no code of ours between them and the bytes.

Mooncake's TransferEngine on tcp and NIXL over UCX, both reading straight into registered memory. They check no digest
and no generation. Settings are those that measured best here: Mooncake's connection pool, batches of 256 ranges, NIXL
with its progress thread (which spins on a core) in the process that is read.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from kvstore.transports.base import Range
from pdserve.errors import PeerLost

Memory = NDArray[np.uint8]
MOONCAKE_BATCH = 256


class PeerMissing(Exception):
    """Not installed here; says what is."""


@dataclass(frozen=True)
class RawServer:
    """Memory that a peer's library offers. `address` is what the reader needs, as JSON."""

    address: list[str | int]
    keep: object


class Reader(Protocol):
    def read(self, ranges: Sequence[Range]) -> None: ...


class MooncakeTcp:
    """TransferEngine, protocol tcp."""

    name: ClassVar[str] = "mooncake_tcp"

    @staticmethod
    def engine() -> Any:
        os.environ.setdefault("MC_TCP_ENABLE_CONNECTION_POOL", "1")
        os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
        os.environ.setdefault("GLOG_minloglevel", "2")
        try:
            from mooncake.engine import TransferEngine
        except ImportError as error:
            raise PeerMissing(f"make transports ({error})") from error
        engine = TransferEngine()
        engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "")
        return engine

    @classmethod
    def serve(cls, memory: Memory) -> RawServer:
        engine = cls.engine()
        engine.register_memory(memory.ctypes.data, memory.nbytes)
        return RawServer([engine.get_rpc_port(), memory.ctypes.data], engine)

    def __init__(self, address: list[Any], target: Memory) -> None:
        port, self._base = address
        self._peer, self._engine, self._target = f"127.0.0.1:{port}", self.engine(), target
        self._engine.register_memory(target.ctypes.data, target.nbytes)

    def read(self, ranges: Sequence[Range]) -> None:
        base, engine = self._target.ctypes.data, self._engine
        for i in range(0, len(ranges), MOONCAKE_BATCH):
            part = ranges[i : i + MOONCAKE_BATCH]
            ours, theirs = [base + r.local for r in part], [self._base + r.remote for r in part]
            if engine.batch_transfer_sync_read(self._peer, ours, theirs, [r.length for r in part]):
                raise PeerLost("Mooncake's read failed")


class Nixl:
    """UCX's own choice of wire: between processes of one host that is the kernel's cross-memory copy."""

    name: ClassVar[str] = "nixl"

    @staticmethod
    def agent(name: str, progress: bool) -> Any:
        os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
        try:
            import nixl._api as api
        except ImportError as error:
            raise PeerMissing(f"make transports ({error})") from error
        return api.nixl_agent(name, api.nixl_agent_config(enable_prog_thread=progress, backends=["UCX"]))

    @classmethod
    def serve(cls, memory: Memory) -> RawServer:
        agent = cls.agent("bench-exporter", True)
        registered = agent.register_memory([(memory.ctypes.data, memory.nbytes, 0, "")], "DRAM")
        return RawServer([agent.get_agent_metadata().hex(), memory.ctypes.data], (agent, registered))

    def __init__(self, address: list[Any], target: Memory) -> None:
        metadata, self._base = address
        self._agent, self._target = self.agent("bench-importer", False), target
        self._registered = self._agent.register_memory([(target.ctypes.data, target.nbytes, 0, "")], "DRAM")
        self._peer = self._agent.add_remote_agent(bytes.fromhex(metadata))

    def read(self, ranges: Sequence[Range]) -> None:
        agent, base = self._agent, self._target.ctypes.data
        ours = np.array([(base + r.local, r.length, 0) for r in ranges], dtype=np.uint64)
        theirs = np.array([(self._base + r.remote, r.length, 0) for r in ranges], dtype=np.uint64)
        ours, theirs = agent.get_xfer_descs(ours, "DRAM"), agent.get_xfer_descs(theirs, "DRAM")
        handle = agent.initialize_xfer("READ", ours, theirs, self._peer, b"")
        state = agent.transfer(handle)
        spins = 0
        while state == "PROC":
            spins += 1
            if spins > 1000:
                time.sleep(0.00005)
            state = agent.check_xfer_state(handle)
        agent.release_xfer_handle(handle)
        if state != "DONE":
            raise PeerLost("NIXL's read failed")


PEERS: dict[str, type[MooncakeTcp] | type[Nixl]] = {"mooncake_tcp": MooncakeTcp, "nixl": Nixl}
