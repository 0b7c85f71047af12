"""Whether a cluster at rest holds nothing: no request, no block in use or exported, no lease, no reservation."""

from __future__ import annotations

import asyncio
import time

from pdserve_cli import store_calls
from pdserve_cli.cluster import Cluster, Member, total

REST_S = 60.0
"""All bounds by which something is freed (leases, tickets, time-outs) end within it."""
_POLL_S = 0.1
_WORKER_FIGURES = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "pdserve_exported_blocks",
)
_STORE_FIGURES = ("leases", "leased_blocks", "reserved_blocks")


async def at_rest(cluster: Cluster, timeout_s: float = REST_S) -> list[str]:
    """What is still held after `timeout_s`; empty as soon as nothing is."""
    deadline = time.monotonic() + timeout_s
    while held := await _held(cluster):
        if time.monotonic() > deadline:
            return held
        await asyncio.sleep(_POLL_S)
    return []


async def _held(cluster: Cluster) -> list[str]:
    held = []
    for member in cluster.members:
        figures = await (_store_figures(member) if member.role == "kvstore" else _figures(cluster, member))
        held += [f"{member.name}: {name} is {value:g}" for name, value in figures.items() if value]
    return held


async def _figures(cluster: Cluster, member: Member) -> dict[str, float]:
    samples = await cluster.metrics(member)
    names = ("pdserve_requests_inflight",) if member.role == "router" else _WORKER_FIGURES
    if not samples:
        return {"unreachable": 1.0}
    return {name: total(samples, name) for name in names}


async def _store_figures(member: Member) -> dict[str, float]:
    found = await store_calls.stat(member)
    return {name: float(getattr(found, name)) for name in _STORE_FIGURES}


async def verified(cluster: Cluster, *, disk_may_be_wrong: bool = False) -> list[str]:
    """Every block of every store compared with its digest; what was wrong."""
    found = []
    for store in cluster.stores:
        result = await store_calls.verify(store)
        if result.corrupt:
            found.append(f"{store.name}: {len(result.corrupt)} wrong blocks in memory")
        if result.corrupt_on_disk and not disk_may_be_wrong:
            found.append(f"{store.name}: {result.corrupt_on_disk} wrong blocks on disk")
    return found
