"""Keys that were last used together, kept as one: the hazard policy's books.

A request's chain falls into *groups*: runs of blocks with the same history. A run is split only when a later chain
leaves it half-way, so the groups are the edges of a prefix tree that grows by need, and an untouched run of a
thousand blocks costs what a single block does. Of a group's keys the first ones are resident; the tail, once evicted,
is remembered as ghosts, so that a reuse that comes too late is still seen.

Groups wait in queues by kind and age bin, oldest first. Everything here is O(1) amortised a key or a group.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import chain, islice
from typing import NamedTuple

from kvstore.eviction.base import Allowed, Key, require
from kvstore.eviction.reuse import BINS, EDGES_S, bin_of

MIN_GHOSTS = 65_536
"""Some 10 MB. A small pool turns over faster than people answer: it learns from ghosts alone."""
_GHOSTS_PER_RESIDENT = 0.5


class Group:
    """A run of keys with one history. `keys` are resident, `gone` are ghosts: the chain is keys + reversed(gone)."""

    __slots__ = ("age_bin", "depth", "gap_s", "gone", "held", "keys", "kind", "touched_s", "uses")

    def __init__(self, keys: list[Key], gone: list[Key], depth: int, touched_s: float) -> None:
        self.keys = keys
        self.gone = gone
        self.depth = depth
        """How many groups lie between it and its chain's start at the time it was made: its conversation's turn."""
        self.touched_s = touched_s
        self.uses = 0
        """Requests that used it; 0 only while the first one is being booked."""
        self.gap_s = 0.0
        """Moving mean of the time between uses."""
        self.kind = 0
        self.age_bin = 0
        self.held = False
        """Set aside because none of its keys was allowed to leave."""

    def __len__(self) -> int:
        return len(self.keys) + len(self.gone)

    def chain(self) -> list[Key]:
        return self.keys + self.gone[::-1] if self.gone else self.keys


Queue = OrderedDict[Group, None]


class Cover(NamedTuple):
    """A chain as groups, in order, and the rests of groups that the chain left half-way."""

    groups: list[Group]
    left: list[Group]


class Groups:
    """All groups, findable by key, queued by (kind, age bin)."""

    def __init__(self, kinds: int, min_ghosts: int) -> None:
        self._min_ghosts = min_ghosts
        self.resident: dict[Key, Group] = {}
        self.ghosts: dict[Key, Group] = {}
        self._live: list[list[Queue]] = [[OrderedDict() for _ in range(BINS)] for _ in range(kinds)]
        self._dead: list[list[Queue]] = [[OrderedDict() for _ in range(BINS)] for _ in range(kinds)]
        """Groups without a resident key."""
        self._held: Queue = OrderedDict()
        self._burials: Queue = OrderedDict()
        """The dead again, in order of their death."""

    def cover(self, keys: Sequence[Key], now: float, num_used: int = 0) -> Cover:
        """Groups that hold exactly `keys`, ghosts among them, splitting and making groups as needed.

        What only goes on with what this request made itself (that ends at `num_used`, and has been used once) is of
        one group with it; other new groups lie one deeper than what precedes them.
        """
        groups: list[Group] = []
        left: list[Group] = []
        start = 0
        while start < len(keys):
            group = self.find(keys[start])
            before = groups[-1] if groups else None
            if group is not None:
                group = self._shared(group, keys, start, num_used, left)
            elif before is not None and start == num_used and before.uses == 1 and not before.gone:
                start += self._grow(before, keys, start)
                continue
            else:
                group = self._made(keys, start, now, before, num_used)
            groups.append(group)
            start += len(group)
        return Cover(groups, left)

    def find(self, key: Key) -> Group | None:
        return self.resident.get(key) or self.ghosts.get(key)

    def move(self, group: Group, kind: int, age_bin: int) -> None:
        self._detach(group)
        group.kind, group.age_bin = kind, age_bin
        self._attach(group)

    def revive(self, group: Group) -> None:
        """Its ghosts are resident again."""
        if not group.gone:
            return
        self._detach(group)
        for key in group.gone:
            del self.ghosts[key]
            self.resident[key] = group
        group.keys.extend(reversed(group.gone))
        group.gone = []
        self._attach(group)

    def take(self, kind: int, age_bin: int, allowed: Allowed) -> Key | None:
        """Evicts one key of that queue, oldest group first, tail first; groups that may not lose one are set aside."""
        queue = self._live[kind][age_bin]
        while queue:
            group = next(iter(queue))
            keys = group.keys
            kept = len(keys)
            while kept and not allowed(keys[kept - 1]):
                kept -= 1
            if not kept:
                self._hold(group)
                continue
            if kept < len(keys):
                self._hold(self._split(group, kept))
            return self._bury_last(group)
        return None

    def release(self) -> bool:
        """Puts back what was set aside; whether there was any."""
        released = list(self._held)
        for group in released:
            self._detach(group)
            self._attach(group)
        return bool(released)

    def forget(self, key: Key) -> None:
        """As if `key` had never been seen. A chain costs least from its tail on: no group is split then."""
        group = self.find(key)
        if group is None:
            return
        if len(group.keys) > 1 and not group.gone and group.keys[-1] == key:
            del self.resident[group.keys.pop()]
            return
        group = self._from(group, key)
        if len(group) > 1:
            self._split(group, 1)
        self._drop(group)

    def grow_older(self, now: float, passed: Callable[[int, int, int, int], None]) -> None:
        """Moves groups to the bin of their age; `passed(kind, from, to, blocks)` for those that move.

        Only heads of queues are looked at. Old bins come first, so that each queue stays in order of age.
        """
        for kind, age_bin in ((k, b) for k in range(len(self._live)) for b in reversed(range(BINS - 1))):
            for queues in (self._live[kind], self._dead[kind]):
                queue = queues[age_bin]
                while queue:
                    group = next(iter(queue))
                    age_s = now - group.touched_s
                    if age_s < EDGES_S[age_bin + 1]:
                        break
                    del queue[group]
                    group.age_bin = bin_of(age_s)
                    queues[group.age_bin][group] = None
                    passed(kind, age_bin, group.age_bin, len(group))

    def waiting(self) -> list[tuple[int, int]]:
        """(kind, age bin) of the queues that have a key to give."""
        return [(k, b) for k, queues in enumerate(self._live) for b, queue in enumerate(queues) if queue]

    def check_integrity(self) -> None:
        queues = [*chain.from_iterable(self._live), *chain.from_iterable(self._dead), self._held]
        groups = [group for queue in queues for group in queue]
        require(len(groups) == len(set(groups)), "a group waits in two queues")
        require(all(group in self._queue(group) for group in groups), "a group waits in a wrong queue")
        require(all(len(group) for group in groups), "an empty group")
        require(_owners(groups, "keys") == self.resident, "resident keys and groups disagree")
        require(_owners(groups, "gone") == self.ghosts, "ghosts and groups disagree")
        require(
            {group for group in groups if not group.keys} == set(self._burials), "the dead and their order disagree"
        )
        require(not self.resident.keys() & self.ghosts.keys(), "a ghost is resident")

    def _made(self, keys: Sequence[Key], start: int, now: float, before: Group | None, num_used: int) -> Group:
        end = self._end_of_new(keys, start)
        is_next_turn = before is not None and (start != num_used or before.uses > 1)
        depth = 0 if before is None else before.depth + is_next_turn
        group = Group(list(islice(keys, start, end)), [], depth, now)
        for key in group.keys:
            self.resident[key] = group
        self._attach(group)
        return group

    def _shared(self, group: Group, keys: Sequence[Key], start: int, num_used: int, left: list[Group]) -> Group:
        """The part of the group that the chain has from `start` on, ended at `num_used`; a rest goes into `left`."""
        group = self._from(group, keys[start])
        if start < num_used < start + len(group):
            self._split(group, num_used - start)
        rest = self._cut(group, keys[start : start + len(group)])
        left += [rest] if rest else []
        return group

    def _grow(self, group: Group, keys: Sequence[Key], start: int) -> int:
        """The request that made the group goes on: one run, however many steps it is told in. Returns by how much."""
        more = list(islice(keys, start, self._end_of_new(keys, start)))
        group.keys += more
        for key in more:
            self.resident[key] = group
        return len(more)

    def _end_of_new(self, keys: Sequence[Key], start: int) -> int:
        return next((i for i in range(start + 1, len(keys)) if self.find(keys[i]) is not None), len(keys))

    def _from(self, group: Group, key: Key) -> Group:
        """The part of the group that begins with `key`."""
        place = group.chain().index(key)
        return self._split(group, place) if place else group

    def _cut(self, group: Group, keys: Sequence[Key]) -> Group | None:
        """Cuts from the group what does not follow `keys`; returns the rest."""
        members = group.chain()
        if list(keys) == members:
            return None
        alike = next((i for i, (a, b) in enumerate(zip(members, keys, strict=False)) if a != b), len(keys))
        return self._split(group, alike)

    def _split(self, group: Group, place: int) -> Group:
        """The group keeps its first `place` keys; returns a new one with the others, of the same history."""
        held = group.held
        self._detach(group)
        resident = len(group.keys)
        ghosts_kept = max(0, place - resident)
        cut = len(group.gone) - ghosts_kept
        rest = Group(group.keys[place:], group.gone[:cut], group.depth, group.touched_s)
        group.keys, group.gone = group.keys[:place], group.gone[cut:]
        rest.uses, rest.gap_s, rest.kind, rest.age_bin = group.uses, group.gap_s, group.kind, group.age_bin
        self.resident.update(dict.fromkeys(rest.keys, rest))
        self.ghosts.update(dict.fromkeys(rest.gone, rest))
        for part in (group, rest):
            part.held = held and bool(part.keys)
            self._attach(part)
        return rest

    def _bury_last(self, group: Group) -> Key:
        key = group.keys[-1]
        del self.resident[key]
        self.ghosts[key] = group
        if len(group.keys) == 1:
            self._detach(group)
        group.gone.append(group.keys.pop())
        if not group.keys:
            self._attach(group)
        if len(self.ghosts) > max(self._min_ghosts, _GHOSTS_PER_RESIDENT * len(self.resident)):
            self._forget_ghosts(next(iter(self._burials), group))
        return key

    def _forget_ghosts(self, group: Group) -> None:
        if not group.keys:
            self._drop(group)
            return
        for key in group.gone:
            del self.ghosts[key]
        group.gone = []

    def _drop(self, group: Group) -> None:
        self._detach(group)
        for key in group.keys:
            del self.resident[key]
        for key in group.gone:
            del self.ghosts[key]

    def _hold(self, group: Group) -> None:
        self._detach(group)
        group.held = True
        self._held[group] = None

    def _queue(self, group: Group) -> Queue:
        if group.held:
            return self._held
        return (self._live if group.keys else self._dead)[group.kind][group.age_bin]

    def _attach(self, group: Group) -> None:
        self._queue(group)[group] = None
        if not group.keys:
            self._burials[group] = None

    def _detach(self, group: Group) -> None:
        del self._queue(group)[group]
        group.held = False
        if not group.keys:
            del self._burials[group]


def _owners(groups: list[Group], side: str) -> dict[Key, Group]:
    return {key: group for group in groups for key in getattr(group, side)}
