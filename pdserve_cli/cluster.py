"""A whole cluster on this machine: stores, workers and a router, started, watched, restarted and drained together.

`pdserve up`, `pdserve parity`, `pdserve chaos`, the benchmarks and the end-to-end tests all stand on this one class.
A cluster may be told to have several nodes, as if it were spread over machines: each has a KV store of its own, and
the workers are dealt out to them in turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
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

from kvstore.transports.segment import PREFIX, SHM_DIR
from pdserve_cli.block_bytes import block_bytes
from pdserve_cli.members import ClusterError, Member, spawn, stable_port, wait_gone, wait_ready

__all__ = ["Cluster", "ClusterError", "ClusterSpec", "Member", "run_cluster"]

_POLL_S = 0.02
_GET_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class ClusterSpec:
    """What to start. `worker`, `router` and `store` are config overrides (dotted keys of `pdserve.config`)."""

    prefill: int = 1
    decode: int = 1
    engine: str = "torch"
    model: str = "embedded"
    nodes: int = 1
    """Stores to start, if `store` is given; workers take them in turn."""
    store: Mapping[str, object] | None = None
    """None: no KV store. `block_bytes` is found from the workers' config; `disk.path` gets a folder a store."""
    http_port: int = 0
    grpc_port: int = 0
    worker: Mapping[str, object] = field(default_factory=dict)
    router: Mapping[str, object] = field(default_factory=dict)
    python: str = sys.executable
    """Interpreter of the workers (vLLM lives in an environment of its own)."""
    start_timeout_s: float = 120.0
    env: Mapping[str, str] = field(default_factory=dict)
    members: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    """Overrides of single workers, by name (`prefill-0`)."""
    programs: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """What to run instead of the worker's own program, by name: for tests of faulty ones."""
    stable_ports: bool = False
    """Ports that stay free while a process is down: for clusters whose members are killed and restarted."""


class Cluster:
    """An async context manager: inside it the cluster answers; on leaving it is drained and gone."""

    def __init__(self, spec: ClusterSpec, report: Callable[[str], None] = lambda line: None) -> None:
        self.spec = spec
        self.members: list[Member] = []
        self.buried: list[Member] = []
        """Processes that died and have a successor."""
        self.started_s = 0.0
        self._report = report
        self._folder = tempfile.TemporaryDirectory(prefix="pdserve-")
        self._secret = secrets.token_hex(16)
        """A restarted router must find what an earlier one's tenants cached."""
        self._ports: set[int] = set()

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

    # ---- members ----

    def of_role(self, *roles: str) -> list[Member]:
        return [member for member in self.members if member.role in roles]

    @property
    def router(self) -> Member:
        return self.of_role("router")[0]

    @property
    def workers(self) -> list[Member]:
        return self.of_role("prefill", "decode")

    @property
    def stores(self) -> list[Member]:
        return self.of_role("kvstore")

    @property
    def http_url(self) -> str:
        return f"http://127.0.0.1:{self.router.ready['http_port']}"

    @property
    def grpc_address(self) -> str:
        return f"127.0.0.1:{self.router.ready['grpc_port']}"

    @property
    def pids(self) -> set[int]:
        """Of every process that this cluster ever had."""
        return {member.pid for member in (*self.members, *self.buried)}

    # ---- life ----

    async def start(self) -> None:
        """Stores first, then workers, side by side; then the router that knows them. Raises `ClusterError`."""
        begun = time.monotonic()
        if self.spec.store is not None:
            await asyncio.gather(*(self._start_store(i) for i in range(self.spec.nodes)))
        names = [("prefill", i) for i in range(self.spec.prefill)] + [("decode", i) for i in range(self.spec.decode)]
        await asyncio.gather(*(self._start_worker(role, i) for role, i in names))
        await self.start_router("router", self.workers)
        await self.wait_answering()
        self.started_s = time.monotonic() - begun

    async def _start_store(self, index: int) -> None:
        given = dict(self.spec.store or {})
        config = {"node_id": f"kvstore-{index}", "block_bytes": 0, **self._listens(), **given}
        config["block_bytes"] = config["block_bytes"] or block_bytes(self._worker_config("prefill", 0))
        if config.get("disk.path"):
            config["disk.path"] = str(Path(str(config["disk.path"])) / f"kvstore-{index}")
        await self._start(f"kvstore-{index}", "kvstore", (sys.executable, "-m", "kvstore"), config)

    def _worker_config(self, role: str, index: int) -> dict[str, object]:
        config = {"worker_id": f"{role}-{index}", "engine": self.spec.engine, "model": self.spec.model}
        stores = self.stores
        node = {"store": stores[index % len(stores)].ready["address"]} if stores else {}
        return {**config, **node, **self.spec.worker, **self.spec.members.get(f"{role}-{index}", {})}

    async def _start_worker(self, role: str, index: int) -> None:
        config = {**self._worker_config(role, index), **self._listens()}
        name = f"{role}-{index}"
        program = self.spec.programs.get(name, ("-m", f"{role}_worker"))
        await self._start(name, role, (self.spec.python, *program), config)

    async def start_router(self, name: str, workers: Sequence[Member], **overrides: object) -> Member:
        """One more router, for these workers, and ready for requests. The first is the cluster's (`start` waits until
        that one is ready); both salt alike."""
        first = not self.of_role("router")
        http, grpc = (self._port(given if first else 0) for given in (self.spec.http_port, self.spec.grpc_port))
        config = {
            "model": self.spec.model,
            "http_listen": f"127.0.0.1:{http}",
            "grpc_listen": f"127.0.0.1:{grpc}",
            "workers": [member.ready["address"] for member in workers],
            "server_secret": self._secret,
            **self.spec.router,
            **overrides,
        }
        router = await self._start(name, "router", (sys.executable, "-m", "router"), config)
        if not first:
            await self.wait_answering(router)
        return router

    def _port(self, given: int) -> int:
        return stable_port(self._ports) if self.spec.stable_ports and not given else given

    def _listens(self) -> dict[str, object]:
        if not self.spec.stable_ports:
            return {}
        return {key: f"127.0.0.1:{self._port(0)}" for key in ("listen", "http_listen")}

    async def _start(self, name: str, role: str, command: Sequence[str], config: Mapping[str, object]) -> Member:
        log = Path(self._folder.name) / f"{name}.log"
        member = await spawn(name, role, command, config, log, self.spec.env)
        self.members.append(member)
        took = await wait_ready(member, self.spec.start_timeout_s)
        self._report(f"{member.name} ready after {took:.1f} s")
        return member

    def kill_member(self, member: Member) -> None:
        """SIGKILL, for fault tests."""
        os.kill(member.pid, signal.SIGKILL)

    async def restart(self, dead: Member) -> Member:
        """A dead process's successor, with its config, at its addresses, where the others find it."""
        await dead.process.wait()
        self.members.remove(dead)
        self.buried.append(dead)
        return await self._start(dead.name, dead.role, dead.command, {**dead.config, **dead.addresses()})

    async def wait_answering(self, router: Member | None = None) -> None:
        """Until the router (None: the cluster's) has sessions with a whole pair: /readyz says 200. Raises
        `ClusterError`."""
        port = (router or self.router).ready["http_port"]
        deadline = time.monotonic() + self.spec.start_timeout_s
        body = ""
        while time.monotonic() < deadline:
            status, body = await self.get("/readyz", port)
            if status == 200:
                return
            dead = [member for member in self.members if not member.alive]
            if dead:
                raise ClusterError(f"{dead[0].name} ended with {dead[0].process.returncode}:\n{dead[0].log_tail()}")
            await asyncio.sleep(_POLL_S)
        raise ClusterError(f"the router is not ready: {body}")

    async def stop(self, grace_s: float = 30.0) -> None:
        """SIGTERM to the routers, then to the workers, then to the stores; whoever outlives the grace is killed."""
        for group in (self.of_role("router"), self.workers, self.stores):
            for member in group:
                if member.alive:
                    member.process.terminate()
            await wait_gone(group, grace_s)
        self._folder.cleanup()

    async def kill(self) -> None:
        """End everything at once."""
        for member in self.members:
            if member.alive:
                member.process.kill()
                await member.process.wait()
        self._folder.cleanup()

    # ---- questions ----

    def segments(self) -> set[str]:
        """Names in /dev/shm made by this cluster's processes, dead ones too: a name begins with its owner's pid."""
        pids = {str(pid) for pid in self.pids}
        names = {path.name for path in SHM_DIR.glob(PREFIX + "*")}
        return {name for name in names if name.removeprefix(PREFIX).split("-")[0] in pids}

    async def get(self, path: str, port: int | None = None) -> tuple[int, str]:
        """GET from the router (or from another member's HTTP port): status and body; 0 when nobody answers."""
        url = f"http://127.0.0.1:{port or self.router.ready['http_port']}{path}"
        return await asyncio.to_thread(_get, url)

    async def model_name(self) -> str:
        """The name that clients use."""
        status, body = await self.get("/v1/models")
        if status != 200:
            raise ClusterError(f"/v1/models answers {status}: {body}")
        name: str = json.loads(body)["data"][0]["id"]
        return name

    async def metrics(self, member: Member) -> dict[str, float]:
        """Every sample of a member's /metrics, by name and labels as they are written; empty when it is down."""
        status, body = await self.get("/metrics", member.ready["http_port"])
        if status != 200:
            return {}
        lines = (line.rpartition(" ") for line in body.splitlines() if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in lines if name}

    async def metric(self, member: Member, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        return total(await self.metrics(member), name, **labels)


def total(samples: Mapping[str, float], name: str, **labels: str) -> float:
    """The sum of a metric's samples that have these labels, of what `Cluster.metrics` gave."""
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    return sum(
        value
        for sample, value in samples.items()
        if (sample == name or sample.startswith(name + "{")) and all(label in sample for label in wanted)
    )


def _get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=_GET_TIMEOUT_S) as response:
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
