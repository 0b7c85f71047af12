"""The engine's prefix cache as a store's side sees it: `pdserve.engine.base.KVCache`, a part of `LocalEngine`."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from pdserve.engine.base import ImportTarget
from pdserve.engine.core.config import CoreConfig
from pdserve.engine.core.fills import Fills
from pdserve.engine.core.handover import Exports
from pdserve.engine.core.handover_area import HandoverArea
from pdserve.engine.core.scheduler import Scheduler


class CacheFace:
    """`LocalEngine` makes the parts."""

    _config: CoreConfig
    _area: HandoverArea
    _fills: Fills
    _exports: Exports
    _scheduler: Scheduler
    _lent: list[list[int]]
    """In hand-over memory, for as long as somebody copies them."""

    def cache_open(self, handle: int, keys: Seq[bytes], first_block: int = 0) -> ImportTarget | None:
        if not self._config.prefix_cache:
            return None
        return self._fills.open(handle, keys, first_block, self._scheduler.room_for_fill())

    def cache_commit(self, handle: int, num_blocks: int) -> None:
        self._fills.commit(handle, num_blocks)
        self._scheduler.stuck = False

    def cache_drop(self, handle: int) -> None:
        self._fills.drop(handle)
        self._scheduler.stuck = False

    def cache_lend(self, keys: Seq[bytes]) -> tuple[int, ...] | None:
        found = self._area.pool.lookup(keys) if self._area.staged else []
        if not found or self._exports.has_pending:
            return None  # hand-overs go first
        self._area.pool.acquire(found)
        lent = self._area.export(found)
        self._area.pool.free(found[len(lent) :])
        if not lent:
            return None
        self._lent.append(lent)
        return tuple(lent)

    def cache_return(self, blocks: Seq[int]) -> None:
        self._lent.remove(list(blocks))
        self._area.release(blocks)
        self._scheduler.stuck = False

    def cached_keys(self) -> list[bytes]:
        """Every key that the prefix cache can find."""
        return self._area.pool.keys()
