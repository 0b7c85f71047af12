"""What decides which blocks leave a full pool: the contract of an eviction policy.

A policy knows keys, not bytes: it is told which chains were used and which keys left, and it names the next victim.
The pool (`KeyCache`, and through it the node's store) keeps the bytes, the leases and the quotas. No policy reads a
clock: `now` is any clock in seconds that the caller passes, virtual in a replay; one that steps back reads as
one that stands still.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

Key = bytes
"""A block's key: 16 bytes that name the whole prefix up to and with that block (`pdserve.tokens`)."""

Allowed = Callable[[Key], bool]
"""Whether a resident key may leave now; false while it is leased, pinned or being read."""


class IntegrityError(AssertionError):
    """A policy's own books disagree: a bug, never the caller's fault."""


class EvictionPolicy(Protocol):
    """Names victims. Not thread-safe: the pool that owns it serialises its calls.

    Every call costs O(1) amortised a key, whatever the pool's size; tables that are recomputed now and then are of
    fixed size.
    """

    def access(self, keys: Sequence[Key], now: float, *, extends: bool = False) -> None:
        """One request used this chain of distinct keys, first block first: hits and newly stored ones alike.

        All of them are resident from now on. One call a request. A request that stores in several steps (chunks of
        a prefill, then what decode generated) passes the chain so far with `extends=True` from the second call
        on: that is no reuse, only more of the same.
        """

    def evict(self, now: float, allowed: Allowed) -> Key | None:
        """The next victim, no longer resident; None when there is none that is allowed to leave.

        A refused key is set aside for a while, as if it had just been used: leases are not asked about in each call.
        """

    def forget(self, key: Key) -> None:
        """`key` left for another reason (dropped, corrupt, its tenant deleted). Unknown keys are ignored."""

    def __contains__(self, key: Key) -> bool: ...

    def __len__(self) -> int:
        """Resident keys."""

    def check_integrity(self) -> None:
        """Linear. Raises `IntegrityError` that says what is wrong."""


def require(holds: bool, problem: str) -> None:
    """Raises `IntegrityError(problem)` unless `holds`."""
    if not holds:
        raise IntegrityError(problem)
