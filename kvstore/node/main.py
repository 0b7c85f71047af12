"""`python -m kvstore`: arguments, signals, exit codes; the same as a worker's."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import uvloop

from kvstore.node.process import NodeStore
from pdserve.config import KvstoreConfig, load, parse_override
from pdserve.errors import ConfigError, PdserveError
from pdserve.logs import set_up_logs
from pdserve.process import EXIT_FAILED, announce, catch_signals, drain, first, parse_options, refuse

log = logging.getLogger("pdserve.kvstore")


def run(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM (drains; a second signal ends at once) or a failure. Returns the exit code: 0 after a
    drain, 1 when the store failed, 2 for a config error."""
    options = parse_options(
        "kvstore",
        "The KV store of one node: a pool in shared memory, and a disk tier below it.",
        ready=("address", "http_port", "node"),
        example="block_bytes=368640",
        arguments=arguments,
    )
    try:
        config = load(KvstoreConfig, options.config, dict(parse_override(text) for text in options.set))
        set_up_logs(config.log_level, role="kvstore")
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(config))
    except ConfigError as error:
        return refuse("kvstore", error.key, error.message)


async def _serve(config: KvstoreConfig) -> int:
    store = NodeStore(config)
    signals = catch_signals()
    stopping = asyncio.ensure_future(signals.get())
    try:
        await store.start()
        _announce(store)
        await first(stopping, store.failed)
        if store.failed.done():
            return EXIT_FAILED
        await drain(store.drain(), signals)
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
    announce(
        address=store.address,
        http_port=store.http_port,
        node=store.parts.node,
        num_blocks=store.parts.pool.num_blocks,
    )
