"""Belady's rule: evict the key whose next use is furthest away. The bound that no policy without foresight passes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from heapq import heappop, heappush

from kvstore.eviction.base import Allowed, Key, require

_NEVER = float("inf")


class BeladyPolicy:
    """For benchmarks: it must be told all chains beforehand, and then sees exactly those, in that order."""

    def __init__(self, future: Iterable[Sequence[Key]]) -> None:
        self._uses: dict[Key, list[int]] = {}
        """Requests that will use a key, the next one last."""
        self._requests = 0
        for number, keys in enumerate(future):
            for key in keys:
                self._uses.setdefault(key, []).append(number)
        for uses in self._uses.values():
            uses.reverse()
        self._next: dict[Key, float] = {}
        """Resident keys and their next use."""
        self._heap: list[tuple[float, int, Key]] = []
        """(-next use, -place in the chain, key): tails leave first. Entries outlive their truth and are skipped."""

    def access(self, keys: Sequence[Key], now: float, *, extends: bool = False) -> None:
        for place, key in enumerate(keys):
            uses = self._uses[key]
            while uses and uses[-1] <= self._requests:
                uses.pop()
            following = uses[-1] if uses else _NEVER
            self._next[key] = following
            heappush(self._heap, (-following, -place, key))
        self._requests += 1

    def evict(self, now: float, allowed: Allowed) -> Key | None:
        refused = []
        victim = None
        while self._heap and victim is None:
            entry = heappop(self._heap)
            if self._next.get(entry[2]) != -entry[0]:
                continue
            if allowed(entry[2]):
                victim = entry[2]
                del self._next[victim]
            else:
                refused.append(entry)
        for entry in refused:
            heappush(self._heap, entry)
        return victim

    def forget(self, key: Key) -> None:
        self._next.pop(key, None)

    def __contains__(self, key: Key) -> bool:
        return key in self._next

    def __len__(self) -> int:
        return len(self._next)

    def check_integrity(self) -> None:
        known = {key for _, _, key in self._heap}
        require(self._next.keys() <= known, "a resident key is not in the heap")
