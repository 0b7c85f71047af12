"""What a request and a chunk cost in the router's own CPU, beside nginx, sglang-router and Dynamo in the same run.

    make bench-peers && .venv/bin/python benchmarks/router.py --json

Every router stands before a fleet of fake engines: ours before 2 prefill + 2 decode fakes that speak its session
protocol (tools/fake_fleet.py), nginx and sglang-router before fake OpenAI workers of equal timing (tools/fakew.c),
Dynamo's frontend before its own mock engines (tools/dynamo_peer.py). One load generator (tools/lg.c) drives all, peer
after peer, round after round; figures are medians over the rounds. CPU is that of the router's processes, from /proc:
on shared machines it is steadier than any rate. Both sides of every connection have TCP_NODELAY or quick acks (QA=1),
so that peers which forget TCP_NODELAY (sglang-router and Dynamo do) are not charged with 40 ms stalls. Ours runs as it
comes: KV-aware placement on two pools, tokenising, metrics. A peer that is not installed is named under `absent`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "tools"))
import dynamo_peer
from router_peers import BIN, SGLANG, Peer, dynamo, proxies, rss_mb, wait_healthy

HERE = Path(__file__).parent
FIGURE = re.compile(r"([\w./]+)=([\d.]+)")


@dataclass(frozen=True)
class Load:
    """One way of asking: `lg` arguments, and how fast the fake engines are."""

    name: str
    body: str
    concurrency: int
    rate: float
    seconds: float
    ttft_us: int = 0
    itl_us: int = 1000
    speedup: float = 1_000_000
    """Of Dynamo's mock engines. Unpaced they cost its frontend least; only where many streams are open at once must
    they be about as slow as the others."""
    dynamo: tuple[str, ...] = ()
    """Which ways of running it are tried."""
    num_cached: int = 0
    """Blocks in our fakes' prefix caches, and so in our index, from the start."""


def loads(quick: bool) -> list[Load]:
    scale = 0.4 if quick else 1.0
    every = tuple(mode.name for mode in dynamo_peer.MODES)
    return [
        Load("chunk", "s256", 400, 0, 8 * scale, ttft_us=2_000, itl_us=20_000, speedup=1, dynamo=("dynamo",)),
        Load("short", "s1", 32, 0, 4 * scale, dynamo=every),
        Load("long", "m64", 16, 0, 5 * scale, dynamo=every),
        Load("next_turn", "next_turn", 16, 0, 5 * scale),
        Load("ttft", "s16", 64, 50, 6 * scale),
        Load("memory", "s256", 2000, 0, 12 * scale, ttft_us=1_000, itl_us=100_000, num_cached=1 << 20),
    ]


def next_turn_body() -> str:
    """m64's prompt as the first turn of a conversation that every request goes on with."""
    first = json.loads((HERE / "bodies" / "m64.json").read_text())
    text = first["messages"][0]["content"].replace("@" * 10, "known")
    first["messages"] = [
        {"role": "user", "content": text},
        {"role": "assistant", "content": "The licence grants freedom to share and change the work."},
        {"role": "user", "content": "@" * 10 + " And what does it forbid?"},
    ]
    return json.dumps(first, ensure_ascii=False)


@contextlib.contextmanager
def ours(load: Load, folder: Path) -> Iterator[Peer]:
    """Our router process before 2 prefill + 2 decode fakes, with the same pauses as the peers' fake workers."""
    fleet = [sys.executable, str(HERE / "tools" / "fake_fleet.py"), "2", "2"]
    fleet += [str(load.ttft_us / 1000), str(load.itl_us / 1000), str(load.num_cached)]
    with announced(fleet, folder / "fleet.log") as (_, workers):
        router = [
            sys.executable,
            "-m",
            "router",
            "--set",
            "http_listen=127.0.0.1:0",
            "--set",
            "grpc_listen=127.0.0.1:0",
        ]
        router += ["--set", f"workers={json.dumps(workers['addresses'])}", "--set", "aliases.smol=smollm2-135m"]
        with announced(router, folder / "router.log") as (process, ready):
            port = int(ready["http_port"])
            wait_healthy(port, "pdserve")
            yield Peer("pdserve", port, [process.pid])


@contextlib.contextmanager
def announced(command: list[str], log: Path) -> Iterator[tuple[subprocess.Popen[bytes], dict[str, Any]]]:
    """A process of ours, and its ready line."""
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=sink, cwd=HERE.parent)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"{command[1:3]} did not start: {log.read_text()[-2000:]}")
        yield process, json.loads(line)
    finally:
        process.terminate()
        process.wait(30)


def drive(peer: Peer, load: Load, body: Path) -> None:
    """One round of one load on one peer; the figures that lg prints are kept, and the most memory seen meanwhile."""
    command = [str(BIN / "lg"), "127.0.0.1", str(peer.port), "/v1/chat/completions"]
    command += [str(load.concurrency), str(load.rate), f"{load.seconds:g}", str(body), ",".join(map(str, peer.pids))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "QA": "1"})
    most_mb = 0.0
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            text = process.communicate(timeout=0.5)[0]
            break
        most_mb = max(most_mb, rss_mb(peer.pids))
    if process.returncode != 0:
        raise SystemExit(f"the load generator failed on {peer.name}")
    figures = {key: float(value) for key, value in FIGURE.findall(text)}
    gap = re.search(r"ttft_ms p50=([\d.]+)", text)
    figures["ttft_p50_ms"] = float(gap.group(1)) if gap else float("nan")
    figures["rss_mb"] = max(most_mb, rss_mb(peer.pids))
    peer.samples[load.name].append(figures)
    print(f"{load.name:<10} {peer.name:<17} {text.strip()}", file=sys.stderr)


def measure(load: Load, rounds: int, folder: Path) -> dict[str, dict[str, float]]:
    """Medians by peer, the peers interleaved round by round. Memory is ours alone, and one round tells."""
    body = folder / "body.json"
    body.write_text(
        next_turn_body() if load.body == "next_turn" else (HERE / "bodies" / f"{load.body}.json").read_text()
    )
    with contextlib.ExitStack() as stack:
        all_peers = [stack.enter_context(ours(load, folder))]
        if load.name != "memory":
            all_peers += stack.enter_context(proxies(load.ttft_us, load.itl_us, folder))
            all_peers += stack.enter_context(dynamo(load.dynamo, load.speedup, folder))
        for _ in range(rounds if load.name != "memory" else 1):
            for peer in all_peers:
                drive(peer, load, body)
        return {peer.name: _medians(peer, load) for peer in all_peers}


def _medians(peer: Peer, load: Load) -> dict[str, float]:
    samples = peer.samples[load.name]
    keys = ("cpu_us/chunk", "cpu_us/req", "ttft_p50_ms", "rss_mb", "err", "ok")
    return {key: statistics.median(sample.get(key, float("nan")) for sample in samples) for key in keys}


def absent() -> list[str]:
    """Peers that are not installed here."""
    here = {
        "nginx": shutil.which("nginx") is not None,
        "sglang": SGLANG.exists(),
        "dynamo": dynamo_peer.PYTHON.exists(),
    }
    return [name for name, found in here.items() if not found]


def run(arguments: argparse.Namespace) -> dict[str, object]:
    table: dict[str, dict[str, dict[str, float]]] = {}
    for load in loads(arguments.quick):
        if arguments.only and load.name not in arguments.only:
            continue
        with tempfile.TemporaryDirectory(prefix="bench-router-") as folder:
            table[load.name] = measure(load, arguments.rounds, Path(folder))
    return report(table)


def report(table: dict[str, dict[str, dict[str, float]]]) -> dict[str, object]:
    def column(load: str, key: str) -> dict[str, float]:
        return {name: round(row[key], 2) for name, row in table.get(load, {}).items()}

    ttft = column("ttft", "ttft_p50_ms")
    direct = ttft.get("nginx")
    return {
        "us_per_chunk": column("chunk", "cpu_us/chunk"),
        "us_per_request": {name: column(name, "cpu_us/req") for name in ("short", "long", "next_turn")},
        "ttft_p50_ms": ttft,
        "added_ttft_p50_ms": {name: round(value - direct, 2) for name, value in ttft.items()} if direct else {},
        "rss_mb": column("chunk", "rss_mb"),
        "rss_mb_2000_streams_1m_blocks": column("memory", "rss_mb").get("pdserve"),
        "errors": {name: {peer: row["err"] for peer, row in rows.items()} for name, rows in table.items()},
        "tcp_nodelay": "both sides of every connection, or quick acks where a peer does not set it",
        "load_average": round(os.getloadavg()[0], 1),
        "absent": absent(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one object on stdout; the rest goes to stderr anyway")
    parser.add_argument("--quick", action="store_true", help="shorter rounds, for a smoke test")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", action="append", help="a load by name, repeatable")
    arguments = parser.parse_args()
    if not (BIN / "lg").exists():
        raise SystemExit("run `make bench-peers` first")
    result = run(arguments)
    print(json.dumps(result, indent=None if arguments.json else 2))


if __name__ == "__main__":
    main()
