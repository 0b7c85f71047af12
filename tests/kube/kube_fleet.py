"""A router that follows the real API server, over pods that run nowhere: each fake pod is played by a real worker
(sim engine) in this process, and its address is led there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import httpx
from kube_tools import Cluster

from pdserve.config import KubernetesConfig, RouterConfig, SimConfig, WorkerConfig
from pdserve.types import Role
from router.app import Router
from router.discovery.kubernetes import KubernetesDiscovery
from router.discovery.slice_api import SliceApi
from worker_core.engines import build_engine
from worker_core.worker import Worker

STEP_MS = 20.0
"""A decode step: requests last long enough for something to happen to their pod."""


class Played:
    """Discovery whose addresses are led to the workers that play the pods."""

    def __init__(self, discovery: KubernetesDiscovery, fleet: KubeFleet) -> None:
        self._discovery, self._fleet = discovery, fleet
        self.known: frozenset[str] = frozenset()
        """As the API server names them."""

    @property
    def answering(self) -> bool:
        return self._discovery.answering

    async def watch(self) -> AsyncGenerator[frozenset[str]]:
        async with aclosing(self._discovery.watch()) as changes:
            async for addresses in changes:
                for address in addresses - self.known:
                    await self._fleet.play(address)
                self.known = addresses
                yield frozenset(self._fleet.players[address].address for address in addresses)


class KubeFleet:
    """`start`, then ask by HTTP on `url`."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.config = KubernetesConfig(
            kubeconfig=cluster.kubeconfig,
            namespace=cluster.namespace,
            selector="pdserve.io/workers,pdserve.io/fleet=pd-pdserve",
            watch_s=2.0,
            timeout_s=2.0,
        )
        self.discovery = Played(KubernetesDiscovery(self.config, SliceApi(self.config)), self)
        self.players: dict[str, Worker] = {}
        """By the address of the pod that they play."""
        config = RouterConfig(
            http_listen="127.0.0.1:0",
            grpc_listen="127.0.0.1:0",
            connect_backoff_s=0.2,
            policy="round_robin",  # every worker that may get a request gets one soon
            disaggregate="always",
        )
        self._router = Router(config, self.discovery)
        self.client = httpx.AsyncClient(timeout=90, trust_env=False)

    async def __aenter__(self) -> KubeFleet:
        await self._router.start()
        self.client.base_url = httpx.URL(f"http://127.0.0.1:{self._router.http_port}")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.aclose()
        await self._router.stop()
        for worker in self.players.values():
            await worker.stop()

    async def play(self, address: str) -> None:
        """Have a worker play the pod that is at an address now: a new pod soon gets the address of one that is gone."""
        name, role = await asyncio.to_thread(self._pod_at, address.rpartition(":")[0])
        before = self.players.get(address)
        if before is not None and before.info.worker_id == name:
            return
        if before is not None:
            await before.stop()
        config = WorkerConfig(
            worker_id=name,
            engine="sim",
            num_blocks=512,
            sim=SimConfig(timing="fixed", decode_ms=STEP_MS),
            drain_timeout_s=5,
        )
        worker = Worker(config, role, build_engine)
        await worker.start()
        self.players[address] = worker

    def _pod_at(self, ip: str) -> tuple[str, Role]:
        """Looked up in the slices, like all else that the router's side knows here; the API server may be slow."""
        for each in self._cluster.get("endpointslices"):
            for endpoint in each["endpoints"] or ():
                if ip in endpoint["addresses"] and not endpoint["conditions"].get("terminating"):
                    labels = each["metadata"]["labels"]
                    return endpoint["targetRef"]["name"], Role(labels["app.kubernetes.io/component"])
        raise AssertionError(f"no endpoint has {ip}")

    # ---- what tests do ----

    async def until_knows(self, count: int, timeout_s: float = 90.0) -> None:
        """`count` workers take new requests, as far as discovery knows."""
        try:
            await self.until(lambda: len(self.discovery.known) == count, timeout_s)
        except TimeoutError as error:
            told = await asyncio.to_thread(addresses_in, self._cluster)
            raise AssertionError(
                f"not {count} workers: discovery knows {set(self.discovery.known)}, slices say {told}"
            ) from error

    async def until(self, condition, timeout_s: float = 90.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():  # noqa: ASYNC110 - it looks at others' state, which signals nothing
                await asyncio.sleep(0.02)

    async def until_ready(self) -> None:
        async with asyncio.timeout(90):
            while (await self.client.get("/readyz")).status_code != 200:  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    async def answered(self) -> bool:
        """What /metrics tells of discovery."""
        return "pdserve_discovery_up 1.0" in (await self.client.get("/metrics")).text

    async def ask(self, max_tokens: int = 2) -> tuple[str, str]:
        """The workers of one request that was answered in full: prefill's and decode's."""
        answer = await self.client.post(
            "/v1/completions",
            json={"model": "smollm2-135m", "prompt": "hello", "max_tokens": max_tokens, "ignore_eos": True},
        )
        assert answer.status_code == 200, answer.text
        body = answer.json()
        assert body["usage"]["completion_tokens"] == max_tokens
        record = (await self.client.get(f"/v1/requests/{answer.headers['x-request-id']}")).json()
        return record["prefill_worker"], record["decode_worker"]

    async def ask_many(self, count: int) -> set[str]:
        """Every worker that a burst of requests was placed on."""
        return {name for pair in await asyncio.gather(*(self.ask() for _ in range(count))) for name in pair}

    def ready_links(self) -> set[str]:
        """Names of the connected workers that take new requests."""
        return {link.info.worker_id for link in self._router._fleet.links if not link.draining}

    def player_named(self, name: str) -> Worker:
        return next(worker for worker in self.players.values() if worker.info.worker_id == name)

    def busy(self, role: Role) -> list[str]:
        """Names of the workers of a role that have requests."""
        return [w.info.worker_id for w in self.players.values() if w.info.role is role and len(w.jobs)]


def addresses_in(cluster: Cluster) -> set[str]:
    """What the API server says now, asked by kubectl; read in another way than discovery does."""
    return {
        f"{endpoint['addresses'][0]}:7000"
        for each in cluster.get("endpointslices", "-l", "pdserve.io/workers")
        for endpoint in each["endpoints"] or ()
        if endpoint["conditions"].get("ready") and not endpoint["conditions"].get("terminating")
    }


class Load:
    """Requests all the time, until `stop`; every one must be answered."""

    def __init__(self, fleet: KubeFleet, streams: int = 3) -> None:
        self._fleet = fleet
        self.placed: list[str] = []
        self._tasks = [asyncio.create_task(self._run()) for _ in range(streams)]
        self._stopping = False

    async def _run(self) -> None:
        while not self._stopping:
            self.placed.extend(await self._fleet.ask())

    async def some_more(self, count: int = 12) -> set[str]:
        """Where the next requests go, once those under way are through."""
        start = len(self.placed) + 2 * len(self._tasks)
        await self._fleet.until(lambda: len(self.placed) >= start + count or any(t.done() for t in self._tasks))
        self._check()
        return set(self.placed[start:])

    async def stop(self) -> None:
        self._stopping = True
        await asyncio.gather(*self._tasks)

    def _check(self) -> None:
        for task in self._tasks:
            if task.done():
                task.result()
