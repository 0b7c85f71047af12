"""`pdserve chaos`: kill -9 of every process, again and again, under load; what is answered must stay right.

Two nodes with tiny stores, so that KV moves between all tiers while processes die. At the end the cluster must be at
rest (no block, lease or segment held by anyone), hold no wrong block, answer every case and find KV in its stores.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pdserve_cli.block_bytes import block_bytes
from pdserve_cli.chaos_kills import ROLES, Killer
from pdserve_cli.chaos_load import Load
from pdserve_cli.chaos_rest import at_rest, verified
from pdserve_cli.cluster import Cluster, ClusterSpec, Member
from pdserve_cli.disk_faults import Rot
from pdserve_cli.parity_alone import generate_alone
from pdserve_cli.parity_cases import MAX_REPLY, make_cases
from pdserve_cli.parity_types import OUTPUTS, Case
from pdserve_cli.tiers import TinyPools, hits, scratch
from pdserve_cli.verdict import judged, say

_BOUNDS_S = {"prefill_timeout_s": 20.0, "transfer_timeout_s": 20.0, "decode_timeout_s": 20.0}
_SLOW_MS = 20_000.0
"""Slow hand-overs are no reason to do without: the machine is busy, and the hand-over is what is to be tested."""
_LEASE_S = 5.0
"""What a dead process held is free after this: the run ends sooner, and more leases end under load."""


@dataclass(frozen=True, slots=True)
class Profile:
    """What suits an engine: enough in flight to be hit, and not more than two cores can carry."""

    cases: int
    max_prompt: int
    clients: int
    gap_s: float
    worker: dict[str, object]


PROFILES = {
    "sim": Profile(
        24,
        1200,
        6,
        1.0,
        {"sim.timing": "fixed", "sim.prefill_ms": 30.0, "sim.decode_ms": 4.0, "chunk_tokens": 128},
    ),
    "torch": Profile(6, 300, 2, 4.0, {"chunk_tokens": 96, "deterministic": True}),
}


@dataclass(slots=True)
class Report:
    """What `--json` prints. Empty lists and no leftovers: passed."""

    engine: str
    seed: int
    kills: dict[str, int] = field(default_factory=dict)
    freezes: int = 0
    answers: int = 0
    left: int = 0
    """Of the answers, those whose client went away in the middle."""
    errors: dict[str, int] = field(default_factory=dict)
    partial_tokens: int = 0
    cached_tokens: int = 0
    hits: dict[str, int] = field(default_factory=dict)
    corrupted: int = 0
    """Blocks on disk that were corrupted on purpose."""
    wrong: list[str] = field(default_factory=list)
    hung: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    """What was still held, or wrong in a pool, when all was over."""
    store_hits_after: int = 0
    """Blocks that the stores gave in the last round, with every process whole."""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return not (self.wrong or self.hung or self.leftovers) and self.store_hits_after > 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="processes killed in all (50)")
    parser.add_argument("--engine", choices=tuple(PROFILES), default="sim")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--prefill", type=int, default=2, metavar="N", help="prefill workers (2)")
    parser.add_argument("--decode", type=int, default=2, metavar="N", help="decode workers (2)")
    parser.add_argument("--nodes", type=int, default=2, metavar="N", help="stores; workers take them in turn (2)")
    parser.add_argument(
        "--corrupt", type=int, default=0, metavar="N", help="corrupt every Nth block on a dead store's disk"
    )
    parser.add_argument("--clients", type=int, metavar="N", help="requests at once (sim 6, torch 2)")
    parser.add_argument("--seed", type=int, help="of victims, pauses and prompts (random)")
    parser.add_argument("--json", action="store_true")


def run(arguments: argparse.Namespace) -> int:
    """Exit status 0 when every answer was right and nothing hung or leaked, else 1."""
    return judged(_run(arguments), arguments.json)


async def _run(arguments: argparse.Namespace) -> Report:
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(2**31)
    profile = PROFILES[arguments.engine]
    say(f"seed {seed}: {arguments.kills} kills of {', '.join(ROLES)}; one engine alone first ...")
    cases = make_cases(profile.cases, seed, arguments.model, profile.max_prompt, min_prompt=64)
    alone = await asyncio.to_thread(generate_alone, arguments.engine, arguments.model, "bf16", cases)
    report = Report(arguments.engine, seed)
    begun = time.monotonic()
    with scratch() as disk:
        cluster = Cluster(_spec(arguments, cases, disk))
        async with cluster:
            load = Load(cluster.http_url, await cluster.model_name(), cases, alone, seed)
            await _storm(arguments, cluster, load, disk, report)
            await _aftermath(cluster, load, report)
        report.leftovers += [f"/dev/shm/{name}" for name in sorted(cluster.segments())]
    report.seconds = round(time.monotonic() - begun, 1)
    return report


def _spec(arguments: argparse.Namespace, cases: Sequence[Case], disk: str) -> ClusterSpec:
    pools = TinyPools.of([len(case.prompt) + 2 * OUTPUTS + MAX_REPLY for case in cases])
    worker = {
        **PROFILES[arguments.engine].worker,
        "num_blocks": pools.worker,
        "ticket_lease_s": _LEASE_S,
        "store_fetch": "always",
    }
    size = block_bytes({"engine": arguments.engine, "model": arguments.model, **worker})
    return ClusterSpec(
        prefill=arguments.prefill,
        decode=arguments.decode,
        nodes=arguments.nodes,
        store={**pools.store(size, disk), "lease_s": _LEASE_S, "reservation_s": _LEASE_S},
        engine=arguments.engine,
        model=arguments.model,
        worker=worker,
        router={**_BOUNDS_S, "connect_backoff_s": 0.2, "disaggregate": "always", "breaker.slow_ms": _SLOW_MS},
        stable_ports=True,
    )


async def _storm(arguments: argparse.Namespace, cluster: Cluster, load: Load, disk: str, report: Report) -> None:
    """Load and kills, until the last answer after the last kill."""
    profile = PROFILES[arguments.engine]
    rng = random.Random(report.seed)

    rot = Rot(arguments.corrupt, rng)

    def corrupt(member: Member) -> None:
        if arguments.corrupt and member.role == "kvstore":
            report.corrupted += rot.strike(Path(disk) / member.name)

    killer = Killer(cluster, load.outages, rng, profile.gap_s, say, between=corrupt)
    loading = asyncio.ensure_future(load.run(arguments.clients or profile.clients))
    try:
        await killer.run(arguments.kills)
    finally:
        load.stop.set()
        await loading
    report.kills, report.freezes = dict(killer.kills), killer.freezes
    report.hits = {tier: killer.hits[tier] + now for tier, now in (await hits(cluster)).items()}


async def _aftermath(cluster: Cluster, load: Load, report: Report) -> None:
    """Everything is given back, nothing in a store is wrong; and all cases are answered once more by prefill workers
    that have nothing of their own, so that what is cached can only come from the stores."""
    await cluster.wait_answering()
    report.leftovers += await at_rest(cluster)
    report.leftovers += await verified(cluster, disk_may_be_wrong=report.corrupted > 0)
    for member in cluster.of_role("prefill"):
        member.process.terminate()
        await cluster.restart(member)
    await cluster.wait_answering()
    before = await hits(cluster)
    await load.everything()
    after = await hits(cluster)
    report.store_hits_after = sum(after[tier] - before[tier] for tier in ("dram", "disk", "peer"))
    report.leftovers += await at_rest(cluster)
    tally = load.tally
    report.answers, report.left, report.errors = tally.answers, tally.left, dict(tally.errors)
    report.partial_tokens, report.cached_tokens = tally.partial_tokens, tally.cached_tokens
    report.wrong, report.hung = tally.wrong, tally.hung
