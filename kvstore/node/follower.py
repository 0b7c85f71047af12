"""Keeps an index in step with one node's store, through its event stream.

A router runs one for each store that it knows. Where it was cut off for a while it goes on behind the last event that
the index applied; where events are missing, or the store is a new incarnation, the store sends its content instead.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator

from kvstore.index.base import NodeSnapshot, Section, Verdict
from kvstore.index.index import KVIndex
from kvstore.types import EventKind, StoreEvent, Tier
from pdserve.errors import ConfigError, PdserveError, ProtocolMismatch
from pdserve.rpc import Channel
from pdserve.wire import store as wire

log = logging.getLogger("pdserve.kvstore")

RETRY_S = 0.5
"""Between two tries to reach a store; its entries live on for the index's lease meanwhile."""


class StoreFollower:
    """`run` in a task, cancel it to stop. The index itself ages out a node that is not heard of."""

    def __init__(
        self,
        channel: Channel,
        index: KVIndex,
        *,
        node: str = "",
        retry_s: float = RETRY_S,
        may_be_called: Callable[[str], bool] = lambda node: True,
    ) -> None:
        """`node`: the store's name where it is known already; else the first message tells. `may_be_called`: whether
        no other store has that name; of one whose name is taken nothing is believed: it would overwrite the other."""
        self._channel = channel
        self._index = index
        self._retry_s = retry_s
        self._node = node
        self._may_be_called = may_be_called
        self._connected = False

    @property
    def node(self) -> str:
        """The store's name; empty until it has told."""
        return self._node

    @property
    def connected(self) -> bool:
        """It has told its name, and its events arrive."""
        return self._connected

    def forget_name(self) -> None:
        """Another store took it over: this one, if it comes back, begins anew."""
        self._node = ""

    async def run(self) -> None:
        """Raises `ConfigError`: its name is another's."""
        while True:
            try:
                await self._follow()
            except ConfigError:
                raise
            except PdserveError as error:
                log.info(
                    "a store's events are cut off", extra={"address": self._channel.address, "reason": error.reason}
                )
            finally:
                self._connected = False
            await asyncio.sleep(self._retry_s)

    async def _follow(self) -> None:
        """Until the stream ends, or the index wants a snapshot. Raises `ConfigError` for a name that is another's."""
        known = self._index.position(self._node) if self._node else None
        request = wire.Follow(known[0], known[1]) if known else wire.Follow()
        sections: list[Section] = []
        async for batch in self._channel.stream(wire.EVENTS, request):
            if not self._connected or batch.node != self._node:
                self._take_name(batch.node)
            if batch.snapshot:
                sections += _sections(batch.events)
            if batch.snapshot_complete:
                content = NodeSnapshot(batch.node, batch.incarnation, batch.sequence, tuple(sections))
                verdict, sections = await self._load(content), []
            elif batch.snapshot:
                continue
            else:
                verdict = self._take(batch)
            if verdict is Verdict.STALE:
                self._node = ""
                raise ConfigError(f"a newer store is called {batch.node!r} too", key="node_id")
            if verdict is Verdict.RESYNC:
                return

    def _take_name(self, node: str) -> None:
        """Raises `ConfigError`: another has it."""
        if not self._may_be_called(node):
            self._node = ""
            raise ConfigError(f"another store is called {node!r} too", key="node_id")
        self._node, self._connected = node, True

    async def _load(self, snapshot: NodeSnapshot) -> Verdict:
        """A few thousand blocks at a time: the loop has other things to do."""
        steps = self._index.load_in_steps(snapshot)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                verdict: Verdict = end.value
                return verdict
            await asyncio.sleep(0)

    def _take(self, batch: wire.EventBatch) -> Verdict:
        if not batch.events:
            return self._index.renew(batch.node, batch.incarnation, sequence=batch.sequence)
        return self._index.apply(batch.node, batch.incarnation, [_event(columns) for columns in batch.events])


def _event(columns: wire.EventColumns) -> StoreEvent:
    """Raises `ProtocolMismatch` for a kind or tier of a newer store."""
    try:
        kind, tier = EventKind(columns.kind), Tier(columns.tier)
    except ValueError as error:
        raise ProtocolMismatch(f"the store sent an event that is not known here ({error}): upgrade this one") from error
    return StoreEvent(columns.sequence, kind, tier, columns.keys, columns.fingerprint, columns.parents)


def _sections(events: Iterable[wire.EventColumns]) -> Iterator[Section]:
    for columns in events:
        event = _event(columns)
        yield Section(event.tier, event.fingerprint, b"".join(event.keys))
