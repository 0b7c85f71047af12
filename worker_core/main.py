"""What `python -m prefill_worker` and `python -m decode_worker` share: arguments, signals, exit codes."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
from collections.abc import Sequence

import uvloop

from pdserve.config import WorkerConfig, load, parse_override
from pdserve.errors import ConfigError, PdserveError
from pdserve.logs import set_up_logs
from pdserve.process import EXIT_FAILED, announce, catch_signals, drain, first, parse_options, refuse
from pdserve.types import Role
from worker_core.engines import build_engine
from worker_core.worker import Worker

SWITCH_INTERVAL_S = 0.0005
"""How long the engine's thread and the loop may hold the interpreter against each other. Python's 5 ms is as long as
a whole decode step: a message, or the next step, could wait that long for nothing."""

log = logging.getLogger("pdserve.worker")


def run(role: Role, arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM (drains; a second signal ends at once) or a failure. Returns the exit code: 0 after a
    drain, 1 when the engine failed, 2 for a config error."""
    prog = f"{role.value}_worker"
    options = parse_options(
        prog,
        f"A pdserve worker that starts in the {role.value} role.",
        ready=("address", "http_port"),
        example="sim.speedup=10",
        arguments=arguments,
    )
    try:
        overrides = dict(parse_override(text) for text in options.set)
        config = load(WorkerConfig, options.config, overrides)
        set_up_logs(config.log_level, role=role.value)
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(config, role))
    except ConfigError as error:
        return refuse(prog, error.key, error.message)


async def _serve(config: WorkerConfig, role: Role) -> int:
    worker = Worker(config, role, build_engine)
    signals = catch_signals()
    starting = asyncio.ensure_future(worker.start())
    stopping = asyncio.ensure_future(signals.get())
    try:
        await first(starting, stopping)
        if not starting.done():
            os._exit(EXIT_FAILED)  # loading a model can't be interrupted, and there is nothing to drain yet
        starting.result()
        _announce(worker)
        await first(stopping, worker.failed)
        if worker.failed.done():
            return EXIT_FAILED
        await drain(worker.drain(), signals, worker.failed)
        return EXIT_FAILED if worker.failed.done() else 0
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
    announce(
        address=worker.address,
        http_port=worker.http_port,
        worker_id=worker.info.worker_id,
        role=worker.info.role.value,
    )
