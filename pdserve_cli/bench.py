"""`pdserve bench`: figures of single parts, one sub-verb each."""

from __future__ import annotations

import argparse

from pdserve_cli import bench_kv, bench_kv_trace

_BENCHES = {
    "kv": (bench_kv, "GB/s and CPU of transports, the node's store and its disk, beside their peers"),
    "kv-trace": (bench_kv_trace, "block hit ratios of the KV store's eviction policies on a trace"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benches = parser.add_subparsers(dest="bench", required=True, metavar="BENCH")
    for name, (module, text) in _BENCHES.items():
        bench = benches.add_parser(name, help=text, description=module.__doc__)
        module.add_arguments(bench)
        bench.set_defaults(run_bench=module.run)


def run(arguments: argparse.Namespace) -> int:
    status: int = arguments.run_bench(arguments)
    return status
