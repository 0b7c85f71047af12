"""One cell of parity's matrix: a cluster, every case through it three times over and more, and what differed.

With the store on there are two nodes, each with a tiny store of its own. The rounds go through three routers: one that
knows every worker, then one for each node's prefill worker. So a prompt comes back where its KV is not, and must be
fetched: from the node's own store, or from the other's. At last the prefill workers are restarted, and asked again.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pdserve.errors import PdserveError
from pdserve_cli.block_bytes import block_bytes
from pdserve_cli.client import Answer, stream
from pdserve_cli.cluster import Cluster, ClusterSpec
from pdserve_cli.parity_cases import MAX_REPLY
from pdserve_cli.parity_rot import DiskRot
from pdserve_cli.parity_types import OUTPUTS, ROUNDS, SEEDED, Case, Run, prompt_of
from pdserve_cli.tiers import TIERS, TinyPools, hits, scratch

_TIMEOUT_S = 600.0
"""Of every leg: with tiny pools most requests wait for room, and nothing is wrong with that."""
_SIM_TIMING = {"sim.timing": "fixed", "sim.prefill_ms": 4.0, "sim.decode_ms": 0.5}
"""No engine is faster: one that needs no time at all would outrun every disk, and little would ever be stored."""
_TIMEOUTS = ("prefill_timeout_s", "transfer_timeout_s", "decode_timeout_s", "queue_timeout_s")


@dataclass(frozen=True, slots=True)
class Cell:
    """One configuration of the cluster under test."""

    transport: str
    chunk: int
    batch: int


@dataclass(frozen=True, slots=True)
class Setting:
    """What all cells have in common."""

    engine: str
    model: str
    dtype: str
    store: bool
    corrupt_every: int = 0
    """Corrupt every Nth block on disk: between the first rounds while the stores run, later while they are down."""
    seed: int = 0


@dataclass(slots=True)
class Findings:
    """What the cells found, added up. `wrong`: the first mismatch of each case that had one."""

    wrong: dict[int, str] = field(default_factory=dict)
    max_logprob_diff: float = 0.0
    kv_bytes_moved: int = 0
    cached_tokens: int = 0
    hits: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TIERS, 0))
    corrupted: int = 0
    caught: int = 0
    uncaught: list[str] = field(default_factory=list)
    cells: int = 0


async def run_cell(setting: Setting, cell: Cell, cases: Sequence[Case], alone: Sequence[Run], found: Findings) -> None:
    """Adds to `found`. Raises `ClusterError`."""
    with scratch() as disk:
        async with Cluster(_spec(setting, cell, cases, disk)) as cluster:
            model = await cluster.model_name()
            rot = DiskRot(cluster, Path(disk), setting.corrupt_every, random.Random(setting.seed))
            for round_, url in zip(ROUNDS, await _urls(cluster), strict=True):
                await _round(url, model, round_, cell, cases, alone, found)
                await rot.after(round_)
            if setting.store:
                await _forget(cluster, found)
                await _round(cluster.http_url, model, ROUNDS[0], cell, cases, alone, found)
            await _sum_up(cluster, rot, found)
    found.cells += 1


async def _forget(cluster: Cluster, found: Findings) -> None:
    """Prefill workers start anew: whatever they need not compute can only come from the stores."""
    prefill = cluster.of_role("prefill")
    for tier, blocks in (await hits(cluster, prefill)).items():
        found.hits[tier] += blocks
    for member in prefill:
        member.process.terminate()
        await cluster.restart(member)
    await cluster.wait_answering()


async def _sum_up(cluster: Cluster, rot: DiskRot, found: Findings) -> None:
    for member in cluster.workers:
        found.kv_bytes_moved += int(await cluster.metric(member, "pdserve_kv_pulled_bytes_total"))
    for tier, blocks in (await hits(cluster)).items():
        found.hits[tier] += blocks + rot.hits[tier]
    await rot.finish()
    found.corrupted += rot.corrupted
    found.caught += rot.caught
    found.uncaught += rot.uncaught


def _spec(setting: Setting, cell: Cell, cases: Sequence[Case], disk: str) -> ClusterSpec:
    worker: dict[str, object] = {
        "transports": [cell.transport],
        "chunk_tokens": cell.chunk,
        "dtype": setting.dtype,
        "deterministic": setting.dtype == "bf16" and setting.engine == "torch",
        "kv_memory_bytes": 2 << 30,
        "relay_timeout_s": _TIMEOUT_S,
        "store_fetch": "always",
        **(_SIM_TIMING if setting.engine == "sim" else {}),
    }
    base = {"engine": setting.engine, "model": setting.model}
    router = {"disaggregate": "always", "breaker.slow_ms": 1000 * _TIMEOUT_S, **dict.fromkeys(_TIMEOUTS, _TIMEOUT_S)}
    if not setting.store:
        return ClusterSpec(
            engine=setting.engine, model=setting.model, worker=worker, router=router, start_timeout_s=_TIMEOUT_S
        )
    pools = TinyPools.of([len(case.prompt) + 2 * OUTPUTS + MAX_REPLY for case in cases])
    worker["num_blocks"] = pools.worker
    store = pools.store(block_bytes({**base, **worker}), disk)
    return ClusterSpec(
        prefill=2,
        decode=2,
        nodes=2,
        store=store,
        engine=setting.engine,
        model=setting.model,
        worker=worker,
        router=router,
        start_timeout_s=_TIMEOUT_S,
        stable_ports=True,
    )


async def _urls(cluster: Cluster) -> list[str]:
    """The router of each round."""
    if not cluster.stores:
        return [cluster.http_url] * len(ROUNDS)
    decode = cluster.of_role("decode")
    others = [
        await cluster.start_router(f"router-{member.name}", [member, *decode]) for member in cluster.of_role("prefill")
    ]
    return [f"http://127.0.0.1:{router.ready['http_port']}" for router in (cluster.router, *others)]


async def _round(
    url: str, model: str, round_: str, cell: Cell, cases: Sequence[Case], alone: Sequence[Run], found: Findings
) -> None:
    """Later rounds go backwards: what was asked last is still in a worker's own cache."""
    gate = asyncio.Semaphore(cell.batch)

    async def one(case: Case, run: Run) -> Answer | PdserveError:
        async with gate:
            try:
                body = request(model, case, run, round_)
                return await asyncio.to_thread(stream, url, "/v1/completions", body, _TIMEOUT_S)
            except PdserveError as error:
                return error

    order = [*range(len(cases))] if round_ == ROUNDS[0] else [*reversed(range(len(cases)))]
    answers = await asyncio.gather(*(one(cases[index], alone[index]) for index in order))
    for index, answer in zip(order, answers, strict=True):
        problem = _compare(answer, alone[index], round_, found)
        if problem:
            where = f"prompt {index} ({len(cases[index].prompt)} tokens), {round_}, {asdict(cell)}"
            found.wrong.setdefault(index, f"{where}: {problem}")


def request(model: str, case: Case, run: Run, round_: str) -> dict[str, Any]:
    """The body of a completion for this case and round."""
    body = {
        "model": model,
        "prompt": list(prompt_of(case, run, round_)),
        "max_tokens": OUTPUTS,
        "ignore_eos": True,
        "return_token_ids": True,
        "logprobs": 0,
    }
    return body | ({**SEEDED, "seed": case.seed} if round_ == "seeded" else {"temperature": 0})


def _compare(answer: Answer | PdserveError, run: Run, round_: str, found: Findings) -> str | None:
    """What is wrong with it, if anything."""
    if isinstance(answer, PdserveError):
        return f"{answer.reason}: {answer.message}"
    found.cached_tokens += (answer.usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    if tuple(answer.token_ids) != run.outputs(round_):
        return f"{answer.token_ids} instead of {list(run.outputs(round_))}"
    if round_ == "greedy" and answer.logprobs:
        pairs = zip(answer.logprobs, run.logprobs, strict=False)
        found.max_logprob_diff = max(found.max_logprob_diff, *(abs(a - b) for a, b in pairs))
    return None
