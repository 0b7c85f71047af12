"""`pdserve bench kv`: what it costs to move and keep KV, beside what there is to compare with, in one run.

Every round runs each way once, in another order, so that all see the same machine; figures are medians over rounds.
`handover` is 128 MB as 64 block-major blocks of 2 MB, scattered so that no two merge: for our transports the whole
verified pull (generations twice, digests as the transport's policy says), for `memcpy`, `sockets`, `mooncake_tcp` and
`nixl` the bare bytes. `mooncake_tcp` and `nixl` are those libraries without our code; `mooncake`, `nixl_transport` and
`gloo` are our transports over them. CPU seconds count all processes of a way but Redis's and Mooncake Store's. Peers
that are not installed stand under `missing`.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pdserve_cli.bench_kv_disk import SIZES as DISK_SIZES
from pdserve_cli.bench_kv_disk import disk_ways
from pdserve_cli.bench_kv_moves import SIZES, move_ways
from pdserve_cli.bench_kv_store import store_ways
from pdserve_cli.bench_ways import Way, interleave, ratio

TARGETS = {
    "handover.tcp_over_sockets": 0.9,
    "handover.tcp_over_mooncake_tcp": 1.2,
    "handover.shm_over_memcpy": 0.8,
    "disk_read.64KB.tier_over_preadv": 0.8,
    "disk_read.1MB.tier_over_preadv": 0.8,
    "disk_read.16MB.tier_over_preadv": 0.8,
}
SOCKETS = ("sockets", "sockets_tuned")
PREADV = ("preadv_1", "preadv_4")

Cases = Mapping[str, Mapping[str, Way]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=11, metavar="N")
    parser.add_argument("--quick", action="store_true", help="3 rounds, without the sizes 64KB and 256MB")
    parser.add_argument("--only", choices=("moves", "store", "disk"), help="a part of it")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the system's temporary folder)")
    parser.add_argument("--json", action="store_true")


def run(arguments: argparse.Namespace) -> int:
    rounds = 3 if arguments.quick else arguments.rounds
    load = os.getloadavg()[0]
    cases: dict[str, Mapping[str, Way]] = {}
    missing: dict[str, str] = {}
    parts = {"moves": _moves, "store": _store, "disk": _disk}
    for name, part in parts.items():
        if arguments.only in (None, name):
            cases |= part(arguments, rounds, missing)
    report = {
        "gb_per_s": _nested(cases, "gb_per_s"),
        "cpu_s_per_gb": _nested(cases, "cpu_s_per_gb"),
        "ratios": {name: round(value, 3) for name, value in ratios(cases).items()},
        "targets": TARGETS,
        "missing": missing,
        "rounds": rounds,
        "load": [round(load, 1), round(os.getloadavg()[0], 1)],
    }
    if arguments.json:
        print(json.dumps(report))
    else:
        _show(cases, report["ratios"], missing)
    return 0


def _moves(arguments: argparse.Namespace, rounds: int, missing: dict[str, str]) -> Cases:
    sizes = ("1MB", "16MB") if arguments.quick else tuple(SIZES)
    with move_ways(sizes) as (cases, lacking):
        missing |= lacking
        for ways in cases.values():
            interleave(ways, rounds)
    return cases


def _store(arguments: argparse.Namespace, rounds: int, missing: dict[str, str]) -> Cases:
    with ExitStack() as stack:
        ways = store_ways(stack, missing)
        interleave(ways, rounds)
    return {"put_get_1mb": ways}


def _disk(arguments: argparse.Namespace, rounds: int, missing: dict[str, str]) -> Cases:
    sizes = ("1MB",) if arguments.quick else tuple(DISK_SIZES)
    with disk_ways(sizes, arguments.folder) as cases:
        for ways in cases.values():
            interleave(ways, rounds)
    return {f"disk_read.{size}": ways for size, ways in cases.items()}


def ratios(cases: Cases) -> dict[str, float]:
    """Ours over theirs, of the ways that were run."""
    found: dict[str, float] = {}

    def put(case: str, ours: str, theirs: tuple[str, ...], name: str) -> None:
        ways = cases[case]
        others = [ways[other] for other in theirs if other in ways]
        if ours in ways and others:
            found[f"{case}.{ours}_over_{name}"] = ratio(ways[ours], others)

    for case in cases:
        if case.startswith("disk_read"):
            put(case, "tier", PREADV, "preadv")
        elif case == "put_get_1mb":
            for verb in ("put", "get"):
                put(case, verb, (f"mooncake_store_{verb}",), f"mooncake_store_{verb}")
                put(case, verb, (f"redis_{verb}",), f"redis_{verb}")
        else:
            put(case, "tcp", SOCKETS, "sockets")
            put(case, "tcp", ("mooncake_tcp",), "mooncake_tcp")
            put(case, "shm", ("memcpy",), "memcpy")
    return found


def _nested(cases: Cases, figure: str) -> dict[str, object]:
    """By case and way; `disk_read.1MB` becomes a level of its own."""
    tree: dict[str, object] = {}
    for case, ways in cases.items():
        *parents, leaf = case.split(".")
        level = tree
        for parent in parents:
            below = level.setdefault(parent, {})
            assert isinstance(below, dict)
            level = below
        level[leaf] = {name: round(getattr(way, figure), 3) for name, way in ways.items()}
    return tree


def _show(cases: Cases, found: object, missing: Mapping[str, str]) -> None:
    console = Console()
    for case, ways in cases.items():
        table = Table("way", "GB/s", "CPU-s/GB", title=case)
        for name, way in sorted(ways.items(), key=lambda item: -item[1].gb_per_s):
            table.add_row(name, f"{way.gb_per_s:.2f}", f"{way.cpu_s_per_gb:.2f}")
        console.print(table)
    assert isinstance(found, dict)
    table = Table("ratio", "", "target")
    for name, value in found.items():
        table.add_row(name, f"{value:.2f}", str(TARGETS.get(name, "")))
    console.print(table)
    for name, reason in missing.items():
        console.print(f"not here: {name}: {reason}")
