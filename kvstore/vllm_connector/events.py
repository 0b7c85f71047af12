"""Follows the KV events of the vLLM that this process runs, over a socket that only its user can open.

The engine asks for what came between two steps; the translation to our keys, gaps, replays and restarts are those of
the index's own source of vLLM events, which here feeds a queue instead of an index.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from queue import Empty, SimpleQueue
from typing import Any

from kvstore.index.base import NodeSnapshot, Verdict
from kvstore.index.vllm_blocks import ModelRoots, VllmBlocks
from kvstore.index.vllm_source import VllmEventOptions, VllmEventSource
from kvstore.types import EventKind, StoreEvent, Tier
from pdserve.engine.vllm.news import CacheChange

_ANY_LAYOUT = bytes(16)
"""The keys stay in this process, beside an engine whose layout is known."""


class EngineEvents:
    """A `pdserve.engine.vllm.news.CacheEvents`."""

    def __init__(self, block_tokens: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="pdserve-kv-events-")  # goes with this object at the latest
        self._options = VllmEventOptions(f"ipc://{self._folder.name}/live", f"ipc://{self._folder.name}/replay")
        blocks = VllmBlocks(ModelRoots({}, salt_is_root=True), block_tokens=block_tokens, fingerprint=_ANY_LAYOUT)
        self._queue = _Queue()
        self._source = VllmEventSource(self._options, blocks, self._queue, "engine")

    @property
    def vllm_config(self) -> dict[str, Any]:
        return {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": self._options.endpoint,
            "replay_endpoint": self._options.replay_endpoint,
        }

    async def run(self) -> None:
        await self._source.run()

    def take(self) -> list[CacheChange]:
        return self._queue.take()

    def close(self) -> None:
        self._folder.cleanup()


class _Queue:
    """What the source feeds: a `kvstore.index.vllm_source.Target`."""

    def __init__(self) -> None:
        self._changes: SimpleQueue[CacheChange] = SimpleQueue()

    def take(self) -> list[CacheChange]:
        changes: list[CacheChange] = []
        while True:
            try:
                changes.append(self._changes.get_nowait())
            except Empty:
                return changes

    def apply(self, node: str, incarnation: int, events: Sequence[StoreEvent]) -> Verdict:
        for event in events:
            if event.tier is not Tier.HBM:
                continue
            if event.kind is EventKind.STORED:
                self._changes.put(CacheChange(stored=event.keys))
            else:
                self._changes.put(CacheChange(removed=event.keys, cleared=event.kind is EventKind.CLEARED))
        return Verdict.APPLIED

    def renew(self, node: str, incarnation: int, *, sequence: int = 0) -> Verdict:
        return Verdict.APPLIED

    def load(self, snapshot: NodeSnapshot) -> Verdict:
        """Never asked for: `apply` takes everything."""
        return Verdict.APPLIED
