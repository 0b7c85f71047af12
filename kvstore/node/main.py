"""`python -m kvstore`: start, announce, drain, end; the same way as a worker."""

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

PROG = "kvstore"

log = logging.getLogger("pdserve.kvstore")


def run(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM (drains; a second signal ends at once) or a failure. Returns the exit code: 0 after a
    drain, 1 when the store failed, 2 for a config error."""
    options = parse_options(
        PROG,
        "The KV store of one node: a pool in shared memory, and a disk tier below it.",
        ready=("address", "http_port", "node", "num_blocks"),
        example="block_bytes=368640",
        arguments=arguments,
    )
    try:
        config = load(KvstoreConfig, options.config, dict(parse_override(text) for text in options.set))
        set_up_logs(config.log_level, role=PROG)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(config))
    except ConfigError as error:
        return refuse(PROG, error.key, error.message)


async def _serve(config: KvstoreConfig) -> int:
    store = NodeStore(config)
    signals = catch_signals()
    stopping = asyncio.ensure_future(signals.get())
    try:
        await store.start()
        announce(
            address=store.address,
            http_port=store.http_port,
            node=store.parts.node,
            num_blocks=store.parts.pool.num_blocks,
        )
        await first(stopping, store.failed)
        if not store.failed.done():
            await drain(store.drain(), signals, store.failed)
        return EXIT_FAILED if store.failed.done() else 0
    except PdserveError as error:
        if isinstance(error, ConfigError):
            raise
        log.error("start failed", exc_info=error)
        return EXIT_FAILED
    finally:
        stopping.cancel()
        await store.stop()
