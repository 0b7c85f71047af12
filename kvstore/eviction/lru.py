"""Least recently used: the baseline, and what nearly every other store does."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from kvstore.eviction.base import Allowed, Key, require


class LruPolicy:
    """Evicts the key used longest ago; within one request the last block first, since a tail needs its head."""

    def __init__(self) -> None:
        self._order: OrderedDict[Key, None] = OrderedDict()
        """Resident keys, the next victim first."""

    def access(self, keys: Sequence[Key], now: float, *, extends: bool = False) -> None:
        order = self._order
        for key in reversed(keys):
            order[key] = None
            order.move_to_end(key)

    def evict(self, now: float, allowed: Allowed) -> Key | None:
        for _ in range(len(self._order)):
            key = next(iter(self._order))
            if allowed(key):
                del self._order[key]
                return key
            self._order.move_to_end(key)
        return None

    def forget(self, key: Key) -> None:
        self._order.pop(key, None)

    def __contains__(self, key: Key) -> bool:
        return key in self._order

    def __len__(self) -> int:
        return len(self._order)

    def check_integrity(self) -> None:
        require(len(self._order) == len(set(self._order)), "a key stands twice in the order")
