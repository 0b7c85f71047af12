"""`python -m kvstore`: arguments, signals, exit codes; the same as a worker's."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

import uvloop

from kvstore.node.process import NodeStore
from pdserve.config import KvstoreConfig, load, parse_override
from pdserve.errors import ConfigError, PdserveError
from pdserve.logs import set_up_logs

EXIT_FAILED = 1
EXIT_CONFIG = 2

log = logging.getLogger("pdserve.kvstore")


def run(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM (drains; a second signal ends at once) or a failure. Returns the exit code: 0 after a
    drain, 1 when the store failed, 2 for a config error."""
    options = _parser().parse_args(arguments)
    try:
        config = load(KvstoreConfig, options.config, dict(parse_override(text) for text in options.set))
        set_up_logs(config.log_level, role="kvstore")
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(config))
    except ConfigError as error:
        sys.stderr.write(f"kvstore: {error.key}: {error.message}\n")
        return EXIT_CONFIG


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvstore",
        description="The KV store of one node: a pool in shared memory, and a disk tier below it.",
        epilog="Keys are described in docs/configuration.md (`python -m pdserve.config` prints it). When ready, one "
        'JSON line is written to stdout: {"event": "ready", "address": ..., "http_port": ..., "node": ...}. '
        "SIGTERM drains, a second one ends at once.",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with config keys")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="override a key, e.g. block_bytes=368640"
    )
    return parser


async def _serve(config: KvstoreConfig) -> int:
    store = NodeStore(config)
    signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, signals.put_nowait, number)
    stopping = asyncio.ensure_future(signals.get())
    try:
        await store.start()
        _announce(store)
        await _first(stopping, store.failed)
        if store.failed.done():
            return EXIT_FAILED
        await _drain(store, signals)
        return 0
    except PdserveError as error:
        if isinstance(error, ConfigError):
            raise
        log.error("start failed", exc_info=error)
        return EXIT_FAILED
    finally:
        stopping.cancel()
        await store.stop()


def _announce(store: NodeStore) -> None:
    ready = {
        "event": "ready",
        "address": store.address,
        "http_port": store.http_port,
        "node": store.parts.node,
        "num_blocks": store.parts.pool.num_blocks,
        "pid": os.getpid(),
    }
    sys.stdout.write(json.dumps(ready) + "\n")
    sys.stdout.flush()


async def _drain(store: NodeStore, signals: asyncio.Queue[signal.Signals]) -> None:
    """A second signal ends it."""
    draining = asyncio.ensure_future(store.drain())
    again = asyncio.ensure_future(signals.get())
    await _first(draining, again)
    again.cancel()
    draining.cancel()


async def _first(*futures: asyncio.Future[Any]) -> None:
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
