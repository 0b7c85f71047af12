"""`python -m router`: arguments, signals, exit codes."""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import signal
import sys
from collections.abc import Sequence

import uvloop

from pdserve.config import RouterConfig, load, parse_override
from pdserve.errors import ConfigError
from pdserve.logs import set_up_logs
from router.app import Router

EXIT_CONFIG = 2
GC_THRESHOLD = 20_000
"""Objects between two collections of the young. A request makes some hundred and frees them by count, but for a cycle
or two: Python's 700 would look through every request under way several times in each one's life."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM (drains; a second signal ends at once). Returns 0 then, 2 for a config error."""
    options = _parser().parse_args(arguments)
    try:
        overrides = dict(parse_override(text) for text in options.set)
        config = load(RouterConfig, options.config, overrides)
        set_up_logs(config.log_level, role="router")
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(config))
    except ConfigError as error:
        sys.stderr.write(f"router: {error.key}: {error.message}\n")
        return EXIT_CONFIG
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="router",
        description="The pdserve router: OpenAI HTTP and gRPC in, prefill and decode workers behind.",
        epilog="Keys are described in docs/configuration.md (`python -m pdserve.config` prints it). When it listens, "
        'one JSON line is written to stdout: {"event": "ready", "http_port": ..., "grpc_port": ...}; /readyz tells '
        "when there are workers. SIGTERM drains, a second one ends at once.",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with config keys")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="override a key, e.g. max_inflight=100"
    )
    return parser


async def _serve(config: RouterConfig) -> None:
    router = Router(config)
    signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, signals.put_nowait, number)
    starting = asyncio.ensure_future(router.start())
    stopping = asyncio.ensure_future(signals.get())
    try:
        await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            return  # told to go before it was there
        starting.result()
        _announce(router)
        await stopping
        await _drain(router, signals)
    finally:
        stopping.cancel()
        await _settle(starting)
        await router.stop()


async def _settle(starting: asyncio.Future[None]) -> None:
    """A start that was cut short must be over before anything is stopped; its error was raised or is moot."""
    if not starting.done():
        starting.cancel()
        await asyncio.wait([starting])


async def _drain(router: Router, signals: asyncio.Queue[signal.Signals]) -> None:
    draining = asyncio.ensure_future(router.drain())
    again = asyncio.ensure_future(signals.get())
    await asyncio.wait([draining, again], return_when=asyncio.FIRST_COMPLETED)
    again.cancel()
    draining.cancel()


def _announce(router: Router) -> None:
    gc.collect()
    gc.freeze()  # tokenizer tables and code stay: later collections need not look at them
    gc.set_threshold(GC_THRESHOLD)
    ready = {"event": "ready", "http_port": router.http_port, "grpc_port": router.grpc_port, "pid": os.getpid()}
    sys.stdout.write(json.dumps(ready) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
