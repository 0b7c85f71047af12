"""`pdserve bench kv-trace`: replays requests against the store's own eviction code, keys only, in virtual time.

A block hits only while its whole prefix does. `belady` knows the future and bounds the others.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kvstore.eviction import DEFAULT, POLICIES, EvictionPolicy, KeyCache
from kvstore.eviction.belady import BeladyPolicy
from pdserve.errors import InvalidRequest
from pdserve_cli.kv_workloads import BLOCK_TOKENS, SYNTHETIC, Request, block_count, read_trace

DEFAULT_TRACE = Path(__file__).resolve().parents[2] / "shared/traces/mooncake/conversation_trace.jsonl"
"""Beside the checkout; Mooncake's conversation trace (FAST '25), one hour of 12,031 requests."""
SIZES = {"1M": 1_000_000, "3M": 3_000_000, "10M": 10_000_000, "30M": 30_000_000}
"""Pools, in tokens."""

Ratios = dict[str, dict[str, float]]
"""Block hit ratio by policy and pool size."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--trace", type=Path, metavar="PATH", help="JSON lines with timestamp (ms) and hash_ids (the Mooncake one)"
    )
    source.add_argument("--workload", choices=sorted(SYNTHETIC), help="a synthetic load instead of a trace")
    parser.add_argument("--all", action="store_true", help="also every synthetic load, under `workloads`")
    parser.add_argument("--json", action="store_true")


def run(arguments: argparse.Namespace) -> int:
    """Raises `NotFound` or `InvalidRequest` for a trace that is missing or malformed."""
    named = arguments.workload is not None
    stream = SYNTHETIC[arguments.workload]() if named else read_trace(arguments.trace or DEFAULT_TRACE)
    ratios = compare(stream, arguments.workload or "trace")
    others = {name: compare(make(), name) for name, make in SYNTHETIC.items()} if arguments.all else {}
    if arguments.json:
        print(json.dumps({"block_hit_ratio": ratios} | ({"workloads": others} if others else {})))
        return 0
    for title, table in {arguments.workload or "trace": ratios, **others}.items():
        _show(title, table)
    return 0


def compare(stream: Sequence[Request], title: str, sizes: Mapping[str, int] = SIZES) -> Ratios:
    """Every policy on the same stream, at every size (tokens). Raises `InvalidRequest` when it holds no block."""
    if not block_count(stream):
        raise InvalidRequest(f"{title}: no blocks to replay; every record's hash_ids is empty", param="trace")
    ratios: Ratios = {}
    for policy, make in _policies(stream).items():
        began = time.perf_counter()
        ratios[policy] = {
            size: round(hit_ratio(stream, KeyCache(tokens // BLOCK_TOKENS, make())), 4)
            for size, tokens in sizes.items()
        }
        print(f"{title}: {policy} {ratios[policy]} in {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
    return ratios


def hit_ratio(stream: Sequence[Request], cache: KeyCache) -> float:
    """Blocks found in the pool, of all blocks asked for."""
    return sum(cache.request(keys, arrival_s) for arrival_s, keys in stream) / block_count(stream)


def _policies(stream: Sequence[Request]) -> dict[str, Callable[[], EvictionPolicy]]:
    return {
        "default": POLICIES[DEFAULT],
        "lru": POLICIES["lru"],
        "s3fifo": POLICIES["s3fifo"],
        "belady": lambda: BeladyPolicy([request.keys for request in stream]),
    }


def _show(title: str, ratios: Ratios) -> None:
    table = Table("policy", *SIZES, title=f"block hit ratio: {title}")
    for policy, row in ratios.items():
        table.add_row(policy, *(f"{ratio:.3f}" for ratio in row.values()))
    Console().print(table)
