"""What every process of ours does alike: its command line, its ready line, its signals.

A process prints one JSON line on stdout when it serves, which `pdserve up` and other supervisors wait for. SIGTERM (or
Ctrl-C) drains, a second one ends at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from collections.abc import Coroutine, Sequence
from typing import Any

EXIT_FAILED = 1
EXIT_CONFIG = 2

Signals = asyncio.Queue[signal.Signals]


def parse_options(
    prog: str, description: str, *, ready: Sequence[str], example: str, arguments: Sequence[str] | None
) -> argparse.Namespace:
    """`config` (a path or None) and `set` (a list of key=value). `ready` names what the ready line tells."""
    line = ", ".join(f'"{name}": ...' for name in ("event", *ready))
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog="Keys are described in docs/configuration.md (`python -m pdserve.config` prints it). When it serves, "
        f"one JSON line is written to stdout: {{{line}}}. SIGTERM drains, a second one ends at once.",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with config keys")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help=f"override a key, e.g. {example}"
    )
    return parser.parse_args(arguments)


def announce(**fields: object) -> None:
    """The ready line."""
    sys.stdout.write(json.dumps({"event": "ready", **fields, "pid": os.getpid()}) + "\n")
    sys.stdout.flush()


def refuse(prog: str, key: str, message: str) -> int:
    """A config error on stderr; the exit code for it."""
    sys.stderr.write(f"{prog}: {key}: {message}\n")
    return EXIT_CONFIG


def catch_signals() -> Signals:
    """SIGTERM and SIGINT, as they come. Call it on the running loop."""
    signals: Signals = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, signals.put_nowait, number)
    return signals


async def first(*futures: asyncio.Future[Any]) -> None:
    """Until one of them is done."""
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)


async def drain(work: Coroutine[Any, Any, Any], signals: Signals, *failures: asyncio.Future[Any]) -> None:
    """Until `work` is done, a second signal comes or something fails; then `work` is cancelled."""
    draining = asyncio.ensure_future(work)
    again = asyncio.ensure_future(signals.get())
    await first(draining, again, *failures)
    again.cancel()
    draining.cancel()
