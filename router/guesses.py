"""What a worker that tells nothing of its prefix cache may hold: what was sent there lately, newest first.

Bounded by the blocks that the worker has and aged, since nobody says when a block leaves.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

MAX_AGE_S = 120.0
"""A guess that was not renewed for so long is dropped. Dynamo's approximate router forgets after the same time."""
POOL_SHARE = 0.5
"""Of a worker's blocks that are taken to hold prefixes: the rest is running requests' outputs and what evicted them."""


MIN_CAPACITY = 16
SHRINKAGE, GROWTH = 0.8, 1.02
"""Ten true guesses make up for one that was not: at equilibrium one in eleven fails, which costs little."""


class Guess:
    """One worker's. `add` and `age` return the changes, so that an index can follow."""

    def __init__(self, num_blocks: int) -> None:
        self._most = self._capacity = max(MIN_CAPACITY, int(num_blocks * POOL_SHARE))
        self._expiry: OrderedDict[bytes, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._expiry)

    def add(self, keys: Iterable[bytes], now: float) -> tuple[list[bytes], list[bytes]]:
        """(new, gone) after these were sent there. Within one prompt the first block is the last to go, as engines
        evict a chain from its end."""
        expiry, deadline = self._expiry, now + MAX_AGE_S
        new = []
        for key in reversed(list(keys)):
            if key not in expiry:
                new.append(key)
            expiry[key] = deadline
            expiry.move_to_end(key)
        return new, self._overflow()

    def judge(self, true: bool) -> list[bytes]:
        """Whether a prompt was found as believed. Blocks leave sooner than was thought if not: then fewer are believed
        in; those are returned."""
        factor = GROWTH if true else SHRINKAGE
        self._capacity = min(self._most, max(MIN_CAPACITY, int(self._capacity * factor) + true))
        return self._overflow()

    def _overflow(self) -> list[bytes]:
        return [self._expiry.popitem(last=False)[0] for _ in range(len(self._expiry) - self._capacity)]

    def age(self, now: float) -> list[bytes]:
        """Those that have become too old."""
        gone = []
        while self._expiry and next(iter(self._expiry.values())) <= now:
            gone.append(self._expiry.popitem(last=False)[0])
        return gone
