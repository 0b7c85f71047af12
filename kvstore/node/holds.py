"""Holds of clients on the pool, and their end: leases of readers, reservations of writers.

Both end by themselves when their client does not come back. A reader that comes late is harmless: generations tell it
that its blocks were reused. A *writer* that comes late is not: it would write into another's block. So slots of a
lapsed reservation stay out of use until the writer says that it has stopped, or is seen to be dead, or, where that
can't be seen, has been silent for very long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import count

from kvstore.node.entries import Entry, Lease, Limits, Name, Reservation
from pdserve.errors import TicketRefused

_NEVER = float("inf")


class Leases:
    """Counts its holds in `Entry.leases`; `freed` is called for each entry that loses its last one."""

    def __init__(self, limits: Limits, freed: Callable[[Entry], None]) -> None:
        self._limits = limits
        self._freed = freed
        self._numbers = count(1)
        self._leases: dict[int, Lease] = {}
        self._earliest = _NEVER
        """No lease ends before: most calls need not look at all of them."""

    def __len__(self) -> int:
        return len(self._leases)

    def __iter__(self) -> Iterator[Lease]:
        return iter(self._leases.values())

    def grant(self, client: str, entries: Iterable[Entry], now: float) -> int:
        lease = Lease(next(self._numbers), client, tuple(entries), now + self._limits.lease_s, now)
        for entry in lease.entries:
            entry.leases += 1
        self._leases[lease.lease_id] = lease
        self._earliest = min(self._earliest, lease.until)
        return lease.lease_id

    def renew(self, lease_id: int, client: str, now: float) -> float:
        """Seconds that it lasts from now. Raises `TicketRefused`."""
        lease = self._leases.get(lease_id)
        if lease is None or lease.client != client:
            raise TicketRefused("the lease has ended or was never yours: look the blocks up again")
        lease.until = min(now + self._limits.lease_s, lease.born + self._limits.max_lease_s)
        self._earliest = min(self._earliest, lease.until)
        return lease.until - now

    def release(self, lease_id: int, client: str) -> None:
        """Idempotent; one that lapsed is ignored."""
        lease = self._leases.get(lease_id)
        if lease is not None and lease.client == client:
            self._end(lease)

    def expire(self, now: float) -> int:
        """End those whose time is up; returns how many."""
        if now < self._earliest:
            return 0
        lapsed = [lease for lease in self._leases.values() if lease.until <= now]
        for lease in lapsed:
            self._end(lease)
        self._earliest = min((lease.until for lease in self._leases.values()), default=_NEVER)
        return len(lapsed)

    def _end(self, lease: Lease) -> None:
        del self._leases[lease.lease_id]
        for entry in lease.entries:
            entry.leases -= 1
            if not entry.leases:
                self._freed(entry)


class Reservations:
    """`freed` is called with a reservation whose slots nobody will write any more; `writer_gone` tells whether a
    client is dead, None when that can't be seen."""

    def __init__(
        self, limits: Limits, freed: Callable[[Reservation], None], writer_gone: Callable[[str], bool | None]
    ) -> None:
        self._limits = limits
        self._freed = freed
        self._writer_gone = writer_gone
        self._numbers = count(1)
        self._open: dict[int, Reservation] = {}
        self._writers: dict[Name, int] = {}
        """Blocks that are being written -> reservation."""

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Reservation]:
        return iter(self._open.values())

    def busy(self, name: Name) -> bool:
        return name in self._writers

    def new_id(self) -> int:
        return next(self._numbers)

    def open(self, reservation: Reservation) -> None:
        self._open[reservation.reservation_id] = reservation
        self._writers |= dict.fromkeys(reservation.names, reservation.reservation_id)

    def known(self, reservation_id: int, client: str) -> Reservation:
        """Raises `TicketRefused`."""
        reservation = self._open.get(reservation_id)
        if reservation is None or reservation.client != client:
            raise TicketRefused("the reservation has ended or was never yours: reserve again")
        return reservation

    def of(self, client: str, reservation_id: int) -> list[Reservation]:
        """This one, or with 0 all, of the client's that have not ended."""
        own = [reservation for reservation in self._open.values() if reservation.client == client]
        return [reservation for reservation in own if reservation_id in (0, reservation.reservation_id)]

    def close(self, reservation: Reservation) -> None:
        """The writer has stopped; what becomes of the slots is the caller's business."""
        del self._open[reservation.reservation_id]
        self._unname(reservation)

    def expire(self, now: float) -> list[Reservation]:
        """Lapse those whose time is up, free the slots of dead writers; returns those that lapsed now."""
        lapsed = []
        for reservation in list(self._open.values()):
            if not reservation.lapsed and reservation.until <= now:
                reservation.lapsed = True
                self._unname(reservation)
                lapsed.append(reservation)
            if reservation.lapsed and self._cannot_write(reservation, now):
                del self._open[reservation.reservation_id]
                self._freed(reservation)
        return lapsed

    def _cannot_write(self, reservation: Reservation, now: float) -> bool:
        gone = self._writer_gone(reservation.client)
        return now >= reservation.until + self._limits.abandoned_s if gone is None else gone

    def _unname(self, reservation: Reservation) -> None:
        """Its blocks may be written by another; a block that another writes already stays that one's."""
        for name in reservation.names:
            if self._writers.get(name) == reservation.reservation_id:
                del self._writers[name]
