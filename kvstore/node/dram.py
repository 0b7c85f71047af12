"""The DRAM pool of one node: which block is where, who may write it, who reads it, and what leaves.

Pure bookkeeping over a pool's memory, time from an injected clock; nothing blocks, one thread owns it. Writers and
readers touch the bytes themselves, in shared memory: a writer reserves slots, fills them and commits, and only then is
a block visible; a reader looks a chain up and holds a lease while it copies. A slot's generation grows *before* it is
given to a new writer, so a reader that outlives its lease finds out.

Every block here is in exactly one place: free slot, reserved (also by a writer that went silent), visible, or dropped
while it is still read. Names are a key and its layout's fingerprint, so bytes of another layout are never found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from math import ceil

import numpy as np
import xxhash

from kvstore.eviction.base import EvictionPolicy
from kvstore.eviction.cache import KeyCache
from kvstore.handover.verify import DigestPolicy
from kvstore.node.entries import Entry, Hit, Limits, Name, Offer, Reservation, Status
from kvstore.node.events import EventLog
from kvstore.node.holds import Leases, Reservations
from kvstore.node.integrity import check_pool
from kvstore.node.slots import SlotAllocator
from kvstore.node.tenants import Tenants
from kvstore.types import KEY_BYTES, EventKind, StoreEvent, Tier
from pdserve.engine.base import KVMemory
from pdserve.errors import DigestMismatch, InvalidRequest, QuotaExceeded, TicketRefused
from pdserve.metrics import KvstoreMetrics

Clock = Callable[[], float]
"""Seconds; never steps back."""
Demote = Callable[[Entry], bool]
"""Takes a victim to a lower tier. True: `demoted` will be called when it is there (or can't be), and the entry holds
its slot until then. False: it is there already, or there is no room for it: it leaves now."""


class DramStore:
    """See the module. `names` is always a chain from its first block on."""

    def __init__(
        self,
        pool: KVMemory,
        policy: EvictionPolicy,
        *,
        clock: Clock,
        metrics: KvstoreMetrics,
        limits: Limits | None = None,
        tenants: Tenants | None = None,
        events: EventLog | None = None,
        demote: Demote | None = None,
        writer_gone: Callable[[str], bool | None] = lambda client: None,
        digest_every: int = 16,
    ) -> None:
        self.pool = pool
        self.limits = limits or Limits()
        self.events = events or EventLog()
        self.slots = SlotAllocator(len(pool.blocks))
        self.tenants = tenants or Tenants(self.limits.default_quota)
        self.leases = Leases(self.limits, self._last_lease_ended)
        self.reservations = Reservations(self.limits, self._free_slots, writer_gone)
        self.entries: dict[Name, Entry] = {}
        self.dropped: dict[int, Entry] = {}
        """By slot: dropped, and still read."""
        self.demoting: dict[int, Entry] = {}
        """By slot: on their way to a lower tier, and visible still."""
        self.cache = KeyCache(self.slots.count, policy)
        self._policy = policy
        self._clock = clock
        self._soft_pins_until = 0.0
        self._metrics = metrics
        self._demote = demote
        self._sample = DigestPolicy(digest_every)
        self._high = ceil(self.limits.high_watermark * self.slots.count)
        self._low = ceil(self.limits.low_watermark * self.slots.count)

    # ---- readers ----

    def lookup(
        self, names: Sequence[Name], client: str, *, lease: bool = True, extends: bool = False, count: bool = True
    ) -> Hit:
        """The longest prefix that is visible, leased to `client`. `extends`: this request was counted as a use of its
        chain before (see `EvictionPolicy.access`). `count`: in the metrics."""
        now = self.expire()
        found: list[Entry] = []
        for name in check_chain(names):
            entry = self.entries.get(name)
            if entry is None:
                break
            found.append(entry)
        if count:
            self._metrics.lookup_blocks.inc(len(names))
            self._metrics.hit_blocks.labels("dram").inc(len(found))
            self._metrics.bytes.labels("dram", "read").inc(len(found) * self.pool.blocks.shape[1])
        if not found:
            return Hit(0)
        self._use(found, now, extends)
        lease_id = self.leases.grant(client, found, now) if lease else 0
        return Hit(
            lease_id,
            tuple(entry.slot for entry in found),
            tuple(entry.generation for entry in found),
            tuple(entry.digest for entry in found),
        )

    def renew(self, lease_id: int, client: str) -> float:
        """Seconds that the lease lasts from now. Raises `TicketRefused` when it has ended."""
        return self.leases.renew(lease_id, client, self.expire())

    def release(self, lease_id: int, client: str) -> None:
        """The blocks will not be read any more. Idempotent."""
        self.leases.release(lease_id, client)

    # ---- writers ----

    def reserve(self, names: Sequence[Name], tenant: str, client: str, *, extends: bool = False) -> Offer:
        """Slots for the blocks of a chain that are not here, first block first, as far as there is room.

        Raises `QuotaExceeded` when the tenant's quota leaves no room for even one.
        """
        now = self.expire()
        taken = self._choose(check_chain(names), tenant, now, extends)
        granted = set(taken)
        statuses = tuple(self._status(name, i in granted) for i, name in enumerate(names))
        if not taken:
            return Offer(0, statuses)
        slots = self._take_slots(names, taken, tenant)
        reservation = Reservation(
            reservation_id=self.reservations.new_id(),
            client=client,
            tenant=tenant,
            names=tuple(names[i] for i in taken),
            slots=slots,
            parents=tuple(names[i - 1][:KEY_BYTES] if i else b"" for i in taken),
            until=now + self.limits.reservation_s,
        )
        self.reservations.open(reservation)
        return Offer(reservation.reservation_id, statuses, slots, tuple(self.pool.generations[list(slots)].tolist()))

    def _choose(self, names: Sequence[Name], tenant: str, now: float, extends: bool) -> list[int]:
        """Which of the missing blocks get a slot: as many as the quota leaves, if the policy thinks them worth it,
        while slots are free. Victims leave now, or as soon as the lower tier has them."""
        missing = [i for i, name in enumerate(names) if self._absent(name)]
        if len(missing) > (room := self._quota_room(len(missing), tenant, frozenset(names), now)):
            names, missing = names[: missing[room]], missing[:room]
        self._admit(names, now, extends)
        here = [entry for name in names if (entry := self.entries.get(name))]
        self.tenants.access(((entry.tenant, entry.name) for entry in here), now)
        worthy = [i for i in missing if names[i] in self._policy]
        for i in reversed(worthy[self.slots.free :]):
            self._policy.forget(names[i])
        return worthy[: self.slots.free]

    def _take_slots(self, names: Sequence[Name], taken: Sequence[int], tenant: str) -> tuple[int, ...]:
        before = self.entries.get(names[taken[0] - 1]) if taken[0] else None
        slots = self.slots.take(len(taken), after=before.slot if before else None)
        self.pool.generations[slots] += np.uint64(1)  # before the first byte of the new owner
        self.tenants.take(tenant, len(slots))
        return tuple(slots)

    def commit(self, reservation_id: int, client: str, digests: Sequence[bytes]) -> int:
        """Make the first `len(digests)` reserved blocks visible and give the others back; returns how many.

        Raises `TicketRefused` (ended, another's), `InvalidRequest`, and `DigestMismatch` when a sample of the bytes is
        not what `digests` says; nothing is visible then.
        """
        now = self.expire()
        reservation = self.reservations.known(reservation_id, client)
        if len(digests) > len(reservation.names):
            raise InvalidRequest(f"{len(digests)} digests for {len(reservation.names)} blocks", param="digests")
        self.reservations.close(reservation)
        if reservation.lapsed:
            self._free_slots(reservation)
            raise TicketRefused("the reservation lapsed before its commit: reserve again")
        if not self._sample_holds(reservation.slots, digests):
            self._give_back(reservation)
            self._metrics.integrity_failures.labels("dram").inc()
            raise DigestMismatch("the bytes in the pool are not those of the digests: write again")
        self._make_visible(reservation, digests, now)
        return len(digests)

    def abort(self, reservation_id: int, client: str) -> None:
        """The writer has stopped and will not commit; 0: none of its reservations. Idempotent."""
        for reservation in self.reservations.of(client, reservation_id):
            self.reservations.close(reservation)
            (self._free_slots if reservation.lapsed else self._give_back)(reservation)

    def _make_visible(self, reservation: Reservation, digests: Sequence[bytes], now: float) -> None:
        slots, names = reservation.slots, reservation.names
        for name, slot, digest, parent in zip(names, slots, digests, reservation.parents, strict=False):
            generation = int(self.pool.generations[slot])
            self.entries[name] = Entry(name, slot, generation, digest, reservation.tenant, parent)
        done = len(digests)
        stored = [self.entries[name] for name in names[:done]]
        self.tenants.access(((entry.tenant, entry.name) for entry in stored), now)
        self._give_back(replace(reservation, names=names[done:], slots=slots[done:]))
        self._metrics.bytes.labels("dram", "write").inc(done * self.pool.blocks.shape[1])
        self._emit(EventKind.STORED, stored)

    # ---- pins, drops ----

    def pin(self, names: Iterable[Name], *, pinned: bool, soft_ttl_s: float = 0.0) -> int:
        """Set or clear the pins of those that are here; returns how many are. Pinned blocks stay; softly pinned ones
        leave last, until `soft_ttl_s` from now."""
        until = self.expire() + soft_ttl_s
        entries = [entry for name in names if (entry := self.entries.get(name))]
        for entry in entries:
            entry.pinned, entry.soft_pin_until = pinned, until
        self._soft_pins_until = max(self._soft_pins_until, until)
        return len(entries)

    def drop(self, names: Iterable[Name], reason: str = "dropped") -> int:
        """Make blocks invisible at once, pinned ones too; returns how many were here. Those that read them finish."""
        self.expire()
        entries = [entry for name in dict.fromkeys(names) if (entry := self.entries.get(name))]
        self._remove(entries, reason)
        return len(entries)

    def report_corrupt(self, names: Sequence[Name]) -> None:
        """Their bytes are not their digests': drop them and count it."""
        self._metrics.integrity_failures.labels("dram").inc(len(names))
        self.drop(names, "corrupt")

    # ---- time ----

    def expire(self) -> float:
        """End leases and reservations whose time is up; returns now."""
        now = self._clock()
        self._metrics.lapsed.labels("lease").inc(self.leases.expire(now))
        lapsed = self.reservations.expire(now)
        self._metrics.lapsed.labels("reservation").inc(len(lapsed))
        for name in (name for reservation in lapsed for name in reversed(reservation.names)):
            self._policy.forget(name)
        return now

    def tick(self) -> None:
        """About once a second: expire; above the high watermark, evict down to the low one."""
        now = self.expire()
        leaving = sum(entry.name not in self._policy for entry in self.demoting.values())
        used = self.slots.count - self.slots.free - leaving
        if used > self._high:
            target = len(self._policy) - (used - self._low)
            self._leave(self.cache.shrink(target, now, lambda name: self._may_go(name, now)), "capacity")

    # ---- eviction ----

    def begin_demotion(self, entry: Entry) -> None:
        """It keeps its slot and stays visible until `demoted`."""
        entry.leases += 1
        self.demoting[entry.slot] = entry

    def demoted(self, entry: Entry) -> None:
        """The lower tier has it, or could not take it. It leaves, unless the policy holds it (again)."""
        del self.demoting[entry.slot]
        entry.leases -= 1
        if entry.dropped:
            self._last_lease_ended(entry)
        elif entry.name in self._policy:
            pass  # used since, or never a victim: it stays
        elif self._may_go(entry.name):
            self._remove([entry], "capacity")
        else:
            self._use([entry], self._clock(), extends=True)

    def _quota_room(self, count: int, tenant: str, own: frozenset[Name], now: float) -> int:
        """How many of `count` more slots `tenant` may have; its own oldest blocks leave for them."""
        short = count - self.tenants.room(tenant, count)
        if short:
            victims = self.tenants.victims(tenant, short, now, lambda n: n not in own and self._may_go(n))
            self._leave(victims, "quota")
        room = self.tenants.room(tenant, count)
        if count and not room:
            self._metrics.quota_refusals.inc()
            quota = self.tenants.quota(tenant)
            raise QuotaExceeded(f"tenant {tenant!r} holds its {quota} blocks, all in use: go on without storing")
        return room

    def _admit(self, names: Sequence[Name], now: float, extends: bool) -> None:
        """Let the policy choose between this chain and what is here; soft pins give way where nothing else does."""
        own = frozenset(names)
        admission = self.cache.admit(names, now, lambda n: n not in own and self._may_go(n, now), extends=extends)
        self._leave(admission.dropped, "capacity")
        if now < self._soft_pins_until and any(name not in self._policy for name in names):
            admission = self.cache.admit(names, now, lambda n: n not in own and self._may_go(n), extends=True)
            self._leave(admission.dropped, "capacity")

    def _leave(self, names: Sequence[Name], reason: str) -> None:
        """Victims: they go to the lower tier first, if there is one."""
        gone = []
        for name in names:
            entry = self.entries[name]
            self._policy.forget(name)
            self.tenants.forget(entry.tenant, name)
            if self._demote is not None and self._demote(entry):
                self.begin_demotion(entry)
            else:
                gone.append(entry)
        self._remove(gone, reason)

    def _may_go(self, name: Name, now: float | None = None) -> bool:
        """Neither being written, nor read, nor pinned; with `now`, nor softly pinned."""
        entry = self.entries.get(name)
        free = entry is not None and not entry.leases and not entry.pinned
        return free and (now is None or entry is None or entry.soft_pin_until <= now)

    # ---- small steps ----

    def _absent(self, name: Name) -> bool:
        return name not in self.entries and not self.reservations.busy(name)

    def _status(self, name: Name, taken: bool) -> Status:
        if taken:
            return Status.RESERVED
        if name in self.entries:
            return Status.EXISTS
        return Status.BUSY if self.reservations.busy(name) else Status.NO_ROOM

    def _use(self, entries: Sequence[Entry], now: float, extends: bool) -> None:
        self._policy.access([entry.name for entry in entries], now, extends=extends)
        self.tenants.access(((entry.tenant, entry.name) for entry in entries), now)

    def _remove(self, entries: Sequence[Entry], reason: str) -> None:
        for entry in reversed(entries):
            del self.entries[entry.name]
            self._policy.forget(entry.name)
            self.tenants.forget(entry.tenant, entry.name)
            entry.dropped = True
            self.dropped[entry.slot] = entry
            self._last_lease_ended(entry)
        self._metrics.evictions.labels("dram", reason).inc(len(entries))
        self._emit(EventKind.REMOVED, entries)

    def _last_lease_ended(self, entry: Entry) -> None:
        if entry.dropped and not entry.leases:
            del self.dropped[entry.slot]
            self.slots.give([entry.slot])
            self.tenants.give(entry.tenant, 1)

    def _give_back(self, reservation: Reservation) -> None:
        for name in reversed(reservation.names):
            self._policy.forget(name)
        self._free_slots(reservation)

    def _free_slots(self, reservation: Reservation) -> None:
        self.slots.give(reservation.slots)
        self.tenants.give(reservation.tenant, len(reservation.slots))

    def _sample_holds(self, slots: Sequence[int], digests: Sequence[bytes]) -> bool:
        return all(self.digest(slots[i]) == digests[i] for i in self._sample.chosen(len(digests)))

    def digest(self, slot: int) -> bytes:
        """xxh3-128 of a slot's bytes as they are."""
        return xxhash.xxh3_128_digest(self.pool.blocks[slot])

    def _emit(self, kind: EventKind, entries: Sequence[Entry]) -> None:
        for event in as_events(kind, entries):
            self.events.emit(kind, Tier.DRAM, *event)

    # ---- what is here ----

    def content(self) -> list[StoreEvent]:
        """Everything visible, as events that would make it so; their sequence is that of the latest real event."""
        return [
            StoreEvent(self.events.sequence, EventKind.STORED, Tier.DRAM, *event)
            for event in as_events(EventKind.STORED, list(self.entries.values()))
        ]

    def check_integrity(self) -> None:
        """Linear in slots. Raises `IntegrityError`."""
        check_pool(self)


def as_events(kind: EventKind, entries: Sequence[Entry]) -> list[tuple[tuple[bytes, ...], bytes, tuple[bytes, ...]]]:
    """(keys, fingerprint, parents) of one event a fingerprint; only STORED tells parents."""
    by_layout: dict[bytes, list[Entry]] = {}
    for entry in entries:
        by_layout.setdefault(entry.fingerprint, []).append(entry)
    stored = kind is EventKind.STORED
    return [
        (tuple(e.key for e in group), fingerprint, tuple(e.parent for e in group) if stored else ())
        for fingerprint, group in by_layout.items()
    ]


def check_chain(names: Sequence[Name]) -> Sequence[Name]:
    """Raises `InvalidRequest` for a chain that names a block twice."""
    if len(set(names)) != len(names):
        raise InvalidRequest("a chain names each of its blocks once", param="keys")
    return names
