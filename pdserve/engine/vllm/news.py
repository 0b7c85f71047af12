"""What can be found here and what can't any more, over both caches: vLLM's own and the staging area.

vLLM's cache is followed by its events (`CacheEvents`); of staging the books tell. A key counts as cached while either
has it. Blocks in staging are told with their numbers, so that the worker can copy them; what only vLLM has is told by
key alone, under handle `ELSEWHERE`: routers may send requests for it here, nobody can copy it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pdserve.engine.base import PublishedBlocks, StepResult
from pdserve.engine.vllm.staging import StagingPool

ELSEWHERE = -1
"""Handle of blocks that belong to no request that is known here."""


@dataclass(frozen=True, slots=True)
class CacheChange:
    """One of vLLM's events in our keys. `cleared` comes before what is stored with it."""

    stored: tuple[bytes, ...] = ()
    removed: tuple[bytes, ...] = ()
    cleared: bool = False


class CacheEvents(Protocol):
    """Follows vLLM's KV events (`kvstore.vllm_connector.events`)."""

    @property
    def vllm_config(self) -> dict[str, Any]:
        """vLLM's `kv_events_config` that makes it publish them here."""
        ...

    async def run(self) -> None:
        """Follow, until cancelled."""
        ...

    def take(self) -> list[CacheChange]:
        """What came since the last call, from any thread."""
        ...

    def close(self) -> None: ...


class CacheNews:
    """One an engine."""

    def __init__(self, staging: StagingPool, events: CacheEvents | None) -> None:
        self._staging = staging
        self._events = events
        self._own: set[bytes] = set()
        """What vLLM's own cache has."""
        self._took: list[PublishedBlocks] = []
        self._lost: dict[bytes, None] = {}

    def __bool__(self) -> bool:
        return bool(self._took or self._lost or self._staging.books.has_evicted)

    def took(self, handle: int, first_block: int, keys: Sequence[bytes], blocks: Sequence[int]) -> None:
        """Staged blocks of this choice's chain, `first_block` and on, can be found."""
        if keys:
            generations = self._staging.books.generations_of(blocks)
            self._took.append(PublishedBlocks(handle, first_block, tuple(keys), tuple(blocks), generations))

    def follow(self) -> None:
        """Take in what vLLM has told."""
        for change in self._events.take() if self._events is not None else ():
            if change.cleared:
                self._lose(tuple(self._own))
            self._lose(change.removed)
            self._gain(change.stored)

    def _gain(self, keys: Sequence[bytes]) -> None:
        new = tuple(key for key in keys if key not in self._own and self._staging.books.find(key) is None)
        self._own.update(keys)
        if new:
            self._took.append(PublishedBlocks(ELSEWHERE, 0, new))

    def _lose(self, keys: Sequence[bytes]) -> None:
        self._own.difference_update(keys)
        self._lost.update(dict.fromkeys(keys))

    def flush(self, result: StepResult) -> None:
        """Put it into a step's result."""
        self._lost.update(dict.fromkeys(self._staging.books.take_evicted()))
        result.evicted = [key for key in self._lost if not self.knows(key)]
        gone = set(result.evicted)
        result.published = [still for taken in self._took if (still := _without(taken, gone)).keys]
        self._took, self._lost = [], {}

    def num_own(self, keys: Sequence[bytes]) -> int:
        """Leading ones of these that vLLM's own cache has."""
        return next((index for index, key in enumerate(keys) if key not in self._own), len(keys))

    def knows(self, key: bytes) -> bool:
        return key in self._own or self._staging.books.find(key) is not None

    def keys(self) -> list[bytes]:
        """Everything that can be found."""
        return list(self._own.union(self._staging.books.keys()))


def _without(taken: PublishedBlocks, gone: set[bytes]) -> PublishedBlocks:
    """Its blocks up to the first one that was lost again within the same step."""
    count = next((i for i, key in enumerate(taken.keys) if key in gone), len(taken.keys))
    return PublishedBlocks(
        taken.handle, taken.first_block, taken.keys[:count], taken.blocks[:count], taken.generations[:count]
    )
