"""The disk tier: blocks that left DRAM and are worth a read, in a folder of segment files.

The node's store demotes into it and promotes from it; the index hears of its content through the observer. It is a
cache that survives restarts, so that its one promise is: a block is served as it was stored, or not at all. Every read
checks the record's digests. Whatever else goes wrong (a full or read-only disk, a folder that vanished, a torn or
altered file) costs blocks, has a typed error and a metric, and heals by itself once the cause is gone.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock

from kvstore.disk.buffers import Buffer, aligned, view
from kvstore.disk.catalog import Catalog
from kvstore.disk.events import DiskHealth, DiskObserver, DiskState, DiskStats, Gone, Silent
from kvstore.disk.folder import Folder
from kvstore.disk.footer import footer_bytes
from kvstore.disk.health import Health
from kvstore.disk.options import DiskOptions
from kvstore.disk.pool import IoPool
from kvstore.disk.record import Record, RecordInvalid, check_id
from kvstore.disk.recovery import Found, newest, recover
from kvstore.disk.segment import Segment, Transfer, runs
from kvstore.disk.writer import Item, MayLeave, Writer
from kvstore.eviction.base import EvictionPolicy
from kvstore.eviction.lru import LruPolicy
from kvstore.types import BlockId
from pdserve.errors import ConfigError, DiskBlockCorrupt, DiskError

log = logging.getLogger(__name__)

CALLS = 2
"""Requests that `submit_get` and `submit_put` run at a time; each uses all I/O threads."""


@dataclass(frozen=True, slots=True)
class Reads:
    """What a `get_many` brought, in the caller's order."""

    found: tuple[bool, ...]
    """Whether the block is in its buffer, whole and checked. The buffers of the others hold nothing of use."""
    errors: tuple[DiskError, ...]
    """One for each block that was here and could not be served; it was dropped. A plain miss is no error."""


def _always(block: BlockId) -> bool:
    return True


class DiskTier:
    """All methods may be called from any thread; those that do I/O block it.

    Opening never fails for what the folder contains: a folder that cannot be used leaves the tier OFF, with the reason
    in `health`. Raises `ConfigError` when another process has the folder or the path is no folder.
    """

    def __init__(
        self,
        folder: str | Path,
        options: DiskOptions,
        *,
        policy: Callable[[], EvictionPolicy] = LruPolicy,
        may_leave: MayLeave = _always,
        observer: DiskObserver | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`policy` makes an empty one (again after the tier was off); `may_leave` says false for a pinned block."""
        self.path = Path(folder)
        self.options = options
        self._make_policy = policy
        self._may_leave = may_leave
        self._observer: DiskObserver = observer or Silent()
        self._catalog = Catalog(policy(), self._observer, clock)
        self._health = Health(self._observer, clock, options.retry_s)
        self._pool = IoPool(options.threads)
        self._calls = ThreadPoolExecutor(CALLS, thread_name_prefix="kv-disk-call")
        self._write_lock = Lock()
        self._folder: Folder | None = None
        self._writer: Writer | None = None
        self._closed = False
        try:
            self._attach()
        except OSError as error:
            self._fail(error)

    def __len__(self) -> int:
        return len(self._catalog)

    def __contains__(self, block: BlockId) -> bool:
        return self._catalog.find(block) is not None

    def ids(self) -> list[BlockId]:
        """Every block that can be read."""
        return self._catalog.ids()

    @property
    def health(self) -> DiskHealth:
        return self._health.now

    @property
    def ready(self) -> bool:
        """Whether a put would be tried now. A tier that is not ON gets well by a put, once `retry_s` has passed: so
        ask this before a demotion, not `health`."""
        return not self._closed and self._health.ready

    def stats(self) -> DiskStats:
        with self._catalog.lock:
            segments = list(self._catalog.segments.values())
            return DiskStats(
                blocks=len(self._catalog),
                live_bytes=sum(segment.live_bytes for segment in segments),
                file_bytes=sum(segment.end + footer_bytes(len(segment.records)) for segment in segments),
                capacity_bytes=self.options.capacity_bytes,
                segments=len(segments),
                health=self._health.now,
            )

    # -- reading ---------------------------------------------------------------------------------------------------

    def get_many(self, ids: Sequence[BlockId], into: Sequence[Buffer]) -> Reads:
        """Read one request's blocks into its buffers, each as long as its block. A wrong fingerprint is a miss.

        Raises `ValueError` for buffers that do not fit, before anything is read.
        """
        targets = [view(buffer) for buffer in into]
        taken = self._catalog.take(ids)
        if not taken:
            return Reads((False,) * len(ids), ())
        began = time.perf_counter()
        try:
            wanted = _transfers(ids, targets, {block: record for block, (record, _) in taken.items()})
            segments = {segment.number: segment for _, segment in taken.values()}
            jobs = [partial(self._read, segments[run[0].record.segment], run) for run in runs(wanted)]
            outcomes = [outcome for part in self._pool.run(jobs) for outcome in part]
        finally:
            for _, segment in taken.values():
                self._catalog.release(segment)
        reads = _reads(len(ids), outcomes)
        self._catalog.touch([block for block, found in zip(ids, reads.found, strict=True) if found])
        nbytes = sum(len(target) for target, found in zip(targets, reads.found, strict=True) if found)
        self._observer.moved("read", nbytes, time.perf_counter() - began)
        return reads

    def get(self, block: BlockId, into: Buffer) -> bool:
        """Read one block; False when it is not here. Raises `DiskBlockCorrupt` when it was lost."""
        reads = self.get_many([block], [into])
        if reads.errors:
            raise reads.errors[0]
        return reads.found[0]

    def submit_get(self, ids: Sequence[BlockId], into: Sequence[Buffer]) -> Future[Reads]:
        """`get_many` in another thread. The buffers belong to the tier until the future is done."""
        return self._calls.submit(self.get_many, ids, into)

    def _read(self, segment: Segment, run: list[Transfer]) -> list[tuple[int, bool, DiskError | None]]:
        """Of each block of a run: its index, whether it was read, and what went wrong."""
        verdicts = segment.read(run)
        return [
            (t.index, invalid is None, None if invalid is None else self._corrupt(t.record, invalid))
            for t, invalid in zip(run, verdicts, strict=True)
        ]

    def _corrupt(self, record: Record, invalid: RecordInvalid) -> DiskError | None:
        """Drop a record that failed its check. None when the block had left meanwhile: its header was erased."""
        if not self._catalog.drop(record, Gone.CORRUPT):
            return None
        self._observer.corrupt(record.id, invalid.reason)
        self._erase(record)
        return DiskBlockCorrupt(
            f"block {record.id.key.hex()} on disk failed its check ({invalid.reason}): recompute it"
        )

    # -- writing ---------------------------------------------------------------------------------------------------

    def put_many(self, ids: Sequence[BlockId], buffers: Sequence[Buffer], *, extends: bool = False) -> int:
        """Store one request's blocks, first of its prefix first; those that are here are not written again.

        Returns how many were written. `extends`: the request put or got earlier blocks of this chain before. Raises
        `DiskFull`, `DiskReadOnly` or `DiskError`; blocks written until then stay. Raises `ValueError` for an id or a
        block that no record can hold.
        """
        items = [Item(block, view(buffer)) for block, buffer in zip(ids, buffers, strict=True)]
        for item in items:
            self._check(item)
        with self._write_lock:
            with self._catalog.lock:
                self._gate()
            try:
                stored = self._attach().put(items, extends=extends)
            except OSError as error:
                raise self._fail(error) from error
            except ConfigError as error:  # the folder vanished, and came back in other hands
                raise self._fail(OSError(errno.EBUSY, error.message)) from error
            with self._catalog.lock:
                self._catalog.touch(ids, extends=extends or stored > 0)
                if stored:
                    self._health.well()
            return stored

    def put(self, block: BlockId, data: Buffer) -> bool:
        """Store one block; False when it is here already. Raises as `put_many`."""
        return self.put_many([block], [data]) == 1

    def submit_put(self, ids: Sequence[BlockId], buffers: Sequence[Buffer], *, extends: bool = False) -> Future[int]:
        """`put_many` in another thread. The buffers must not change until the future is done."""
        return self._calls.submit(self.put_many, ids, buffers, extends=extends)

    def remove(self, block: BlockId) -> bool:
        """Drop a block for good: a restart does not bring it back, on a disk that takes writes. False: not here."""
        while (record := self._catalog.find(block)) is not None:
            if self._catalog.drop(record, Gone.REMOVED):
                self._erase(record)
                return True
        return False

    def _check(self, item: Item) -> None:
        check_id(item.id)
        if not 0 < len(item.data) <= self.options.block_bytes:
            raise ValueError(f"a block of {len(item.data)} bytes: this tier takes 1 to {self.options.block_bytes}")

    def _erase(self, record: Record) -> None:
        writer = self._writer
        if writer is not None:
            writer.erase(record)

    # -- opening, closing, failing ---------------------------------------------------------------------------------

    def _gate(self) -> None:
        if self._closed:
            raise DiskError("the disk tier is closed")
        self._health.gate()

    def _attach(self) -> Writer:
        """The writer of an opened folder, opening it when need be. Raises `OSError`, or `ConfigError` at the start."""
        if self._writer is not None and self._folder is not None:
            self._folder.check()
            return self._writer
        folder = Folder(self.path)
        try:
            self._writer = self._load(folder)
        except OSError:
            self._catalog.clear(self._make_policy())
            folder.close()
            raise
        self._folder = folder
        with self._catalog.lock:
            self._health.well()
        return self._writer

    def _load(self, folder: Folder) -> Writer:
        numbers = folder.numbers()
        found = recover(folder, direct=self.options.direct, corrupt=self._observer.corrupt)
        records = newest(found)
        last = max((record.sequence for record in records.values()), default=0)
        writer = Writer(
            folder,
            self._catalog,
            self._pool,
            self.options,
            self._observer,
            self._may_leave,
            (max(numbers, default=0) + 1, last + 1),
        )
        with self._catalog.lock:
            self._catalog.segments.update((part.segment.number, part.segment) for part in found)
            for part in found:
                live = [record for record in part.live if records[record.id] == record]
                self._catalog.publish(live)
                self._catalog.touch([record.id for record in live])
        for part in found:
            self._tidy(part, folder, writer, records)
        return writer

    def _tidy(self, part: Found, folder: Folder, writer: Writer, records: dict[BlockId, Record]) -> None:
        """Void what is doubled, seal what was left open, delete what holds nothing; a read-only disk is left as is."""
        segment = part.segment
        if not segment.writable:
            return
        try:
            for record in part.live:
                if records[record.id] != record:
                    writer.erase(record)
            if not segment.live_bytes:
                self._catalog.retire(segment)
                folder.unlink(segment.number)
            elif segment.tail is None:
                writer.seal(segment)
        except OSError as error:
            log.warning("segment %d could not be tidied (%s)", segment.number, error.strerror)

    def _fail(self, error: OSError) -> DiskError:
        with self._catalog.lock:
            typed = self._health.fail(error)
        if self._health.now.state is DiskState.OFF:
            self._detach()
        return typed

    def _detach(self) -> None:
        self._catalog.clear(self._make_policy())
        self._writer = None
        if self._folder is not None:
            self._folder.close()
            self._folder = None

    def close(self) -> None:
        """Seal the open segment and give the folder back. Calls in flight end first; later ones find nothing."""
        self._calls.shutdown(wait=True)
        with self._write_lock:
            if self._closed:
                return
            self._closed = True
            try:
                if self._writer is not None:
                    self._writer.close()
            except OSError as error:
                log.warning("the open segment could not be sealed (%s): the next start scans it", error.strerror)
            self._detach()
        self._pool.close()

    # -- care ------------------------------------------------------------------------------------------------------

    def verify(self) -> tuple[DiskError, ...]:
        """Read every block; those that fail are dropped. For when the node is idle, and for `pdserve kv verify`."""
        lost: list[DiskError] = []
        for block in self.ids():
            record = self._catalog.find(block)
            if record is not None:
                lost += self._checked(record)
        return tuple(lost)

    def _checked(self, record: Record) -> list[DiskError]:
        segment = self._catalog.hold(record)
        if segment is None:
            return []
        try:
            memory = aligned(record.length)[: record.length]
            return [error for _, _, error in self._read(segment, [Transfer(record, memory)]) if error is not None]
        finally:
            self._catalog.release(segment)

    def check_integrity(self) -> None:
        """The books agree with themselves. Linear; raises `IntegrityError`."""
        self._catalog.check_integrity()


def _transfers(ids: Sequence[BlockId], targets: Sequence[memoryview], records: dict[BlockId, Record]) -> list[Transfer]:
    wanted = []
    for index, (block, target) in enumerate(zip(ids, targets, strict=True)):
        record = records.get(block)
        if record is None:
            continue
        if target.readonly or len(target) != record.length:
            raise ValueError(f"block {index} has {record.length} bytes: its buffer must be writable and as long")
        wanted.append(Transfer(record, target, index))
    return wanted


def _reads(count: int, outcomes: Sequence[tuple[int, bool, DiskError | None]]) -> Reads:
    found = {index for index, whole, _ in outcomes if whole}
    errors = tuple(error for _, _, error in outcomes if error is not None)
    return Reads(tuple(index in found for index in range(count)), errors)
