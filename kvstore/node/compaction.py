"""Makes long free runs out of many short ones, so that later requests lie in few runs.

Unread blocks move from the pool's end into holes further down, when the node is idle and free space is in pieces. A
block only ever moves down, so this ends by itself. A reader without a lease is fenced off as by any reuse.
"""

from __future__ import annotations

import numpy as np

from kvstore.node.dram import DramStore
from kvstore.node.entries import Entry
from kvstore.node.slots import runs_of


def compact(store: DramStore, max_blocks: int) -> int:
    """Move up to `max_blocks`, neighbours together; returns how many moved. One copy each."""
    moved = 0
    while moved < max_blocks and 2 * store.slots.largest_run < store.slots.free:
        step = _move_last_run(store, max_blocks - moved)
        if not step:
            break
        moved += step
    return moved


def _move_last_run(store: DramStore, limit: int) -> int:
    """The last blocks that nobody reads, as many of them as lie side by side and fit one hole."""
    movable = {entry.slot: entry for entry in store.entries.values() if not entry.leases}
    for start, length in reversed(runs_of(movable)):
        targets = store.slots.take_below(start, min(length, limit))
        if targets:
            first = start + length - len(targets)
            for slot, target in zip(range(first, start + length), targets, strict=True):
                _move(store, movable[slot], target)
            return len(targets)
    return 0


def _move(store: DramStore, entry: Entry, target: int) -> None:
    pool = store.pool
    pool.generations[target] += np.uint64(1)
    pool.blocks[target] = pool.blocks[entry.slot]
    store.slots.give([entry.slot])
    entry.slot, entry.generation = target, int(pool.generations[target])
    if store.digest(target) != entry.digest:
        store.report_corrupt([entry.name])
