"""The store checks itself: its books when idle, its bytes a few blocks at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING

from kvstore.eviction.base import require
from kvstore.node.entries import Name

if TYPE_CHECKING:
    from kvstore.node.dram import DramStore


def check_pool(store: DramStore) -> None:
    """Every slot has one owner, every count is what it counts. Raises `IntegrityError`."""
    store.slots.check_integrity()
    store.cache.check_integrity()
    _check_slots(store)
    _check_holds(store)
    for name, entry in store.entries.items():
        require(name == entry.name and not entry.dropped, f"slot {entry.slot} is listed under another name")
        leaving = entry.slot in store.demoting
        require(leaving or name in store.cache, f"the policy does not know the block in slot {entry.slot}")
        generation = int(store.pool.generations[entry.slot])
        require(generation == entry.generation, f"slot {entry.slot} was given away under its block")
    known = sum(name in store.cache for name in store.entries)
    known += sum(len(reservation.names) for reservation in store.reservations if not reservation.lapsed)
    require(known == len(store.cache), f"the policy holds {len(store.cache)} keys, {known} of them are here")


def _check_slots(store: DramStore) -> None:
    owners = Counter(entry.slot for entry in store.entries.values())
    owners.update(list(store.dropped))
    owners.update(slot for reservation in store.reservations for slot in reservation.slots)
    twice = [slot for slot, count in owners.items() if count > 1 or store.slots.is_free(slot)]
    require(not twice, f"slots with two owners: {twice[:5]}")
    require(len(owners) + store.slots.free == store.slots.count, "a slot is neither free nor anyone's")


def _check_holds(store: DramStore) -> None:
    held: Counter[str] = Counter(entry.tenant for entry in (*store.entries.values(), *store.dropped.values()))
    for reservation in store.reservations:
        held[reservation.tenant] += len(reservation.slots)
    store.tenants.check_integrity(held)
    leases: Counter[int] = Counter(entry.slot for lease in store.leases for entry in lease.entries)
    leases.update(list(store.demoting))
    for entry in (*store.entries.values(), *store.dropped.values()):
        require(
            entry.leases == leases[entry.slot], f"slot {entry.slot}: {entry.leases} holds, {leases[entry.slot]} known"
        )
        require(not entry.dropped or entry.leases > 0, f"slot {entry.slot} is dropped, unread and not freed")


class Scrubber:
    """Compares blocks with their digests, round and round; a wrong one is dropped before anyone reads it."""

    def __init__(self, store: DramStore) -> None:
        self._store = store
        self._pending: list[Name] = []

    def verify(self, names: Iterable[Name]) -> tuple[int, list[Name]]:
        """(blocks compared, those that were wrong and are dropped). Reads their bytes: about 16 GB/s."""
        entries = [entry for name in names if (entry := self._store.entries.get(name))]
        wrong = [entry.name for entry in entries if self._store.digest(entry.slot) != entry.digest]
        self._store.report_corrupt(wrong)
        return len(entries), wrong

    def step(self, blocks: int) -> tuple[int, list[Name]]:
        """`verify` the next `blocks`."""
        if not self._pending:
            self._pending = list(self._store.entries)
        batch = list(islice(reversed(self._pending), blocks))
        del self._pending[len(self._pending) - len(batch) :]
        return self.verify(batch)
