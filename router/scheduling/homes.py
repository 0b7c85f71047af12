"""Where conversations were computed last, whether or not their blocks are still there.

Caches forget what this remembers. A conversation that comes back late finds its blocks evicted everywhere; sent to just
any worker it would leave blocks in two places, and the first worker's eviction policy, which learns from what comes
back too late as well, would never hear that it came back at all.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from pdserve.block_keys import KEY_BYTES

MAX_KEYS = 131_072
"""Remembered, some 150 bytes each. A conversation has as many as the number of its blocks has binary digits."""


class Home(NamedTuple):
    """The worker, and how much of the prompt it had computed, at least."""

    worker_id: str
    num_tokens: int


NOWHERE = Home("", 0)


class Homes:
    """By the keys at depths 1, 2, 4, 8, ... of a prompt's chain. The next turn has the same ones, so a look-up costs
    the logarithm of a prompt and finds at least half of what the conversation had."""

    def __init__(self, block_tokens: int, max_keys: int = MAX_KEYS) -> None:
        self._block_tokens = block_tokens
        self._max_keys = max_keys
        self._workers: OrderedDict[bytes, str] = OrderedDict()

    def moved(self, keys: bytes, worker_id: str) -> None:
        """The prompt with these packed block keys is computed there."""
        workers = self._workers
        for depth in _depths(keys):
            key = _key(keys, depth)
            workers[key] = worker_id
            workers.move_to_end(key)
        while len(workers) > self._max_keys:
            workers.popitem(last=False)

    def find(self, keys: bytes) -> Home:
        """`NOWHERE` if nothing of the prompt is remembered."""
        for depth in reversed(_depths(keys)):
            worker_id = self._workers.get(_key(keys, depth))
            if worker_id is not None:
                return Home(worker_id, depth * self._block_tokens)
        return NOWHERE


def _depths(keys: bytes) -> list[int]:
    return [1 << power for power in range((len(keys) // KEY_BYTES).bit_length())]


def _key(keys: bytes, depth: int) -> bytes:
    return keys[(depth - 1) * KEY_BYTES : depth * KEY_BYTES]
