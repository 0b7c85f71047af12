"""The default policy: evict what earns the fewest hits per block-second, as learnt from this very load.

Who comes back, and when, differs by what a block is: the tail of a conversation's first turn, the tail of its fifth,
a system prompt that hundreds share. Each is a *kind* here; `ReuseTable` learns each kind's hazard of reuse by age, and
from it what a block of that kind and age is worth. `Groups` keeps the blocks queued by kind and age, so a victim is
the tail of the oldest group in the least valuable queue that is not empty. With no history that is LRU.

Hot path. A pool in which nothing may leave costs a scan a victim; all else is amortised O(1).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from kvstore.eviction.base import Allowed, Key, require
from kvstore.eviction.groups import MIN_GHOSTS, Group, Groups
from kvstore.eviction.reuse import BINS, ReuseTable, bin_of

_TURNS = 8
"""Kinds for blocks of one conversation: by its turn, the last kind for all later ones."""
_GAP_EDGES_S = (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0)
_GAPS = len(_GAP_EDGES_S) + 1
_USES = 4
"""Kinds for shared blocks: by mean time between uses, and by 2-3, 4-7, 8-15 or more uses."""
_SHARED = _GAPS * _USES
_LEFT = _TURNS + _SHARED
"""The kind of what a chain left behind when it turned off."""
_KINDS = _LEFT + 1
_FAMILIES = (_TURNS, _SHARED, 1)
_GAP_WEIGHT = 0.15
"""Of the latest gap in the moving mean, once there are seven."""
_GOES_ON_S = 30.0
"""A request tells of its next blocks within this time; whoever comes back to a chain mostly takes longer. So others,
who told of no more than a prefix that all share, are not taken for it."""
_MAX_ENDS = 4096
"""Requests that may still go on: chains are told of chunk by chunk, hits first, then what was computed."""
_RECOMPUTE_S = 20.0
_RECOMPUTE_MIN_KEYS = 4096
_RECOMPUTE_SHARE = 8
"""The ranking is remade after so many seconds, or after an eighth of the pool was used."""


class HazardPolicy:
    """Learnt reuse hazards. Measured at 1M keys in chains of 20: 75 bytes a resident key, some 100 a ghost, beside
    the key itself; single-key chains cost 510. Some 2 MB besides."""

    def __init__(self, min_ghosts: int = MIN_GHOSTS) -> None:
        """Remembers `min_ghosts` evicted keys, or one for every two resident ones if that is more."""
        self._groups = Groups(_KINDS, min_ghosts)
        self._reuse = ReuseTable(_FAMILIES)
        self._num_told = 0
        self._ends: OrderedDict[Key, tuple[float, int]] = OrderedDict()
        """Last keys of chains that were told of lately, the latest last, and when by number."""
        self._now = float("-inf")
        self._ranked_s = 0.0
        """When the ranking was made; at the first call, the time of that."""
        self._keys_left = _RECOMPUTE_MIN_KEYS
        """Uses until the ranking is remade."""
        self._rank: list[list[int]] = []
        self._order: list[tuple[int, int]] = []
        """(kind, age bin), the least valuable first; `_rank` is its inverse."""
        self._cursor = 0
        """No queue before this place in the order has a key to give."""
        self._sort()

    def access(self, keys: Sequence[Key], now: float, *, extends: bool = False) -> None:
        now = self._advance(now)
        num_used = self._num_used(keys) if extends else 0
        cover = self._groups.cover(keys, now, num_used)
        for group in cover.left:
            if group.keys:
                self._move(group, _LEFT, group.age_bin)
        turn = cover.groups[-1].depth if cover.groups else 0
        place = len(keys)
        for group in reversed(cover.groups):
            place -= len(group)
            self._touch(group, turn, now, num_new=min(place + len(group) - num_used, len(group)))
        if keys:
            self._remember_end(keys)
        self._keys_left -= len(keys) - num_used
        self._rank_again_if_due(now)

    def evict(self, now: float, allowed: Allowed) -> Key | None:
        self._rank_again_if_due(self._advance(now))
        victim = self._next_victim(allowed)
        if victim is None and self._put_back():
            victim = self._next_victim(allowed)
        return victim

    def forget(self, key: Key) -> None:
        """A victim stays a ghost: whoever evicts it may tell of its leaving once more."""
        if key in self:
            self._groups.forget(key)

    def __contains__(self, key: Key) -> bool:
        return key in self._groups.resident

    def __len__(self) -> int:
        return len(self._groups.resident)

    def check_integrity(self) -> None:
        self._groups.check_integrity()
        live = self._groups.waiting()
        require(all(self._rank[k][b] >= self._cursor for k, b in live), "the cursor has passed a queue that waits")

    def _advance(self, now: float) -> float:
        if self._now == float("-inf"):
            self._ranked_s = now
        self._now = max(now, self._now)
        return self._now

    def _num_used(self, keys: Sequence[Key]) -> int:
        """How much of the chain this request has used already: up to the end of what it told of before. Of the ends on
        the chain that is the deepest of late: others end where the chains part, earlier turns ended long ago."""
        ends, since = self._ends, self._now - _GOES_ON_S
        known = [(ends[key], place) for place, key in enumerate(keys, 1) if key in ends]
        if not known:
            return 0
        young = [place for (told_s, _), place in known if told_s >= since]
        num_used = max(young) if young else max(known)[1]
        del ends[keys[num_used - 1]]
        return num_used

    def _remember_end(self, keys: Sequence[Key]) -> None:
        """The request may go on after this key."""
        self._num_told += 1
        self._ends[keys[-1]] = self._now, self._num_told
        self._ends.move_to_end(keys[-1])
        if len(self._ends) > _MAX_ENDS:
            self._ends.popitem(last=False)

    def _touch(self, group: Group, turn: int, now: float, *, num_new: int) -> None:
        """`num_new`: keys that the request has not used before; the others only go on being used. Tails come first, so
        that of blocks that wait in one queue the heads leave last: a tail is worth nothing without its head."""
        self._groups.revive(group)
        if num_new < len(group):
            if num_new > 0:
                self._reuse.grew(len(group), num_new)
            group.touched_s = now
            self._move(group, _kind(group, turn), 0)
            return
        if group.uses:
            self._book_reuse(group, now)
        self._reuse.came(len(group))
        group.uses += 1
        group.touched_s = now
        self._move(group, _kind(group, turn), 0)

    def _book_reuse(self, group: Group, now: float) -> None:
        """Books the age at which the group is used again."""
        age_s, blocks = now - group.touched_s, len(group)
        last = bin_of(age_s)
        self._reuse.passed(group.kind, group.age_bin, last, blocks)
        self._reuse.stayed(group.kind, last, blocks, age_s)
        self._reuse.reused(group.kind, last, blocks)
        group.gap_s += (age_s - group.gap_s) * max(_GAP_WEIGHT, 1 / group.uses)

    def _move(self, group: Group, kind: int, age_bin: int) -> None:
        self._groups.move(group, kind, age_bin)
        if group.keys:
            self._cursor = min(self._cursor, self._rank[kind][age_bin])

    def _next_victim(self, allowed: Allowed) -> Key | None:
        while self._cursor < len(self._order):
            victim = self._groups.take(*self._order[self._cursor], allowed)
            if victim is not None:
                return victim
            self._cursor += 1
        return None

    def _put_back(self) -> bool:
        """Whether any group that had been set aside waits again."""
        self._cursor = 0
        return self._groups.release()

    def _rank_again_if_due(self, now: float) -> None:
        if now - self._ranked_s < _RECOMPUTE_S and self._keys_left > 0:
            return
        self._groups.release()
        self._groups.grow_older(now, self._reuse.passed)
        self._reuse.fade(now - self._ranked_s)
        self._ranked_s = now
        self._keys_left = max(_RECOMPUTE_MIN_KEYS, len(self) // _RECOMPUTE_SHARE)
        self._sort()

    def _sort(self) -> None:
        places = np.argsort(self._reuse.values(), axis=None, kind="stable")
        self._order = [divmod(place, BINS) for place in places.tolist()]
        ranks = np.empty(places.size, dtype=np.int64)
        ranks[places] = np.arange(places.size)
        self._rank = ranks.reshape(_KINDS, BINS).tolist()
        self._cursor = 0


def _kind(group: Group, turn: int) -> int:
    """A block used once by each turn since its own belongs to one conversation; one used more often is shared."""
    if group.uses <= turn - group.depth + 1:
        return min(turn, _TURNS - 1)
    often = min(max(group.uses.bit_length() - 2, 0), _USES - 1)
    return _TURNS + bisect_right(_GAP_EDGES_S, group.gap_s) * _USES + often
