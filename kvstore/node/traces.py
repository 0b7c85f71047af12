"""Spans of what a store does for requests: in the trace that a call names, and in none for calls that name none."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

from pdserve.config import TracingConfig
from pdserve.errors import PdserveError
from pdserve.tracing import Tracer, Value, tracer_of

Handler = Callable[[Any], Awaitable[Any]]

TOLD: dict[str, Callable[[Any, Any], dict[str, Value]]] = {
    "lookup": lambda request, found: {
        "pdserve.blocks": len(request.keys),
        "pdserve.blocks_found": len(found.slots),
        "pdserve.blocks_from_disk": found.promoted,
    },
    "reserve": lambda request, reserved: {
        "pdserve.blocks": len(request.keys),
        "pdserve.blocks_reserved": len(reserved.slots),
    },
    "commit": lambda request, done: {
        "pdserve.blocks": len(request.digests),
        "pdserve.blocks_committed": done.committed,
    },
}
"""What a span tells of a call and its answer: numbers of blocks, never a key. These calls have a `traceparent`."""


class StoreTraces:
    """One a store. `is_local` tells of a session whether its client is on this node, or a peer's."""

    def __init__(self, tracer: Tracer, node: str, is_local: Callable[[bytes], bool]) -> None:
        self._tracer = tracer
        self._node = node
        self._is_local = is_local

    def traced(self, operation: str, handler: Handler) -> Handler:
        """The handler, with a span a call; operations that are no request's stay as they are."""
        told = TOLD.get(operation)
        if told is None:
            return handler

        async def serve(request: Any) -> Any:
            if not request.traceparent:
                return await handler(request)
            began = time.time_ns()
            try:
                response = await handler(request)
            except PdserveError as error:
                self._tell(operation, request, began, {}, error.reason)
                raise
            self._tell(operation, request, began, told(request, response))
            return response

        return serve

    def _tell(self, operation: str, request: Any, began: int, told: dict[str, Value], error: str = "") -> None:
        now = time.time_ns()
        span = self._tracer.begin(f"store.{operation}", request.traceparent, began)
        if told.get("pdserve.blocks_from_disk"):
            # the look-up in memory before it is microseconds
            self._tracer.child(
                span, "store.disk_read", began, now, {"pdserve.blocks": told["pdserve.blocks_from_disk"]}
            )
        by_peer = not self._is_local(request.session)
        self._tracer.end(span, now, {"pdserve.node": self._node, "pdserve.by_peer": by_peer, **told}, error)

    def close(self) -> None:
        self._tracer.close()


def make_traces(config: TracingConfig, node: str, is_local: Callable[[bytes], bool]) -> StoreTraces | None:
    """None where tracing is off. Raises `ConfigError`."""
    tracer = tracer_of(config, "pdserve-kvstore", node)
    return None if tracer is None else StoreTraces(tracer, node, is_local)
