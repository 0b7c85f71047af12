"""What the engine's prefix cache holds, as the event loop knows it: a set of keys, one step behind the engine.

Routers are told of it on their streams, and a prompt's cached part is known here without asking the engine's thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

from pdserve.engine.base import StepResult
from pdserve.types import CacheDelta

MAX_KEYS = 16_384
"""In one message: 256 KiB."""


class CacheView:
    """One a worker."""

    def __init__(self) -> None:
        self._keys: dict[bytes, None] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def keys(self) -> Iterable[bytes]:
        return self._keys

    def match(self, keys: Sequence[bytes]) -> int:
        """How many leading ones of these are cached."""
        known = self._keys
        return next((i for i, key in enumerate(keys) if key not in known), len(keys))

    def update(self, result: StepResult) -> CacheDelta:
        """Take over what a step changed. A published key may be known already: it was found, not made."""
        known = self._keys
        removed = tuple(key for key in dict.fromkeys(result.evicted) if key in known)
        for key in removed:
            del known[key]
        stored: list[bytes] = []
        for published in result.published:
            for key in published.keys:
                if key not in known:
                    known[key] = None
                    stored.append(key)
        return CacheDelta(tuple(stored), removed)


class CacheFeed:
    """What one router has not been told yet. Changes of a key merge, and what piles up for a slow router is at most
    the whole cache once: then it starts anew."""

    def __init__(self, view: CacheView) -> None:
        self._view = view
        self._reset = True
        self._pending: dict[bytes, bool] = dict.fromkeys(view.keys(), True)
        """Key -> whether the cache has it (again), in the order of the last change."""

    def __bool__(self) -> bool:
        return self._reset or bool(self._pending)

    def add(self, delta: CacheDelta) -> None:
        pending = self._pending
        for key in delta.removed:
            pending.pop(key, None)
            if not self._reset:
                pending[key] = False
        for key in delta.stored:
            pending.pop(key, None)
            pending[key] = True
        if len(pending) > 2 * len(self._view) + MAX_KEYS:
            self._reset, self._pending = True, dict.fromkeys(self._view.keys(), True)

    def take(self) -> CacheDelta | None:
        """The next message's part."""
        if not self:
            return None
        part = list(islice(self._pending, MAX_KEYS))
        changes = [(key, self._pending.pop(key)) for key in part]
        reset, self._reset = self._reset, False
        stored = tuple(key for key, here in changes if here)
        return CacheDelta(stored, tuple(key for key, here in changes if not here), reset)
