"""A whole cluster on this machine: one process per worker and one router, started, watched and drained together.

`pdserve up`, `pdserve parity`, the benchmarks and the end-to-end tests all stand on this one class. Children get
SIGTERM when this process dies, so that nothing outlives it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from pdserve.errors import ServiceError

_PR_SET_PDEATHSIG = 1
"""prctl(2): the signal a child gets when its parent dies."""
_LOG_TAIL_BYTES = 2000
_POLL_S = 0.02


class ClusterError(ServiceError):
    """A process of the cluster didn't start, or died. The message holds the end of its log."""

    reason = "cluster_failed"


@dataclass(frozen=True, slots=True)
class ClusterSpec:
    """What to start. `worker` and `router` are config overrides (dotted keys of `pdserve.config`)."""

    prefill: int = 1
    decode: int = 1
    engine: str = "torch"
    model: str = "embedded"
    http_port: int = 0
    grpc_port: int = 0
    worker: Mapping[str, object] = field(default_factory=dict)
    router: Mapping[str, object] = field(default_factory=dict)
    python: str = sys.executable
    """Interpreter of the workers (vLLM lives in an environment of its own)."""
    start_timeout_s: float = 120.0
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Member:
    """One process: its name, its ready line, its log."""

    name: str
    role: str
    process: asyncio.subprocess.Process
    log: Path
    ready: dict[str, Any] = field(default_factory=dict)

    @property
    def alive(self) -> bool:
        return self.process.returncode is None

    def log_tail(self) -> str:
        return self.log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace")


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _sets(overrides: Mapping[str, object]) -> list[str]:
    return [part for key, value in overrides.items() for part in ("--set", f"{key}={json.dumps(value)}")]


class Cluster:
    """An async context manager: inside it the cluster answers; on leaving it is drained and gone."""

    def __init__(self, spec: ClusterSpec, report: Callable[[str], None] = lambda line: None) -> None:
        self.spec = spec
        self.members: list[Member] = []
        self._report = report
        self._folder = tempfile.TemporaryDirectory(prefix="pdserve-")
        self.started_s = 0.0

    async def __aenter__(self) -> Cluster:
        try:
            await self.start()
        except BaseException:
            await self.kill()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def router(self) -> Member:
        return next(member for member in self.members if member.role == "router")

    @property
    def workers(self) -> list[Member]:
        return [member for member in self.members if member.role != "router"]

    @property
    def http_url(self) -> str:
        return f"http://127.0.0.1:{self.router.ready['http_port']}"

    @property
    def grpc_address(self) -> str:
        return f"127.0.0.1:{self.router.ready['grpc_port']}"

    async def start(self) -> None:
        """Workers first, side by side; then the router that knows their addresses. Raises `ClusterError`."""
        begun = time.monotonic()
        names = [("prefill", i) for i in range(self.spec.prefill)] + [("decode", i) for i in range(self.spec.decode)]
        await asyncio.gather(*(self._start_worker(role, i) for role, i in names))
        router = {
            "model": self.spec.model,
            "http_listen": f"127.0.0.1:{self.spec.http_port}",
            "grpc_listen": f"127.0.0.1:{self.spec.grpc_port}",
            "workers": [member.ready["address"] for member in self.workers],
            **self.spec.router,
        }
        member = await self._spawn("router", "router", [sys.executable, "-m", "router", *_sets(router)])
        await self._wait_ready(member)
        await self._wait_answering()
        self.started_s = time.monotonic() - begun

    async def restart_worker(self, dead: Member) -> Member:
        """A dead worker's successor on its address, where the router finds it."""
        return await self._start_worker(dead.role, int(dead.name.rpartition("-")[2]), {"listen": dead.ready["address"]})

    async def _start_worker(self, role: str, index: int, overrides: Mapping[str, object] | None = None) -> Member:
        config = {
            "worker_id": f"{role}-{index}",
            "engine": self.spec.engine,
            "model": self.spec.model,
            **self.spec.worker,
            **(overrides or {}),
        }
        command = [self.spec.python, "-m", f"{role}_worker", *_sets(config)]
        member = await self._spawn(f"{role}-{index}", role, command)
        await self._wait_ready(member)
        return member

    async def _spawn(self, name: str, role: str, command: Sequence[str]) -> Member:
        log = Path(self._folder.name) / f"{name}.log"
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **self.spec.env}
        with log.open("ab") as sink:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=sink,
                env=env,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        member = Member(name, role, process, log)
        self.members.append(member)
        return member

    async def _wait_ready(self, member: Member) -> None:
        assert member.process.stdout is not None
        begun = time.monotonic()
        try:
            async with asyncio.timeout(self.spec.start_timeout_s):
                async for line in member.process.stdout:
                    event = _parse(line)
                    if event.get("event") == "ready":
                        member.ready = event
                        self._report(f"{member.name} ready after {time.monotonic() - begun:.1f} s")
                        return
        except TimeoutError:
            raise ClusterError(
                f"{member.name} was not ready within {self.spec.start_timeout_s:.0f} s:\n{member.log_tail()}"
            ) from None
        await member.process.wait()
        raise ClusterError(f"{member.name} ended with {member.process.returncode}:\n{member.log_tail()}")

    async def _wait_answering(self) -> None:
        """Until the router has sessions with a whole pair: /readyz says 200."""
        deadline = time.monotonic() + self.spec.start_timeout_s
        while time.monotonic() < deadline:
            status, body = await self.get("/readyz")
            if status == 200:
                return
            dead = [member for member in self.members if not member.alive]
            if dead:
                raise ClusterError(f"{dead[0].name} ended with {dead[0].process.returncode}:\n{dead[0].log_tail()}")
            await asyncio.sleep(_POLL_S)
        raise ClusterError(f"the router is not ready: {body}")

    async def get(self, path: str, port: int | None = None) -> tuple[int, str]:
        """GET from the router (or from another member's HTTP port): status and body."""
        url = f"http://127.0.0.1:{port or self.router.ready['http_port']}{path}"
        return await asyncio.to_thread(_get, url)

    async def model_name(self) -> str:
        """The name that clients use."""
        status, body = await self.get("/v1/models")
        if status != 200:
            raise ClusterError(f"/v1/models answers {status}: {body}")
        name: str = json.loads(body)["data"][0]["id"]
        return name

    async def metric(self, member: Member, name: str) -> float:
        """The sum of a metric's samples over all labels, from a worker's /metrics."""
        _, body = await self.get("/metrics", member.ready["http_port"])
        return sum(
            float(line.rsplit(" ", 1)[1]) for line in body.splitlines() if line.startswith((name + "{", name + " "))
        )

    def kill_member(self, member: Member) -> None:
        """SIGKILL, for fault tests."""
        os.kill(member.process.pid, signal.SIGKILL)

    async def stop(self, grace_s: float = 30.0) -> None:
        """SIGTERM to the router, then to the workers; whoever outlives the grace is killed."""
        routers = [member for member in self.members if member.role == "router"]
        for group in (routers, self.workers):
            for member in group:
                if member.alive:
                    member.process.terminate()
            await self._wait_gone(group, grace_s)
        self._folder.cleanup()

    async def _wait_gone(self, group: Sequence[Member], grace_s: float) -> None:
        try:
            async with asyncio.timeout(grace_s):
                await asyncio.gather(*(member.process.wait() for member in group))
        except TimeoutError:
            for member in group:
                if member.alive:
                    member.process.kill()
                    await member.process.wait()

    async def kill(self) -> None:
        """End everything at once."""
        for member in self.members:
            if member.alive:
                member.process.kill()
                await member.process.wait()
        self._folder.cleanup()


def _parse(line: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        event = json.loads(line)
        if isinstance(event, dict):
            return event
    return {}


def _get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError as error:
        return 0, str(error)


@contextlib.asynccontextmanager
async def run_cluster(spec: ClusterSpec) -> AsyncIterator[Cluster]:
    """The harness of tests and benchmarks."""
    async with Cluster(spec) as cluster:
        yield cluster
