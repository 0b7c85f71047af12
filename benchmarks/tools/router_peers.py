"""The routers that ours is compared with, started before fake engines: nginx, sglang-router, Dynamo."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import dynamo_peer

BENCHMARKS = Path(__file__).parents[1]
BIN = BENCHMARKS / "bin"
SGLANG = BENCHMARKS.parent / ".venv-peers" / "bin" / "sglang-router"


@dataclass
class Peer:
    """A router under load: where it listens, which processes are its own."""

    name: str
    port: int
    pids: list[int]
    samples: dict[str, list[dict[str, float]]] = field(default_factory=lambda: defaultdict(list))


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
def started(
    command: list[str], port: int, what: str, log: Path, env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process; with a port, once that accepts connections."""
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink, env=env or {**os.environ, "QA": "1"})
    try:
        if port:
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
def proxies(ttft_us: int, itl_us: int, folder: Path) -> Iterator[list[Peer]]:
    """nginx and sglang-router (round robin, and P/D with cache_aware) before four fake workers; those installed."""
    with contextlib.ExitStack() as stack:
        ports = [_fake_worker(stack, ttft_us, itl_us, folder) for _ in range(4)]
        # A P/D router's prefill workers answer with one token, as real ones do.
        prefill_ports = [_fake_worker(stack, ttft_us, itl_us, folder, cap=1) for _ in range(2)]
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


@contextlib.contextmanager
def dynamo(names: tuple[str, ...], speedup: float, folder: Path) -> Iterator[list[Peer]]:
    """These ways of running Dynamo, each with mock engines of its own; none where it is not installed."""
    with contextlib.ExitStack() as stack:
        modes = [mode for mode in dynamo_peer.MODES if mode.name in names and dynamo_peer.PYTHON.exists()]
        model = dynamo_peer.model_folder(folder / "model") if modes else folder
        yield [_dynamo(stack, mode, speedup, model, folder / mode.name) for mode in modes]


def _dynamo(
    stack: contextlib.ExitStack, mode: dynamo_peer.DynamoMode, speedup: float, model: Path, folder: Path
) -> Peer:
    (folder / "kv").mkdir(parents=True)
    env, port = dynamo_peer.environment(folder / "kv"), free_port()
    for at, command in enumerate(dynamo_peer.engines(mode, model, speedup, free_port())):
        stack.enter_context(started(command, 0, "dynamo.mocker", folder / f"engines-{at}.log", env))
    frontend = dynamo_peer.frontend(mode, port)
    process = stack.enter_context(started(frontend, port, mode.name, folder / "frontend.log", env))
    wait_healthy(port, mode.name)
    return Peer(mode.name, port, tree(process.pid))


def _fake_worker(stack: contextlib.ExitStack, ttft_us: int, itl_us: int, folder: Path, cap: int = 0) -> int:
    port = free_port()
    command = [str(BIN / "fakew"), str(port), str(ttft_us), str(itl_us), str(cap)]
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
    wait_healthy(port, name)
    return Peer(name, port, tree(process.pid))


def wait_healthy(port: int, name: str) -> None:
    body = (BENCHMARKS / "bodies" / "s1.json").read_bytes().replace(b"@" * 10, b"0123456789")
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
