"""`pdserve up`: a whole cluster on this machine, a first answer, and a live screen until Ctrl-C."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from pdserve.config import parse_override
from pdserve.models import resolve
from pdserve_cli.client import Answer, stream
from pdserve_cli.cluster import Cluster, ClusterError, ClusterSpec, total
from pdserve_cli.verdict import say as say_to_stderr

FIRST_PROMPT = "What is the capital of France?"
_REFRESH_S = 1.0
STORE_BYTES = 256 << 20
"""DRAM of the node's store: 11,000 tokens of the embedded model, beside the workers' own 512 MiB each."""
_COLUMNS = {
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "kv used": "vllm:kv_cache_usage_perc",
    "exported": "pdserve_exported_blocks",
    "pulled MB": "pdserve_kv_pulled_bytes_total",
}


@dataclass(frozen=True, slots=True)
class Once:
    """What `--once --json` prints. Seconds from the start of the processes; `tokens` counts outputs."""

    ready_s: float
    ttft_ms: float
    tokens: int
    text: str
    prefill_worker: str | None
    decode_worker: str | None
    kv_bytes_moved: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prefill", type=int, default=1, metavar="N", help="prefill workers (1)")
    parser.add_argument("--decode", type=int, default=1, metavar="N", help="decode workers (1)")
    parser.add_argument("--engine", choices=("torch", "vllm", "sim"), default="torch", help="(torch)")
    parser.add_argument("--model", default="embedded", help="folder, .gguf, hub id (the embedded SmolLM2-135M)")
    parser.add_argument("--store", choices=("on", "off"), help="a KV store (on; off with --engine vllm)")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="stores; workers take them in turn (1)")
    parser.add_argument("--http-port", type=int, default=8000, help="OpenAI API; 0: any free port (8000)")
    parser.add_argument("--grpc-port", type=int, default=8001, help="gRPC; 0: any free port (8001)")
    parser.add_argument("--disaggregate", choices=("auto", "always", "never"), default="always", help="(always)")
    parser.add_argument(
        "--python", default=sys.executable, help="interpreter of the workers, e.g. of a vLLM environment"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="worker config, repeatable")
    parser.add_argument("--router-set", action="append", default=[], metavar="KEY=VALUE", help="router config")
    parser.add_argument("--store-set", action="append", default=[], metavar="KEY=VALUE", help="store config")
    parser.add_argument("--once", action="store_true", help="answer --prompt once, then stop")
    parser.add_argument("--prompt", default=FIRST_PROMPT, help="the first prompt")
    parser.add_argument("--json", action="store_true", help="with --once: one JSON object on stdout")


def run(arguments: argparse.Namespace) -> int:
    """Exit status: 0 after a clean drain. Raises `PdserveError`."""
    return asyncio.run(_run(arguments))


def spec_from(arguments: argparse.Namespace) -> ClusterSpec:
    free = arguments.once
    return ClusterSpec(
        prefill=arguments.prefill,
        decode=arguments.decode,
        engine=arguments.engine,
        model=arguments.model,
        nodes=arguments.nodes,
        store=_store(arguments),
        http_port=0 if free else arguments.http_port,
        grpc_port=0 if free else arguments.grpc_port,
        worker=dict(parse_override(text) for text in arguments.set),
        router={"disaggregate": arguments.disaggregate, **dict(parse_override(t) for t in arguments.router_set)},
        python=arguments.python,
        start_timeout_s=600.0 if arguments.engine == "vllm" else 120.0,
    )


def _store(arguments: argparse.Namespace) -> dict[str, object] | None:
    given = dict(parse_override(text) for text in arguments.store_set)
    if (arguments.store or ("off" if arguments.engine == "vllm" else "on")) == "off":
        return None
    return {"memory_bytes": STORE_BYTES, **given}


async def _run(arguments: argparse.Namespace) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    say = say_to_stderr if arguments.json or arguments.once else _say
    await asyncio.to_thread(resolve, arguments.model)
    spec = spec_from(arguments)
    stores = f" + {spec.nodes} kvstore" if spec.store is not None else ""
    say(f"starting {spec.prefill} prefill + {spec.decode} decode{stores} ({spec.engine}, {spec.model})")
    cluster = Cluster(spec, report=say)
    starting = asyncio.ensure_future(cluster.__aenter__())
    stopping = asyncio.ensure_future(stop.wait())
    await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        return 130
    await starting
    try:
        if arguments.once:
            return await _once(cluster, arguments)
        await _first_answer(cluster, arguments.prompt, say)
        await _watch(cluster, stop, say)
        return 0
    finally:
        stopping.cancel()
        say("draining")
        await cluster.stop()


def _say(line: str) -> None:
    print(line, flush=True)


async def ask(cluster: Cluster, prompt: str, max_tokens: int = 64) -> Answer:
    """One greedy chat answer through the front door."""
    model = await cluster.model_name()
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": 0,
    }
    return await asyncio.to_thread(stream, cluster.http_url, "/v1/chat/completions", body)


async def _once(cluster: Cluster, arguments: argparse.Namespace) -> int:
    answer = await ask(cluster, arguments.prompt)
    record = await _record(cluster, answer.request_id)
    moved = sum([await cluster.metric(member, "pdserve_kv_pulled_bytes_total") for member in cluster.workers])
    result = Once(
        ready_s=round(cluster.started_s, 3),
        ttft_ms=round(1000 * (answer.ttft_s or 0.0), 1),
        tokens=answer.usage.get("completion_tokens", 0),
        text=answer.text,
        prefill_worker=record.get("prefill_worker"),
        decode_worker=record.get("decode_worker"),
        kv_bytes_moved=int(moved),
    )
    print(json.dumps(asdict(result)) if arguments.json else answer.text, flush=True)
    return 0


async def _record(cluster: Cluster, request_id: str) -> dict[str, Any]:
    status, body = await cluster.get(f"/v1/requests/{request_id}")
    found: dict[str, Any] = json.loads(body) if status == 200 else {}
    return found


async def _first_answer(cluster: Cluster, prompt: str, say: Any) -> None:
    answer = await ask(cluster, prompt)
    record = await _record(cluster, answer.request_id)
    say(f"\n> {prompt}\n{answer.text}\n")
    placed = f"prefill on {record.get('prefill_worker')}, decode on {record.get('decode_worker')}"
    say(f"{placed}; ready after {cluster.started_s:.1f} s")
    say(f"OpenAI API   {cluster.http_url}/v1")
    say(f"gRPC         {cluster.grpc_address}  (pdserve.v1.InferenceService, inference.GRPCInferenceService)")
    say(f"metrics      {cluster.http_url}/metrics")
    for member in (*cluster.workers, *cluster.stores):
        say(f"{member.name:<12} http://127.0.0.1:{member.ready['http_port']}/metrics")
    for store in cluster.stores:
        say(f"{store.name:<12} look into it: pdserve kv stat --address {store.ready['address']}")


async def _watch(cluster: Cluster, stop: asyncio.Event, say: Any) -> None:
    """A live screen on a terminal; else silence until a signal, or until a process dies."""
    console = Console()
    if not console.is_terminal:
        while not stop.is_set():
            _check_alive(cluster)
            await _pause(stop)
        return
    say("Ctrl-C drains.\n")
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while not stop.is_set():
            _check_alive(cluster)
            live.update(await _screen(cluster), refresh=True)
            await _pause(stop)


async def _pause(stop: asyncio.Event) -> None:
    try:
        await asyncio.wait_for(stop.wait(), _REFRESH_S)
    except TimeoutError:
        return


def _check_alive(cluster: Cluster) -> None:
    for member in cluster.members:
        if not member.alive:
            raise ClusterError(f"{member.name} ended with {member.process.returncode}:\n{member.log_tail()}")


async def _screen(cluster: Cluster) -> Table:
    table = Table(title=f"pdserve  {cluster.http_url}/v1", caption=await _stores_line(cluster))
    for heading in ("worker", "pid", *_COLUMNS):
        table.add_column(heading, justify="left" if heading == "worker" else "right")
    for member in cluster.workers:
        samples = await cluster.metrics(member)
        table.add_row(member.name, str(member.pid), *(_cell(samples, name) for name in _COLUMNS))
    return table


def _cell(samples: Mapping[str, float], column: str) -> str:
    value = total(samples, _COLUMNS[column])
    if column == "kv used":
        return f"{100 * value:.0f} %"
    return f"{value / 1e6:.1f}" if column == "pulled MB" else f"{value:.0f}"


async def _stores_line(cluster: Cluster) -> str:
    """What the stores hold, and how many blocks were found there."""
    lines = []
    for store in cluster.stores:
        samples = await cluster.metrics(store)
        held = total(samples, "pdserve_kvstore_blocks", state="visible")
        on_disk = total(samples, "pdserve_kvstore_disk_blocks")
        found = total(samples, "pdserve_kvstore_hit_blocks_total")
        lines.append(f"{store.name}: {held:.0f} blocks in memory, {on_disk:.0f} on disk, {found:.0f} found")
    return "\n".join(lines)
