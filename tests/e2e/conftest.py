"""Whole local clusters, real processes. Two are shared by the session; tests that break things start their own."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest_asyncio

from pdserve_cli.cluster import Cluster, ClusterSpec, run_cluster

sys.path.insert(0, str(Path(__file__).parent))

SIM_WORKER = {"num_blocks": 4096, "drain_timeout_s": 60.0}
ROUTER = {
    "connect_backoff_s": 0.2, "disaggregate": "always", "breaker.slow_ms": 60_000.0, "heartbeats_missed": 60,
}  # fmt: skip
"""On a busy machine hand-overs are slow and processes silent for seconds; no test expects that the router then does
without. The one about silence sets its own bound."""

SLOW = {"prefill_ms": 100.0, "decode_ms": 20.0, "chunk_tokens": 64}
"""Step times at which a request can be caught half-way: a chunk of the prompt, a token."""

Start = Callable[..., Awaitable[Cluster]]


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def sim_cluster() -> AsyncIterator[Cluster]:
    """Two prefill and two decode workers with the sim engine, as fast as they can."""
    spec = ClusterSpec(prefill=2, decode=2, engine="sim", worker=SIM_WORKER, router=ROUTER)
    async with run_cluster(spec) as cluster:
        yield cluster


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def torch_cluster() -> AsyncIterator[Cluster]:
    """One prefill and one decode worker with the embedded model. Prompts over 64 tokens take several chunks."""
    worker = {"dtype": "bf16", "chunk_tokens": 64, "kv_memory_bytes": 256 << 20}
    async with run_cluster(ClusterSpec(engine="torch", worker=worker, router=ROUTER)) as cluster:
        yield cluster


@pytest_asyncio.fixture(loop_scope="session")
async def start_sim() -> AsyncIterator[Start]:
    """Starts a slow sim cluster of the test's own, to break: `await start_sim(decode=2, router={...})`."""
    async with AsyncExitStack() as stack:

        async def start(prefill: int = 1, decode: int = 1, router: Any = (), **worker: object) -> Cluster:
            return await stack.enter_async_context(run_cluster(_slow(prefill, decode, router, worker)))

        yield start


def _slow(prefill: int, decode: int, router: Any = (), worker: Any = ()) -> ClusterSpec:
    timing = {"sim.timing": "fixed", "sim.prefill_ms": SLOW["prefill_ms"], "sim.decode_ms": SLOW["decode_ms"]}
    settings = {**SIM_WORKER, **timing, "chunk_tokens": SLOW["chunk_tokens"], **dict(worker)}
    return ClusterSpec(prefill, decode, engine="sim", worker=settings, router={**ROUTER, **dict(router)})


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def slow_cluster() -> AsyncIterator[Cluster]:
    """One slow prefill and one slow decode worker, shared by tests that leave it whole."""
    async with run_cluster(_slow(1, 1)) as cluster:
        yield cluster


@pytest_asyncio.fixture(loop_scope="session")
async def http_to() -> AsyncIterator[Callable[[Cluster], httpx.AsyncClient]]:
    """A plain HTTP client of a cluster, with connections of its own."""
    async with AsyncExitStack() as stack:

        def make(cluster: Cluster) -> httpx.AsyncClient:
            limits = httpx.Limits(max_connections=None)
            client = httpx.AsyncClient(
                base_url=cluster.http_url, timeout=60, trust_env=False, verify=False, limits=limits
            )
            stack.push_async_callback(client.aclose)
            return client

        yield make


@pytest_asyncio.fixture(loop_scope="session")
async def http(sim_cluster: Cluster, http_to: Callable[[Cluster], httpx.AsyncClient]) -> httpx.AsyncClient:
    """To the shared sim cluster."""
    return http_to(sim_cluster)


def _openai(cluster: Cluster) -> openai.AsyncOpenAI:
    transport = openai.DefaultAsyncHttpxClient(trust_env=False, verify=False)
    return openai.AsyncOpenAI(
        api_key="none", base_url=f"{cluster.http_url}/v1", max_retries=0, timeout=120, http_client=transport
    )


@pytest_asyncio.fixture(loop_scope="session")
async def client(torch_cluster: Cluster) -> AsyncIterator[openai.AsyncOpenAI]:
    """The official client, on the embedded model. It does not retry: each error is seen."""
    async with _openai(torch_cluster) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="session")
async def sim_client(sim_cluster: Cluster) -> AsyncIterator[openai.AsyncOpenAI]:
    """The official client, on the sim engine."""
    async with _openai(sim_cluster) as made:
        yield made
