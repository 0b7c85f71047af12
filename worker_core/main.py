"""What `python -m prefill_worker` and `python -m decode_worker` share: arguments, signals, exit codes."""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

import uvloop

from pdserve.config import WorkerConfig, load, parse_override
from pdserve.errors import ConfigError, PdserveError
from pdserve.logs import set_up_logs
from pdserve.types import Role
from worker_core.engines import build_engine
from worker_core.worker import Worker

EXIT_FAILED = 1
EXIT_CONFIG = 2
SWITCH_INTERVAL_S = 0.0005
"""How long the engine's thread and the loop may hold the interpreter against each other. Python's 5 ms is as long as
a whole decode step: a message, or the next step, could wait that long for nothing."""

log = logging.getLogger("pdserve.worker")


def run(role: Role, arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM (drains; a second signal ends at once) or a failure. Returns the exit code: 0 after a
    drain, 1 when the engine failed, 2 for a config error."""
    options = _parser(role).parse_args(arguments)
    try:
        overrides = dict(parse_override(text) for text in options.set)
        config = load(WorkerConfig, options.config, overrides)
        set_up_logs(config.log_level, role=role.value)
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(config, role))
    except ConfigError as error:
        sys.stderr.write(f"{role.value}_worker: {error.key}: {error.message}\n")
        return EXIT_CONFIG


def _parser(role: Role) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{role.value}_worker",
        description=f"A pdserve worker that starts in the {role.value} role.",
        epilog="Keys are described in docs/configuration.md (`python -m pdserve.config` prints it). When ready, one "
        'JSON line is written to stdout: {"event": "ready", "address": ..., "http_port": ...}. '
        "SIGTERM drains, a second one ends at once.",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with config keys")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="override a key, e.g. sim.speedup=10"
    )
    return parser


async def _serve(config: WorkerConfig, role: Role) -> int:
    worker = Worker(config, role, build_engine)
    signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, signals.put_nowait, number)
    starting = asyncio.ensure_future(worker.start())
    stopping = asyncio.ensure_future(signals.get())
    try:
        await _first(starting, stopping)
        if not starting.done():
            os._exit(EXIT_FAILED)  # loading a model can't be interrupted, and there is nothing to drain yet
        starting.result()
        _announce(worker)
        await _first(stopping, worker.failed)
        if worker.failed.done():
            return EXIT_FAILED
        return await _drain(worker, signals)
    except PdserveError as error:
        if isinstance(error, ConfigError):
            raise
        log.error("start failed", exc_info=error)
        return EXIT_FAILED
    finally:
        stopping.cancel()
        await worker.stop()


def _announce(worker: Worker) -> None:
    gc.collect()
    gc.freeze()  # what was loaded stays: later collections need not look at it
    ready = {
        "event": "ready",
        "address": worker.address,
        "http_port": worker.http_port,
        "worker_id": worker.info.worker_id,
        "role": worker.info.role.value,
        "pid": os.getpid(),
    }
    sys.stdout.write(json.dumps(ready) + "\n")
    sys.stdout.flush()


async def _drain(worker: Worker, signals: asyncio.Queue[signal.Signals]) -> int:
    draining = asyncio.ensure_future(worker.drain())
    again = asyncio.ensure_future(signals.get())
    await _first(draining, again, worker.failed)
    again.cancel()
    if not draining.done():
        draining.cancel()
    return EXIT_FAILED if worker.failed.done() else 0


async def _first(*futures: asyncio.Future[Any]) -> None:
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
