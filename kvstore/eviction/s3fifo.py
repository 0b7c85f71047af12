"""S3-FIFO (Yang and others, SOSP 2023): newcomers prove themselves in a small queue, so scans pass through."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from kvstore.eviction.base import Allowed, Key, require

_SMALL_SHARE = 0.1
"""Of the resident keys; the paper's value."""
_GHOST_SHARE = 0.9
"""Ghosts per resident key: as many as the main queue's share, as in the authors' simulator."""
_MAX_USES = 3
"""Uses counted a key: two bits, the paper's value."""


class S3FifoPolicy:
    """Three FIFO queues: small (newcomers), main, and ghost (keys that left small unused).

    One use after the first lets a key into main. Its tail precedes its head in a queue.
    """

    def __init__(self) -> None:
        self._small: OrderedDict[Key, int] = OrderedDict()
        self._main: OrderedDict[Key, int] = OrderedDict()
        self._ghost: OrderedDict[Key, None] = OrderedDict()

    def access(self, keys: Sequence[Key], now: float, *, extends: bool = False) -> None:
        for key in reversed(keys):
            queue = self._queue_of(key)
            if queue is None:
                self._insert(key)
            elif not extends:
                queue[key] = min(queue[key] + 1, _MAX_USES)

    def evict(self, now: float, allowed: Allowed) -> Key | None:
        refused: list[Key] = []
        victim = None
        while victim is None and len(self):
            small = self._takes_small()
            key, uses = (self._small if small else self._main).popitem(last=False)
            if uses:
                self._main[key] = 0 if small else uses - 1
            elif not allowed(key):
                refused.append(key)
            else:
                victim = key
                if small:
                    self._remember(key)
        self._main.update(dict.fromkeys(refused, 0))
        return victim

    def forget(self, key: Key) -> None:
        queue = self._queue_of(key)
        if queue is not None:
            del queue[key]
        self._ghost.pop(key, None)

    def __contains__(self, key: Key) -> bool:
        return key in self._main or key in self._small

    def __len__(self) -> int:
        return len(self._main) + len(self._small)

    def check_integrity(self) -> None:
        small, main, ghost = set(self._small), set(self._main), set(self._ghost)
        require(not small & main, "a key is in small and in main")
        require(not ghost & (small | main), "a ghost is resident")

    def _queue_of(self, key: Key) -> OrderedDict[Key, int] | None:
        if key in self._main:
            return self._main
        return self._small if key in self._small else None

    def _insert(self, key: Key) -> None:
        if key in self._ghost:
            del self._ghost[key]
            self._main[key] = 0
        else:
            self._small[key] = 0

    def _takes_small(self) -> bool:
        return not self._main or len(self._small) >= _SMALL_SHARE * len(self)

    def _remember(self, key: Key) -> None:
        self._ghost[key] = None
        while len(self._ghost) > _GHOST_SHARE * len(self):
            self._ghost.popitem(last=False)
