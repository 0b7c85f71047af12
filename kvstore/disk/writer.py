"""What goes to the disk: appending blocks, sealing full segments, and making room.

The log only grows at its end. Room is made a segment at a time: the one with the smallest live share gives its live
records to the end of the log and goes. Only when every segment is more than half alive does the policy name blocks to
leave. So at most as much is copied as was freed, and blocks that were written together, which mostly leave together,
cost no copy at all.
"""

from __future__ import annotations

import errno
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count

from kvstore.disk.buffers import aligned
from kvstore.disk.catalog import Catalog
from kvstore.disk.events import DiskObserver, Gone
from kvstore.disk.folder import Folder
from kvstore.disk.footer import footer_bytes
from kvstore.disk.health import FULL
from kvstore.disk.options import DiskOptions
from kvstore.disk.pool import IoPool
from kvstore.disk.record import Record, record_bytes
from kvstore.disk.segment import Segment, Transfer, runs
from kvstore.types import BlockId

log = logging.getLogger(__name__)

COMPACT_BELOW = 0.5
"""Live share of a segment from which on it is not worth copying: at 0.5 a byte copied frees a byte."""

MayLeave = Callable[[BlockId], bool]


class Pinned(OSError):
    """There is no room, and no block may leave."""


@dataclass(frozen=True, slots=True)
class Item:
    """A block to be stored."""

    id: BlockId
    data: memoryview


class Writer:
    """Not thread-safe: the tier lets one thread in at a time. Every method raises `OSError`."""

    def __init__(
        self,
        folder: Folder,
        catalog: Catalog,
        pool: IoPool,
        options: DiskOptions,
        observer: DiskObserver,
        may_leave: MayLeave,
        first: tuple[int, int],
    ) -> None:
        self._folder = folder
        self._catalog = catalog
        self._pool = pool
        self._options = options
        self._observer = observer
        self._may_leave = may_leave
        self._active: Segment | None = None
        self._full = False
        """The last put met a full disk."""
        self._number, self._sequence = count(first[0]), count(first[1])

    def put(self, items: Sequence[Item], *, extends: bool) -> int:
        """Store those blocks that are not here; returns how many. What was stored before an error stays."""
        if self._full:
            self._squeeze()
        new = {item.id: item for item in items if self._catalog.find(item.id) is None}
        try:
            self._put(deque(new.values()), extends=extends)
        except OSError as error:
            self._full = error.errno in FULL and not isinstance(error, Pinned)
            raise
        return len(new)

    def _put(self, pending: deque[Item], *, extends: bool) -> None:
        while pending:
            segment = self._room_for(record_bytes(len(pending[0].data)))
            stored = self._write(segment, self._place(segment, pending), extends=extends)
            extends = extends or stored > 0

    def _place(self, segment: Segment, pending: deque[Item]) -> list[Transfer]:
        """As many blocks as the segment has room for."""
        placed = []
        while pending and self._fits(segment, record_bytes(len(pending[0].data))):
            item = pending.popleft()
            placed.append(self._append(segment, item.id, item.data))
        return placed

    def _append(self, segment: Segment, block: BlockId, data: memoryview) -> Transfer:
        record = Record(block, segment.number, segment.end, len(data), next(self._sequence))
        segment.place(record)
        return Transfer(record, data)

    def _write(self, segment: Segment, placed: list[Transfer], *, extends: bool) -> int:
        began = time.perf_counter()
        whole, error = self._write_runs(segment, placed)
        with self._catalog.lock:
            self._catalog.publish(whole)
            self._catalog.touch([record.id for record in whole], extends=extends)
            nbytes = sum(record.length for record in whole)
            self._observer.moved("write", nbytes, time.perf_counter() - began)
        if error is not None:
            raise error
        return len(whole)

    def _write_runs(self, segment: Segment, placed: list[Transfer]) -> tuple[list[Record], OSError | None]:
        """The records up to the first that could not be written, and the error."""
        parts = list(runs(placed))
        errors = self._pool.run([partial(_attempt, segment, run) for run in parts])
        first = next((i for i, error in enumerate(errors) if error is not None), len(parts))
        whole = [transfer.record for run in parts[:first] for transfer in run]
        if first == len(parts):
            return whole, None
        self._undo(segment, whole[-1].end if whole else placed[0].record.offset)
        return whole, errors[first]

    def _undo(self, segment: Segment, end: int) -> None:
        """Give back the room behind `end`, what was written there included, so that a full disk gets its bytes back."""
        try:
            segment.rewind(end)
        except OSError as error:
            log.warning("could not undo a failed write (%s): the next start's scan will", error.strerror)

    # -- segments --------------------------------------------------------------------------------------------------

    def _fits(self, segment: Segment, nbytes: int) -> bool:
        return segment.end + nbytes + footer_bytes(len(segment.records) + 1) <= self._options.segment_size

    def _room_for(self, nbytes: int) -> Segment:
        """A segment that takes a record of `nbytes`, within the capacity."""
        segment = self._open_for(nbytes)
        while not self._within_capacity():
            self._reclaim()
            segment = self._open_for(nbytes)
        return segment

    def _open_for(self, nbytes: int) -> Segment:
        """The active segment, or the next one when that has no room."""
        if self._active is None or not self._fits(self._active, nbytes):
            self._roll()
        assert self._active is not None
        return self._active

    def _roll(self) -> None:
        if self._active is not None:
            self.seal(self._active)
            self._active = None
        segment = Segment(self._folder, next(self._number), direct=self._options.direct, create=True)
        with self._catalog.lock:
            self._catalog.segments[segment.number] = segment
        self._active = segment

    def _sealed(self) -> list[Segment]:
        with self._catalog.lock:
            return [segment for segment in self._catalog.segments.values() if segment is not self._active]

    def _within_capacity(self) -> bool:
        """With the active segment full, and another one begun while this one's successor is made room for."""
        used = sum(segment.end + footer_bytes(len(segment.records)) for segment in self._sealed())
        return used + 2 * self._options.segment_size <= self._options.capacity_bytes

    def seal(self, segment: Segment) -> None:
        """Write the segment's footer. Blocks that leave while it is written are marked afterwards."""
        states = self._catalog.states(segment)
        tail = segment.write_footer(states)
        with self._catalog.lock:
            segment.tail = tail
            now = self._catalog.states(segment)
        for record, before, after in zip(segment.records, states, now, strict=True):
            if before != after:
                segment.erase(record)
        if self._options.fsync_on_seal:
            segment.sync()
            self._folder.sync()

    def close(self) -> None:
        if self._active is not None and self._active.records:
            self.seal(self._active)
        self._active = None

    # -- room ------------------------------------------------------------------------------------------------------

    def _reclaim(self) -> None:
        """One step towards room: a segment goes, or a block does."""
        victim = min(self._sealed(), key=lambda segment: segment.live_ratio)
        if victim.live_ratio <= COMPACT_BELOW:
            self._compact(victim)
            return
        evicted = self._catalog.evict(self._may_leave)
        if evicted is None:
            raise Pinned(errno.ENOSPC, "every block of the tier is pinned")
        self.erase(evicted)

    def _squeeze(self) -> None:
        """The disk has less room than the capacity says: before the next try, a segment makes way with all it holds.
        So a tier lives on within what it has, instead of keeping its oldest blocks for ever."""
        self._full = False
        sealed = [s for s in self._sealed() if all(self._may_leave(r.id) for r in self._catalog.live_records(s))]
        if not sealed:
            return
        victim = min(sealed, key=lambda segment: segment.live_ratio)
        for record in self._catalog.live_records(victim):
            self._catalog.drop(record, Gone.EVICTED)
        self._catalog.retire(victim)
        self._folder.unlink(victim.number)

    def _compact(self, victim: Segment) -> None:
        """Copy what lives to the end of the log, then delete the file. Dying between leaves each block twice: the
        higher sequence counts."""
        began = time.perf_counter()
        live = self._catalog.live_records(victim)
        for run in runs([Transfer(record, aligned(record.length)[: record.length]) for record in live]):
            self._copy(deque(self._checked(run, victim)))
        self._catalog.retire(victim)
        self._folder.unlink(victim.number)
        self._observer.moved("compact", sum(record.length for record in live), time.perf_counter() - began)

    def _checked(self, run: list[Transfer], victim: Segment) -> list[Transfer]:
        """Reads a run; returns what may be copied. A copy gets a digest of its own, so the old one is checked here."""
        good = []
        for transfer, invalid in zip(run, victim.read(run), strict=True):
            record = transfer.record
            if invalid is not None:
                if self._catalog.drop(record, Gone.CORRUPT):
                    self._observer.corrupt(record.id, invalid.reason)
            elif record.length > self._options.block_bytes:  # of an earlier configuration: may fit no segment
                self._catalog.drop(record, Gone.EVICTED)
            else:
                good.append(transfer)
        return good

    def _copy(self, pending: deque[Transfer]) -> None:
        while pending:
            segment = self._open_for(pending[0].record.nbytes)
            pairs: list[tuple[Record, Transfer]] = []
            while pending and self._fits(segment, pending[0].record.nbytes):
                old = pending.popleft()
                pairs.append((old.record, self._append(segment, old.record.id, old.data)))
            self._move(segment, pairs)

    def _move(self, segment: Segment, pairs: list[tuple[Record, Transfer]]) -> None:
        written, error = self._write_runs(segment, [copy for _, copy in pairs])
        whole = set(written)
        for old, copy in pairs:
            if copy.record in whole and not self._catalog.move(old, copy.record):
                self.erase(copy.record)
        if error is not None:
            raise error

    def erase(self, record: Record) -> None:
        """Void a record that left the books; on a disk that refuses, it may come back with the next start."""
        segment = self._catalog.hold(record)
        if segment is None:
            return
        try:
            segment.erase(record)
        except OSError as error:
            log.warning("a block that left could not be erased (%s)", error.strerror)
        finally:
            self._catalog.release(segment)


def _attempt(segment: Segment, run: list[Transfer]) -> OSError | None:
    try:
        segment.write(run)
    except OSError as error:
        return error
    return None
