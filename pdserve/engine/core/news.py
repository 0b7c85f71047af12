"""What the prefix cache took up and gave up since the last step: for the node's store, and for routers."""

from __future__ import annotations

from collections.abc import Sequence

from pdserve.engine.base import PublishedBlocks, StepResult
from pdserve.engine.core.handover_area import HandoverArea


class CacheNews:
    """One an engine. Generations are read when a block is taken up: later it may be another's already."""

    def __init__(self, area: HandoverArea) -> None:
        self._pool = area.pool
        self._staged = area.staged
        self._took: list[PublishedBlocks] = []

    def __bool__(self) -> bool:
        return bool(self._took) or self._pool.has_evicted

    def took(self, handle: int, first_block: int, keys: Sequence[bytes], blocks: Sequence[int]) -> None:
        """The choice's blocks `first_block` and on are findable. Hot path: once a block, not once a token."""
        if not keys:
            return
        if self._staged:
            self._took.append(PublishedBlocks(handle, first_block, tuple(keys)))
        else:
            generations = self._pool.generations_of(blocks)
            self._took.append(PublishedBlocks(handle, first_block, tuple(keys), tuple(blocks), generations))

    def flush(self, result: StepResult) -> None:
        """Put it into a step's result."""
        if self._pool.has_evicted:
            result.evicted = self._pool.take_evicted()
            lost = set(result.evicted)
            self._took = [still for taken in self._took if (still := _leading(taken, lost)).keys]
        result.published, self._took = self._took, []


def _leading(taken: PublishedBlocks, lost: set[bytes]) -> PublishedBlocks:
    """Its blocks up to the first one that was lost again within the same step."""
    count = next((i for i, key in enumerate(taken.keys) if key in lost), len(taken.keys))
    if count == len(taken.keys):
        return taken
    return PublishedBlocks(
        taken.handle, taken.first_block, taken.keys[:count], taken.blocks[:count], taken.generations[:count]
    )
