"""How well requests are placed: the serving policies in virtual time on a real trace, next to NVIDIA Dynamo's replay.

    make bench-placement; python benchmarks/placement.py --json
    python benchmarks/placement.py --trace PATH --fleets 2P1D --limit 3000

The trace is Mooncake's conversation trace (12,031 requests in 59 minutes), found at ../shared/traces/mooncake unless
`--trace` says otherwise. Engines, for us and for the peer: H200, Llama-3.1-8B-FP8, TP1, by the timing table of
Dynamo's wheel (preset `llama-3.1-8b-fp8-h200-dynamo`), 2,000 blocks of 512 tokens, steps of 8,192 tokens. SLO: TTFT
2 s and mean ITL 30 ms. Virtual time: figures do not depend on the machine, and lots are drawn in `prefix_only` alone
(seed 0).

Rows. `pdserve`: the Conductor, HBM alone, learnt-hazard eviction. `pdserve_dram`: the same with a DRAM tier of four
times the prefill workers' HBM, 50 GB/s a worker's host link. `pdserve_round_robin` is to be compared with
`dynamo_round_robin`: LRU, and prompts released as the peer's replay releases them (`SimWorker.late_release`); only as
far as these two agree do the others say anything. The same release rule holds in `pdserve` and `pdserve_dram`. KV moves
from prefill to decode at 50 GB/s a worker's port, shared; in the peer's replay that is free. `aggregated`: as many
workers as the fleet has GPUs, each doing whole requests, placed by the same class. `dynamo`, where the peer is
installed (`--peer`, a Python that has ai-dynamo 1.4.2): kv_router. `prefix_trap`: ten prefill workers of 3M tokens,
LRU, nothing shared, outputs not generated: pure prefix routing against the Conductor, load in prompt tokens computed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pdserve.engine.timing import timing_preset
from router.scheduling.base import Ask
from simulator.fleet import Fleet, FleetSpec
from simulator.trace import BLOCK_TOKENS, TraceRequest, read_mooncake

ROOT = Path(__file__).resolve().parents[1]
TRACE = ROOT.parent / "shared" / "traces" / "mooncake" / "conversation_trace.jsonl"
PEER = ROOT / ".venv-placement" / "bin" / "python"
TIMING = "llama-3.1-8b-fp8-h200-dynamo"
FLEETS = ("2P1D", "4P2D", "8P4D")
NUM_BLOCKS = 2000
DRAM_TIMES_HBM = 4
TRAP_WORKERS, TRAP_TOKENS = 10, 3_000_000
AGGREGATED_STEP = 2048
"""Tokens of a step where prompts and decodes share it: vLLM's default; 8,192 would stall decodes for 180 ms."""
PEER_PROFILE = "planner/tests/data/profiling_results/H200_TP1P_TP1D"

Row = dict[str, Any]


def spec(row: str, fleet: str) -> FleetSpec:
    prefill, decode = (int(part) for part in fleet.rstrip("D").split("P"))
    timing = timing_preset(TIMING)
    base = FleetSpec(prefill, decode, timing, num_blocks=NUM_BLOCKS, late_release=True)
    if row == "pdserve_round_robin":
        return replace(base, policy="round_robin", cache_policy="lru")
    if row == "pdserve_dram":
        return replace(base, dram_blocks=DRAM_TIMES_HBM * NUM_BLOCKS)
    if row == "aggregated":
        gpus = prefill + decode
        return replace(base, num_prefill=0, num_decode=gpus, max_num_batched_tokens=AGGREGATED_STEP, late_release=False)
    return base


def trap_spec(policy: str) -> FleetSpec:
    blocks = TRAP_TOKENS // BLOCK_TOKENS
    timing = timing_preset(TIMING)
    return FleetSpec(TRAP_WORKERS, 0, timing, policy=policy, num_blocks=blocks, cache_policy="lru")


def ours(row: str, fleet: str, trace: Sequence[TraceRequest]) -> Row:
    return {key: round(value, 4) for key, value in asdict(Fleet(spec(row, fleet)).run(trace)).items()}


def trap(policy: str, trace: Sequence[TraceRequest]) -> Row:
    found = Fleet(trap_spec(policy)).run([replace(each, num_output_tokens=1) for each in trace])
    return {"load_max_over_mean": round(found.load_max_over_mean, 3), "hit_ratio": round(found.reuse, 4)}


def peer_profile(python: Path) -> Path | None:
    """The timing data of the installed peer; None where it is not installed."""
    if not python.exists():
        return None
    code = "import dynamo.planner, pathlib; print(pathlib.Path(dynamo.planner.__file__).parent.parent)"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return Path(found.stdout.strip()) / PEER_PROFILE if found.returncode == 0 else None


def peer(python: Path, profile: Path, router: str, fleet: str, trace: Path) -> Row:
    """Runs the peer's replay on the whole trace file. Raises `subprocess.CalledProcessError`."""
    prefill, decode = fleet.rstrip("D").split("P")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [python, "-m", "dynamo.replay", trace, "--replay-mode", "offline", "--router-mode", router]
        command += ["--trace-block-size", str(BLOCK_TOKENS), "--report-json", report]
        command += ["--num-prefill-workers", prefill, "--num-decode-workers", decode]
        for role in ("prefill", "decode"):
            command += [f"--{role}-engine-args", json.dumps(peer_engine(role, profile))]
        command += ["--sla-ttft-ms", "2000", "--sla-itl-ms", "30"]
        subprocess.run([str(part) for part in command], check=True, capture_output=True, env=os.environ)
        return peer_row(json.loads(report.read_text()))


def peer_engine(role: str, profile: Path) -> dict[str, object]:
    return {
        "block_size": BLOCK_TOKENS,
        "num_gpu_blocks": NUM_BLOCKS,
        "worker_type": role,
        "planner_profile_data": str(profile),
    }


def peer_row(report: dict[str, float]) -> Row:
    return {
        "num_requests": report["completed_requests"],
        "goodput_rps": round(report["goodput_request_throughput_rps"], 4),
        "ttft_mean_ms": round(report["mean_ttft_ms"], 3),
        "ttft_p50_ms": round(report["median_ttft_ms"], 3),
        "ttft_p99_ms": round(report["p99_ttft_ms"], 3),
        "itl_mean_ms": round(report["mean_tpot_ms"], 3),
        "itl_p99_ms": round(report["p99_tpot_ms"], 3),
        "reuse": round(report["prefix_cache_reused_ratio"], 4),
    }


ROWS = ("pdserve", "pdserve_dram", "pdserve_round_robin", "aggregated")
PEER_ROWS = {"dynamo": "kv_router", "dynamo_round_robin": "round_robin"}


def measure(options: argparse.Namespace, trace: Sequence[TraceRequest]) -> dict[str, Row]:
    """Every row in a process of its own, `--jobs` at a time."""
    with ProcessPoolExecutor(options.jobs) as pool:
        work = {(row, fleet): pool.submit(ours, row, fleet, trace) for fleet in options.fleets for row in options.rows}
        traps = {}
        if options.trap:
            traps = {policy: pool.submit(trap, policy, trace) for policy in ("prefix_only", "conductor")}
        result: dict[str, Row] = {row: {} for row in options.rows}
        for (row, fleet), future in work.items():
            result[row][fleet] = future.result()
            print(f"{row} {fleet}: {result[row][fleet]}", file=sys.stderr, flush=True)
        if traps:
            result["prefix_trap"] = {policy: future.result() for policy, future in traps.items()}
    return result


def measure_peer(options: argparse.Namespace) -> dict[str, Row]:
    profile = peer_profile(options.peer)
    if profile is None or options.limit:
        why = "--limit was given" if profile else f"{options.peer} has no ai-dynamo: make bench-placement"
        print(f"no peer rows: {why}", file=sys.stderr)
        return {}
    run = partial(peer, options.peer, profile)
    return {
        row: {fleet: run(router, fleet, options.trace) for fleet in options.fleets} for row, router in PEER_ROWS.items()
    }


def decision_cost(rounds: int = 7, count: int = 1000) -> Row:
    """CPU-µs of the router's loop for a request's whole life in a policy (enqueue, decide, prefilled, decoding, ended),
    four prefill and four decode workers that are never full; medians of interleaved rounds."""
    costs: dict[str, list[float]] = {"conductor": [], "least_loaded": [], "round_robin": []}
    for _ in range(rounds):
        for policy, found in costs.items():
            fleet = Fleet(FleetSpec(4, 4, timing_preset(TIMING), policy=policy))
            asks = [Ask(str(number), "simulated", 1000, 100) for number in range(count)]
            started = time.process_time()
            for ask in asks:
                live_and_die(fleet, ask)
            found.append((time.process_time() - started) / count * 1e6)
    return {policy: round(statistics.median(found), 1) for policy, found in costs.items()}


def live_and_die(fleet: Fleet, ask: Ask) -> None:
    policy = fleet.router.policy
    policy.enqueue(ask)
    for decision in policy.decide(fleet.workers, 1):
        policy.prefilled(decision.ask, 0)
        policy.decoding(decision.ask)
        policy.ended(decision.ask, 100)


def table(result: dict[str, Row]) -> str:
    """For people."""
    lines = ["| fleet | row | goodput rps | TTFT mean / p50 / p99 ms | ITL mean / p99 ms | reuse | alone |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for fleet in FLEETS:
        for row, fleets in result.items():
            if (each := fleets.get(fleet)) is None:
                continue
            ttft = f"{each['ttft_mean_ms']:.0f} / {each['ttft_p50_ms']:.0f} / {each['ttft_p99_ms']:.0f}"
            itl = f"{each['itl_mean_ms']:.1f} / {each['itl_p99_ms']:.1f}"
            alone = f"{each['alone']:.3f}" if "alone" in each else "-"
            lines.append(
                f"| {fleet} | {row} | {each['goodput_rps']:.2f} | {ttft} | {itl} | {each['reuse']:.3f} | {alone} |"
            )
    if "prefix_trap" in result:
        lines.append(f"prefix trap, ten workers: {json.dumps(result['prefix_trap'])}")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--trace", type=Path, default=TRACE)
    parser.add_argument("--fleets", nargs="*", default=list(FLEETS), metavar="xPyD")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=ROWS)
    parser.add_argument("--limit", type=int, default=0, help="only the first requests of the trace")
    parser.add_argument("--peer", type=Path, default=PEER, help="a Python that has ai-dynamo")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--no-trap", dest="trap", action="store_false", help="leave the prefix trap out")
    parser.add_argument("--cost", action="store_true", help="only what a decision costs the router, in CPU-µs")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    if options.cost:
        print(json.dumps({"cpu_us_a_request": decision_cost()}))
        return 0
    if not options.trace.exists():
        print(json.dumps({"skipped": f"no trace at {options.trace}: give --trace"}))
        return 0
    trace = read_mooncake(options.trace, options.limit or None)
    result = measure(options, trace) | measure_peer(options)
    print(json.dumps(result, indent=1) if options.json else table(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
