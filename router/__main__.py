"""`python -m router`: arguments, signals, exit codes."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Sequence

import uvloop

from pdserve.config import RouterConfig, load, parse_override
from pdserve.errors import ConfigError
from pdserve.logs import set_up_logs
from pdserve.process import announce, catch_signals, drain, first, parse_options, refuse
from router.app import Router

GC_THRESHOLD = 20_000
"""Objects between two collections of the young. A request makes some hundred and frees them by count, but for a cycle
or two: Python's 700 would look through every request under way several times in each one's life."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM (drains; a second signal ends at once). Returns 0 then, 2 for a config error."""
    options = parse_options(
        "router",
        "The pdserve router: OpenAI HTTP and gRPC in, prefill and decode workers behind; /readyz tells when there are.",
        ready=("http_port", "grpc_port"),
        example="max_inflight=100",
        arguments=arguments,
    )
    try:
        overrides = dict(parse_override(text) for text in options.set)
        config = load(RouterConfig, options.config, overrides)
        set_up_logs(config.log_level, role="router")
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(config))
    except ConfigError as error:
        return refuse("router", error.key, error.message)
    return 0


async def _serve(config: RouterConfig) -> None:
    router = Router(config)
    signals = catch_signals()
    starting = asyncio.ensure_future(router.start())
    stopping = asyncio.ensure_future(signals.get())
    try:
        await first(starting, stopping)
        if not starting.done():
            return  # told to go before it was there
        starting.result()
        _announce(router)
        await stopping
        await drain(router.drain(), signals)
    finally:
        stopping.cancel()
        await _settle(starting)
        await router.stop()


async def _settle(starting: asyncio.Future[None]) -> None:
    """A start that was cut short must be over before anything is stopped; its error was raised or is moot."""
    if not starting.done():
        starting.cancel()
        await asyncio.wait([starting])


def _announce(router: Router) -> None:
    gc.collect()
    gc.freeze()  # tokenizer tables and code stay: later collections need not look at them
    gc.set_threshold(GC_THRESHOLD)
    announce(http_port=router.http_port, grpc_port=router.grpc_port)


if __name__ == "__main__":
    sys.exit(main())
