"""Follows one vLLM (or SGLang) engine's KV events over ZMQ and feeds them to the index as a node's.

The engine publishes batches numbered from 0 on a PUB socket, which drops what it can't deliver, and answers for its
latest batches on a ROUTER socket. A number that is missing is asked for there; what cannot be had any more means that
removals may have been lost, so the node is cleared, and `on_lost` says so. A restart in place shows in a connection
that broke, a number that steps back, or a batch that is not the one we had under that number.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from kvstore.index.base import NodeSnapshot, Verdict
from kvstore.index.vllm_blocks import VllmBlocks
from kvstore.index.vllm_wire import Batch, decode_batch
from kvstore.types import StoreEvent
from pdserve.errors import ProtocolMismatch

log = logging.getLogger(__name__)

END = -1
"""Number of the message that ends a replay."""
MAX_MESSAGE_BYTES = 64 << 20
MAX_REPLAY_ROUNDS = 64
"""A replay longer than the engine's send queue (1,000 messages by default) comes in parts; each must bring some."""
_EVENTS = zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED


class Target(Protocol):
    """What events are fed to: `KVIndex` or `RedisIndex`."""

    def apply(self, node: str, incarnation: int, events: Sequence[StoreEvent]) -> Verdict: ...

    def renew(self, node: str, incarnation: int, *, sequence: int = 0) -> Verdict: ...

    def load(self, snapshot: NodeSnapshot) -> Verdict: ...


@dataclass(frozen=True, slots=True)
class VllmEventOptions:
    endpoint: str
    """The engine's PUB socket, such as tcp://10.0.0.7:5557 (port + data parallel rank)."""
    replay_endpoint: str | None = None
    """Its ROUTER socket. Without it every lost batch costs the node's entries."""
    topic: str = ""
    """Messages whose topic starts so; empty: all."""
    replay_timeout_s: float = 5.0
    """Without a message of a replay; vLLM answers between two steps of its publisher, 0.1 s when idle."""
    heartbeat_s: float = 2.0
    """The node's lease is renewed so often while the connection stands."""


@dataclass(slots=True)
class SourceCounts:
    batches: int = 0
    skipped_events: int = 0
    malformed: int = 0
    gaps: int = 0
    replayed: int = 0
    """Batches that came by replay."""
    restarts: int = 0
    lost: int = 0
    """Times that the node had to be cleared."""


class VllmEventSource:
    """One engine. `run` until cancelled; the node's incarnation is a new one at each start of the engine."""

    def __init__(
        self,
        options: VllmEventOptions,
        blocks: VllmBlocks,
        target: Target,
        node: str,
        *,
        on_lost: Callable[[str], None] = lambda node: None,
        incarnations: Callable[[], int] = time.time_ns,
    ) -> None:
        """`on_lost(node)`: the engine holds blocks that we don't know of any more; only it can help (a cache reset)."""
        self.counts = SourceCounts()
        self.connected = False
        self._options, self._blocks, self._target, self._node = options, blocks, target, node
        self._on_lost, self._incarnations = on_lost, incarnations
        self._incarnation = incarnations()
        self._begun = False
        self._expected: int | None = 0
        """Number of the next batch; None: any, after a loss."""
        self._last_live = END
        self._last_timestamp = 0.0

    async def run(self) -> None:
        """Raises `ConfigError` if the engine's blocks do not fit ours; else ends only by cancellation."""
        with zmq.asyncio.Context() as context, context.socket(zmq.SUB) as sub:
            sub.linger = context.linger = 0
            sub.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
            sub.setsockopt(zmq.RCVHWM, 0)
            sub.setsockopt_string(zmq.SUBSCRIBE, self._options.topic)
            monitor = sub.get_monitor_socket(_EVENTS)
            try:
                sub.connect(self._options.endpoint)
                await self._follow(context, sub, monitor)
            finally:
                sub.disable_monitor()

    async def _follow(self, context: zmq.asyncio.Context, sub: Any, monitor: Any) -> None:
        poller = zmq.asyncio.Poller()
        poller.register(sub, zmq.POLLIN)
        poller.register(monitor, zmq.POLLIN)
        while True:
            ready = dict(await poller.poll(int(self._options.heartbeat_s * 1000)))
            if monitor in ready:
                await self._notice(context, await recv_monitor_message(monitor))
            elif sub in ready:
                await self._receive(context, await sub.recv_multipart())
            if self.connected:
                self._told(self._target.renew(self._node, self._incarnation, sequence=self._blocks.sequence))

    # The connection

    async def _notice(self, context: zmq.asyncio.Context, message: Any) -> None:
        if message["event"] == zmq.EVENT_DISCONNECTED:
            self.connected = False
            return
        self.connected = True
        if self._begun:  # it broke in between: the engine may be another one, and batches may be lost
            await self._go_on(context, None)
        else:
            self._begun = True
            await self._begin(context)

    async def _begin(self, context: zmq.asyncio.Context) -> None:
        """The first contact: history from its start, if the engine still has it."""
        history = await self._replay(context, 0)
        if history and history[0][0] > 0:
            self._lose("the engine's history is longer than what it holds for replay")
        for number, batch in history:
            self._take(number, batch)

    async def _receive(self, context: zmq.asyncio.Context, frames: list[bytes]) -> None:
        """One live message: topic, number, payload."""
        if len(frames) < 3:
            self.counts.malformed += 1
            return
        number, batch = int.from_bytes(frames[-2], "big", signed=True), self._decode(frames[-1])
        if self._expected is not None and number < self._expected:
            if self._is_repeat(number, batch):
                self._last_live = number
                return
            self._restart()
        if self._expected is not None and number > self._expected:
            self.counts.gaps += 1
            await self._go_on(context, number)
        self._last_live = number
        if self._expected is None or number >= self._expected:
            self._take(number, batch)

    def _is_repeat(self, number: int, batch: Batch | None) -> bool:
        """A batch below the expected number that a replay brought already; else the engine began anew."""
        return number > self._last_live and (batch is None or batch.timestamp <= self._last_timestamp)

    async def _go_on(self, context: zmq.asyncio.Context, upto: int | None) -> None:
        """Brings what is missing before batch `upto`, or whatever there is. Asks for one batch more, the last that we
        had: if that is another now, or has not happened yet, the engine is a new one."""
        start = max((self._expected or 0) - 1, 0)
        replayed = await self._replay(context, start)
        if self._expected and self._is_another(start, replayed, upto is None):
            self._restart()
            start, replayed = 0, await self._replay(context, 0)
        if replayed and replayed[0][0] > start:
            self._lose("what was missed is not held for replay any more")
        for number, batch in replayed:
            if self._expected is None or number >= self._expected:
                self._take(number, batch)
        if upto is not None and (self._expected or 0) < upto:
            self._lose("batches are missing and no replay has them")

    def _is_another(self, number: int, replayed: list[tuple[int, Batch | None]], reconnected: bool) -> bool:
        if not replayed:
            return reconnected or self._options.replay_endpoint is not None
        first, batch = replayed[0]
        return first == number and batch is not None and batch.timestamp != self._last_timestamp

    # Replay

    async def _replay(self, context: zmq.asyncio.Context, start: int) -> list[tuple[int, Batch | None]]:
        """Batches from `start` on, without gaps, as far as the engine still has them; none if it doesn't answer."""
        endpoint = self._options.replay_endpoint
        if endpoint is None:
            return []
        found: list[tuple[int, Batch | None]] = []
        for _ in range(MAX_REPLAY_ROUNDS):
            more, ended = await self._replay_once(context, endpoint, found[-1][0] + 1 if found else start)
            before = len(found)
            for number, payload in more:
                if not found or number == found[-1][0] + 1:
                    found.append((number, self._decode(payload)))
            if len(found) == before or (ended and len(found) == before + len(more)):
                break
        self.counts.replayed += len(found)
        return found

    async def _replay_once(
        self, context: zmq.asyncio.Context, endpoint: str, start: int
    ) -> tuple[list[tuple[int, bytes]], bool]:
        """What one request brings, and whether the answer came to its end."""
        batches: list[tuple[int, bytes]] = []
        with context.socket(zmq.DEALER) as dealer:
            dealer.linger = 0
            dealer.setsockopt(zmq.RCVHWM, 0)
            dealer.connect(endpoint)
            try:
                await dealer.send_multipart([b"", start.to_bytes(8, "big")])
                while True:
                    async with asyncio.timeout(self._options.replay_timeout_s):
                        *_, number, payload = await dealer.recv_multipart()
                    if int.from_bytes(number, "big", signed=True) == END:
                        return batches, True
                    batches.append((int.from_bytes(number, "big"), payload))
            except (TimeoutError, ValueError) as error:
                log.warning("no replay of KV events", extra={"node": self._node, "error": repr(error)})
                return batches, False

    # To the index

    def _decode(self, payload: bytes) -> Batch | None:
        try:
            return decode_batch(payload)
        except ProtocolMismatch as error:
            self.counts.malformed += 1
            log.warning("a batch of KV events is not understood", extra={"node": self._node, "error": str(error)})
            return None

    def _take(self, number: int, batch: Batch | None) -> None:
        """The next batch. One that can't be read is as good as lost."""
        if batch is None:
            self._lose("a batch was malformed")
            self._expected = number + 1
            return
        self._expected = number + 1
        self.counts.batches += 1
        self.counts.skipped_events += batch.skipped
        self._last_timestamp = batch.timestamp
        self._send(self._blocks.translate(batch.events))

    def _lose(self, why: str) -> None:
        """Removals may be among what is lost: nothing known of the engine holds any more."""
        self.counts.lost += 1
        log.warning("KV events lost", extra={"node": self._node, "why": why})
        self._send(self._blocks.clear())
        self._expected = None
        self._on_lost(self._node)

    def _restart(self) -> None:
        """Another engine under the same address."""
        self.counts.restarts += 1
        self._incarnation = max(self._incarnation + 1, self._incarnations())
        self._blocks.restart()
        self._expected, self._last_live, self._last_timestamp = 0, END, 0.0
        self._send([])

    def _send(self, events: list[StoreEvent]) -> None:
        self._told(self._target.apply(self._node, self._incarnation, events))

    def _told(self, verdict: Verdict) -> None:
        if verdict is Verdict.RESYNC:
            self._target.load(self._blocks.snapshot(self._node, self._incarnation))
