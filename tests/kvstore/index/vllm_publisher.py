"""An engine's side of the KV events, on real sockets: publishes as vLLM does, in either shape, with its replay buffer;
can lose batches on purpose and be restarted on the same ports."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec
import zmq
import zmq.asyncio

END = (-1).to_bytes(8, "big", signed=True)
_ORDER = {
    "BlockStored": (
        "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name", "extra_keys",
    ),
    "BlockRemoved": ("block_hashes", "medium"),
    "AllBlocksCleared": (),
}  # fmt: skip


def stored(hashes: Sequence[Any], parent: Any, tokens: Sequence[int], size: int = 4, **more: Any) -> dict[str, Any]:
    return {
        "type": "BlockStored",
        "block_hashes": list(hashes),
        "parent_block_hash": parent,
        "token_ids": list(tokens),
        "block_size": size,
        "lora_id": None,
        "medium": more.pop("medium", "GPU"),
        "lora_name": more.pop("lora_name", None),
        **more,
    }


def removed(hashes: Sequence[Any], medium: str = "GPU") -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": list(hashes), "medium": medium}


CLEARED = {"type": "AllBlocksCleared"}


def as_array(event: dict[str, Any]) -> list[Any]:
    return [event["type"], *(event.get(name) for name in _ORDER[event["type"]])]


def encode(timestamp: float, events: Sequence[dict[str, Any]], *, arrays: bool) -> bytes:
    return msgspec.msgpack.encode([timestamp, [as_array(e) if arrays else e for e in events], 0])


class Publisher:
    """`topic_in_replay`: vLLM 0.33 sends the topic in replays too, older ones do not."""

    def __init__(self, *, arrays: bool = False, topic_in_replay: bool = True, buffer_steps: int = 10_000) -> None:
        self.arrays, self.topic_in_replay = arrays, topic_in_replay
        self.clock = 1000.0
        self.replays = 0
        self._buffer_steps = buffer_steps
        self._endpoints = ["tcp://127.0.0.1:*", "tcp://127.0.0.1:*"]
        self._task: asyncio.Task[None] | None = None

    @property
    def endpoint(self) -> str:
        return self._endpoints[0]

    @property
    def replay_endpoint(self) -> str:
        return self._endpoints[1]

    async def start(self) -> None:
        self.number = 0
        self._buffer: deque[tuple[int, bytes]] = deque(maxlen=self._buffer_steps)
        self._context = zmq.asyncio.Context()
        self._pub, self._router = self._context.socket(zmq.XPUB), self._context.socket(zmq.ROUTER)
        for at, sock in enumerate((self._pub, self._router)):
            sock.linger = 0
            await self._bind(sock, self._endpoints[at])
            self._endpoints[at] = sock.last_endpoint.decode()
        self._task = asyncio.create_task(self._serve_replays())

    async def _bind(self, sock: zmq.asyncio.Socket, endpoint: str) -> None:
        async with asyncio.timeout(60):
            while True:
                try:
                    return sock.bind(endpoint)
                except zmq.ZMQError:  # the one before has not let go of the port yet
                    await asyncio.sleep(0.01)

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
            self._context.destroy(linger=0)

    async def drop_connections(self) -> None:
        """The network fails for a moment; the engine lives on."""
        self._pub.close(linger=0)
        self._pub = self._context.socket(zmq.XPUB)
        self._pub.linger = 0
        await self._bind(self._pub, self.endpoint)

    async def subscribed(self) -> None:
        """A subscriber has arrived: nothing is lost from now on."""
        async with asyncio.timeout(60):
            await self._pub.recv()

    async def publish(self, *events: dict[str, Any], lose: bool = False, payload: bytes | None = None) -> None:
        """One batch; `lose`: it gets a number and a place in the buffer, but no subscriber sees it."""
        self.clock += 1
        payload = payload or encode(self.clock, events, arrays=self.arrays)
        number, self.number = self.number, self.number + 1
        self._buffer.append((number, payload))
        if not lose:
            await self._pub.send_multipart([b"kv-events", number.to_bytes(8, "big"), payload])

    async def _serve_replays(self) -> None:
        while True:
            client, _, start = await self._router.recv_multipart()
            self.replays += 1
            topic = [b"kv-events"] if self.topic_in_replay else []
            for number, payload in list(self._buffer):
                if number >= int.from_bytes(start, "big"):
                    await self._router.send_multipart([client, b"", *topic, number.to_bytes(8, "big"), payload])
            await self._router.send_multipart([client, b"", *([b""] if topic else []), END, b""])
