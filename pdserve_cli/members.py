"""The processes of a local cluster, one by one: spawned, waited for, and started again at the same addresses.

Children get SIGTERM when this process dies, so that nothing outlives it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import random
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pdserve.errors import ServiceError

_PR_SET_PDEATHSIG = 1
"""prctl(2): the signal a child gets when its parent dies."""
_LIBC = ctypes.CDLL(None)
"""Opened before any fork: between fork and exec a child of a threaded process must not take the loader's lock."""
_LOG_TAIL_BYTES = 2000
_STABLE_PORTS = range(18_000, 32_000)
"""Below Linux' ephemeral range (32768 on): while a process is down, no client's connection can take its port."""
_PORT_TRIES = 200


class ClusterError(ServiceError):
    """A process of the cluster didn't start, or died. The message holds the end of its log."""

    reason = "cluster_failed"


@dataclass(slots=True)
class Member:
    """One process: its name, its ready line, its log, and what it takes to start it again."""

    name: str
    role: str
    process: asyncio.subprocess.Process
    log: Path
    command: tuple[str, ...]
    config: Mapping[str, object]
    ready: dict[str, Any] = field(default_factory=dict)

    @property
    def alive(self) -> bool:
        return self.process.returncode is None

    @property
    def pid(self) -> int:
        return self.process.pid

    def log_tail(self) -> str:
        return self.log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace")

    def addresses(self) -> dict[str, object]:
        """Config keys that give a successor the addresses of this one; none if it never got as far."""
        if not self.ready:
            return {}
        http = f"127.0.0.1:{self.ready['http_port']}"
        if self.role == "router":
            return {"http_listen": http, "grpc_listen": f"127.0.0.1:{self.ready['grpc_port']}"}
        return {"listen": self.ready["address"], "http_listen": http}


async def spawn(
    name: str,
    role: str,
    command: Sequence[str],
    config: Mapping[str, object],
    log: Path,
    env: Mapping[str, str],
) -> Member:
    """Start a process in a session of its own; its stderr is added to `log`."""
    with log.open("ab") as sink:
        process = await asyncio.create_subprocess_exec(
            *command,
            *_sets(config),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=sink,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **env},
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
    return Member(name, role, process, log, tuple(command), dict(config))


async def wait_ready(member: Member, timeout_s: float) -> float:
    """Until its ready line came; returns the seconds that took. Raises `ClusterError`."""
    assert member.process.stdout is not None
    begun = time.monotonic()
    try:
        async with asyncio.timeout(timeout_s):
            async for line in member.process.stdout:
                event = _parse(line)
                if event.get("event") == "ready":
                    member.ready = event
                    return time.monotonic() - begun
            await member.process.wait()
    except TimeoutError:
        raise ClusterError(f"{member.name} was not ready within {timeout_s:.0f} s:\n{member.log_tail()}") from None
    raise ClusterError(f"{member.name} ended with {member.process.returncode}:\n{member.log_tail()}")


async def wait_gone(group: Sequence[Member], grace_s: float) -> None:
    """Whoever outlives the grace is killed."""
    try:
        async with asyncio.timeout(grace_s):
            await asyncio.gather(*(member.process.wait() for member in group))
    except TimeoutError:
        for member in group:
            if member.alive:
                member.process.kill()
                await member.process.wait()


def stable_port(taken: set[int]) -> int:
    """A free port of this host that its next owner will find free, too. Raises `ClusterError`."""
    for _ in range(_PORT_TRIES):
        port = random.choice(_STABLE_PORTS)
        if port in taken:
            continue
        with contextlib.suppress(OSError), socket.socket() as trial:
            trial.bind(("127.0.0.1", port))
            taken.add(port)
            return port
    raise ClusterError(f"no free port between {_STABLE_PORTS.start} and {_STABLE_PORTS.stop}")


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _sets(overrides: Mapping[str, object]) -> list[str]:
    return [part for key, value in overrides.items() for part in ("--set", f"{key}={json.dumps(value)}")]


def _parse(line: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        event = json.loads(line)
        if isinstance(event, dict):
            return event
    return {}
