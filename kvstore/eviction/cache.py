"""A pool of block keys under one eviction policy: what hits, what is stored, what has to leave.

The node's store asks this class and moves the bytes that it names; a replay of a trace asks it alone. So a figure
counted in a replay is a figure of the store.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

from kvstore.eviction.base import Allowed, EvictionPolicy, Key, require


class Admission(NamedTuple):
    """What the store does for one request: first drop, then store."""

    stored: list[Key]
    """Newcomers worth their room, first block first."""
    dropped: list[Key]
    """Keys that were resident before and leave now."""


class KeyCache:
    """At most `capacity` resident keys. A block hits only while its whole prefix does."""

    def __init__(self, capacity: int, policy: EvictionPolicy) -> None:
        if capacity < 1:
            raise ValueError(f"a pool of {capacity} blocks holds nothing: give it at least one")
        self.capacity = capacity
        self.policy = policy

    def __len__(self) -> int:
        return len(self.policy)

    def __contains__(self, key: Key) -> bool:
        return key in self.policy

    def match(self, keys: Sequence[Key]) -> int:
        """How many leading blocks of the chain are resident. Changes nothing."""
        return sum(1 for _ in takewhile(self.policy.__contains__, keys))

    def admit(self, keys: Sequence[Key], now: float, allowed: Allowed, *, extends: bool = False) -> Admission:
        """One request used this chain (`EvictionPolicy.access`), and the store would like to hold all of it.

        Newcomers compete with what is there: one that the policy would evict first is not stored at all. So a pool
        in which nothing is `allowed` to leave stores nothing, and the capacity holds whatever is pinned.
        """
        newcomers = {key for key in keys if key not in self.policy}
        self.policy.access(keys, now, extends=extends)
        victims = self.shrink(self.capacity, now, lambda key: key in newcomers or allowed(key))
        dropped = [key for key in victims if key not in newcomers]
        newcomers.difference_update(victims)
        return Admission([key for key in keys if key in newcomers], dropped)

    def shrink(self, target: int, now: float, allowed: Allowed) -> list[Key]:
        """Evicts until at most `target` keys are resident, or none is allowed to leave; returns the victims."""
        victims: list[Key] = []
        while len(self.policy) > target:
            victim = self.policy.evict(now, allowed)
            if victim is None:
                break
            victims.append(victim)
        return victims

    def request(self, keys: Sequence[Key], now: float) -> int:
        """One whole request while nothing is leased: returns its hits and admits its chain."""
        hits = self.match(keys)
        self.admit(keys, now, _anything)
        return hits

    def check_integrity(self) -> None:
        """Raises `IntegrityError`."""
        require(len(self.policy) <= self.capacity, f"{len(self.policy)} keys in a pool of {self.capacity}")
        self.policy.check_integrity()


def _anything(key: Key) -> bool:
    return True
