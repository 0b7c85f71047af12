"""What a request and a chunk cost in the router's own CPU, beside nginx and sglang-router in the same run.

    make bench-peers && .venv/bin/python benchmarks/router.py --json

Every router stands before a fleet of fake engines with equal timing: ours before 2 prefill + 2 decode fakes that speak
its session protocol (tools/fake_fleet.py), the peers before fake OpenAI workers (tools/fakew.c). One load generator
(tools/lg.c) drives all, peer after peer, round after round; figures are medians over the rounds. CPU is that of the
router's processes, from /proc: on shared machines it is steadier than any rate. Both sides of every connection have
TCP_NODELAY or quick acks (QA=1), so that peers which forget TCP_NODELAY are not charged with 40 ms stalls.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BIN = HERE / "bin"
SGLANG = HERE.parent / ".venv-peers" / "bin" / "sglang-router"
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


@dataclass
class Peer:
    """A router under load: where it listens, which processes are its own."""

    name: str
    port: int
    pids: list[int]
    samples: dict[str, list[dict[str, float]]] = field(default_factory=lambda: defaultdict(list))


def loads(quick: bool) -> list[Load]:
    scale = 0.4 if quick else 1.0
    return [
        Load("chunk", "s256", 400, 0, 12 * scale, ttft_us=50_000, itl_us=20_000),
        Load("short", "s1", 32, 0, 6 * scale),
        Load("long", "m64", 16, 0, 8 * scale),
        Load("next_turn", "next_turn", 16, 0, 8 * scale),
        Load("ttft", "s16", 64, 50, 6 * scale),
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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_port(port: int, process: subprocess.Popen[bytes], what: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise SystemExit(f"{what} did not start")


def tree(pid: int) -> list[int]:
    """The process and its descendants."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(below for child in children for below in tree(int(child)))]


def rss_mb(pids: list[int]) -> float:
    """Resident memory of the processes together; shared pages are counted in each."""
    total = 0
    for pid in pids:
        match = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        total += int(match.group(1)) if match else 0
    return total / 1024


@contextlib.contextmanager
def started(command: list[str], port: int, what: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink, env={**os.environ, "QA": "1"})
    try:
        wait_port(port, process, what)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def peers(load: Load, folder: Path) -> Iterator[list[Peer]]:
    """nginx and sglang-router (round robin, and P/D with cache_aware) before four fake workers."""
    with contextlib.ExitStack() as stack:
        ports = [_fake_worker(stack, load, folder) for _ in range(4)]
        # A P/D router's prefill workers answer with one token, as real ones do.
        prefill_ports = [_fake_worker(stack, load, folder, cap=1) for _ in range(2)]
        found = []
        if shutil.which("nginx"):
            found.append(_nginx(stack, ports, folder))
        if SGLANG.exists():
            urls = [f"http://127.0.0.1:{port}" for port in ports]
            found.append(_sglang(stack, "sglang", ["--worker-urls", *urls, "--policy", "round_robin"], folder))
            pd = ["--pd-disaggregation", "--policy", "cache_aware"]
            for port in prefill_ports:
                pd += ["--prefill", f"http://127.0.0.1:{port}", str(free_port())]
            for url in urls[2:]:
                pd += ["--decode", url]
            found.append(_sglang(stack, "sglang_pd", pd, folder))
        yield found


def _fake_worker(stack: contextlib.ExitStack, load: Load, folder: Path, cap: int = 0) -> int:
    port = free_port()
    command = [str(BIN / "fakew"), str(port), str(load.ttft_us), str(load.itl_us), str(cap)]
    stack.enter_context(started(command, port, "fakew", folder / f"fakew-{port}.log"))
    return port


def _nginx(stack: contextlib.ExitStack, ports: list[int], folder: Path) -> Peer:
    port = free_port()
    servers = "".join(f"server 127.0.0.1:{p};" for p in ports)
    config = folder / "nginx.conf"
    config.write_text(
        f"worker_processes 1; daemon off; pid {folder}/nginx.pid; error_log {folder}/nginx-error.log;\n"
        "events { worker_connections 4096; }\n"
        "http { access_log off; client_max_body_size 16m;\n"
        f"  client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};\n"
        f"  uwsgi_temp_path {folder}; scgi_temp_path {folder};\n"
        f"  upstream workers {{ {servers} keepalive 512; }}\n"
        f"  server {{ listen 127.0.0.1:{port}; keepalive_requests 1000000; location / {{\n"
        '    proxy_pass http://workers; proxy_http_version 1.1; proxy_set_header Connection "";\n'
        "    proxy_buffering off; } } }\n"
    )
    process = stack.enter_context(started(["nginx", "-c", str(config)], port, "nginx", folder / "nginx.log"))
    return Peer("nginx", port, tree(process.pid))


def _sglang(stack: contextlib.ExitStack, name: str, arguments: list[str], folder: Path) -> Peer:
    port = free_port()
    command = [str(SGLANG), "launch", "--host", "127.0.0.1", "--port", str(port), *arguments]
    command += ["--log-level", "warn", "--prometheus-port", str(free_port())]
    process = stack.enter_context(started(command, port, name, folder / f"{name}.log"))
    _wait_healthy(port, name)
    return Peer(name, port, tree(process.pid))


def _wait_healthy(port: int, name: str) -> None:
    body = (HERE / "bodies" / "s1.json").read_bytes().replace(b"@" * 10, b"0123456789")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions", body, {"content-type": "application/json"}
        )
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5) as response:
            if response.status == 200:
                response.read()
                return
        time.sleep(0.2)
    raise SystemExit(f"{name} does not answer")


@contextlib.contextmanager
def ours(load: Load, folder: Path) -> Iterator[Peer]:
    """Our router process before 2 prefill + 2 decode fakes, with the same pauses as the peers' fake workers."""
    fleet = [sys.executable, str(HERE / "tools" / "fake_fleet.py"), "2", "2"]
    fleet += [str(load.ttft_us / 1000), str(load.itl_us / 1000)]
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
            _wait_healthy(port, "pdserve")
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
    """One round of one load on one peer; the figures that lg prints are kept."""
    command = [str(BIN / "lg"), "127.0.0.1", str(peer.port), "/v1/chat/completions"]
    command += [str(load.concurrency), str(load.rate), f"{load.seconds:g}", str(body), ",".join(map(str, peer.pids))]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "QA": "1"}, check=True)
    figures = {key: float(value) for key, value in FIGURE.findall(result.stdout)}
    gap = re.search(r"ttft_ms p50=([\d.]+)", result.stdout)
    figures["ttft_p50_ms"] = float(gap.group(1)) if gap else float("nan")
    peer.samples[load.name].append(figures)
    print(f"{load.name:<10} {peer.name:<10} {result.stdout.strip()}{result.stderr.strip()}", file=sys.stderr)


def measure(load: Load, rounds: int, folder: Path) -> dict[str, dict[str, float]]:
    """Medians by peer, the peers interleaved round by round."""
    body = folder / "body.json"
    body.write_text(
        next_turn_body() if load.body == "next_turn" else (HERE / "bodies" / f"{load.body}.json").read_text()
    )
    with ours(load, folder) as mine, peers(load, folder) as others:
        for _ in range(rounds):
            for peer in (mine, *others):
                drive(peer, load, body)
        return {peer.name: _medians(peer, load) for peer in (mine, *others)}


def _medians(peer: Peer, load: Load) -> dict[str, float]:
    samples = peer.samples[load.name]
    keys = ("cpu_us/chunk", "cpu_us/req", "ttft_p50_ms", "err", "ok")
    found = {key: statistics.median(sample.get(key, float("nan")) for sample in samples) for key in keys}
    return {**found, "rss_mb": rss_mb(peer.pids)}


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

    return {
        "us_per_chunk": column("chunk", "cpu_us/chunk"),
        "us_per_request": {name: column(name, "cpu_us/req") for name in ("short", "long", "next_turn")},
        "rss_mb": column("chunk", "rss_mb"),
        "added_ttft_p50_ms": column("ttft", "ttft_p50_ms"),
        "errors": {name: {peer: row["err"] for peer, row in rows.items()} for name, rows in table.items()},
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
