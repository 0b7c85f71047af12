"""One segment: a file of records, and what is known of it in memory.

Appended to by one writer until it is full, then sealed by its footer; read by any thread at any time. No record is
ever overwritten by another one: a reader that holds the segment (`readers`) reads the bytes of the record it asked
for, or a header that was erased because the block left. The file goes as a whole, once nobody reads it.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import xxhash

from kvstore.disk.buffers import aligned, is_aligned
from kvstore.disk.folder import Folder
from kvstore.disk.footer import DEAD, Tail, encode_footer
from kvstore.disk.record import (
    DIGEST_BYTES,
    HEADER_BYTES,
    PAGE,
    ZEROS,
    Record,
    RecordInvalid,
    digest,
    encode_header,
    padded,
    verify,
)

log = logging.getLogger(__name__)

RUN_BYTES = 1 << 20
"""Of a run, the neighbouring records that one system call moves: large enough to hide the call, small enough that a
request keeps all threads busy to its end, some hashing while others wait for the disk."""
RUN_RECORDS = 128
"""Three buffers each (header, payload, padding), and the kernel takes 1024 a call (IOV_MAX)."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """One record and the memory that its payload goes to or comes from, `record.length` bytes."""

    record: Record
    data: memoryview
    index: int = 0
    """Of the block in the caller's request."""


def runs(transfers: Sequence[Transfer]) -> Iterator[list[Transfer]]:
    """Groups of records that are neighbours on disk, in order of place."""
    run: list[Transfer] = []
    size = 0
    for transfer in sorted(transfers, key=lambda t: (t.record.segment, t.record.offset)):
        record = transfer.record
        fits = size + record.nbytes <= RUN_BYTES and len(run) < RUN_RECORDS
        if run and not (fits and run[-1].record.segment == record.segment and run[-1].record.end == record.offset):
            yield run
            run, size = [], 0
        run.append(transfer)
        size += record.nbytes
    if run:
        yield run


class Segment:
    """An open segment file. Every method that does I/O raises `OSError`, but `read`."""

    def __init__(self, folder: Folder, number: int, *, direct: bool, create: bool = False) -> None:
        self.number = number
        self.writable = True
        self.records: list[Record] = []
        """Every record that was placed here, live or not, in order of place."""
        self.end = 0
        """Of the last record: where the next one goes."""
        self.tail: Tail | None = None
        """Set once the footer stands."""
        self.live_bytes = 0
        self.readers = 0
        self.retired = False
        self._plain = self._open(folder, create)
        self._data = self._plain
        if direct:
            try:
                access = os.O_RDWR if self.writable else os.O_RDONLY
                self._data = folder.open(number, access | os.O_DIRECT)
            except OSError:
                os.close(self._plain)
                raise
        self._direct = direct

    def _open(self, folder: Folder, create: bool) -> int:
        if create:
            return folder.open(self.number, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            return folder.open(self.number, os.O_RDWR)
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
            self.writable = False
            return folder.open(self.number, os.O_RDONLY)

    @property
    def file_bytes(self) -> int:
        return os.fstat(self._plain).st_size

    @property
    def live_ratio(self) -> float:
        return self.live_bytes / self.end if self.end else 0.0

    def place(self, record: Record) -> None:
        """Take the room for `record`, which starts at `end`; its bytes follow."""
        self.records.append(record)
        self.end = record.end

    def rewind(self, end: int) -> None:
        """Give back the room behind `end`, after a write there failed."""
        while self.records and self.records[-1].offset >= end:
            self.records.pop()
        self.end = end
        os.ftruncate(self._plain, end)

    # -- records ---------------------------------------------------------------------------------------------------

    def write(self, run: Sequence[Transfer]) -> None:
        """Write neighbouring records, headers and all, with their digests."""
        headers = aligned(PAGE * len(run))
        parts: list[memoryview] = []
        for i, transfer in enumerate(run):
            header = encode_header(transfer.record, digest(transfer.data))
            headers[i * PAGE : i * PAGE + HEADER_BYTES] = header
            parts += [headers[i * PAGE : (i + 1) * PAGE], *self._payload_parts(transfer)]
        _write_all(self._data, parts, run[0].record.offset)

    def _payload_parts(self, transfer: Transfer) -> list[memoryview]:
        room = padded(transfer.record.length)
        if self._direct and not is_aligned(transfer.data):
            copy = aligned(room)
            copy[: transfer.record.length] = transfer.data
            return [copy[:room]]
        padding = room - transfer.record.length
        return [transfer.data, memoryview(ZEROS)[:padding]] if padding else [transfer.data]

    def read(self, run: Sequence[Transfer]) -> list[RecordInvalid | None]:
        """Read neighbouring records into their memory; for each, why it may not be used, or None when it is whole.

        A sector that the disk cannot read costs its own record only. Raises nothing.
        """
        try:
            return self._read_run(run)
        except OSError as error:
            if len(run) > 1:
                return [found for transfer in run for found in self.read([transfer])]
            log.warning("the disk could not read segment %d (%s)", self.number, error.strerror)
            return [RecordInvalid("unreadable")]

    def _read_run(self, run: Sequence[Transfer]) -> list[RecordInvalid | None]:
        """The hot path: one call for the run, straight into the caller's memory when that suits the disk, and a digest
        over what came."""
        first = run[0]
        if first.record.length > RUN_BYTES and (not self._direct or is_aligned(first.data)):
            return [self._read_large(first)]
        headers = _headers()
        spare = headers[PAGE * len(run) :][:PAGE]
        direct = [not self._direct or is_aligned(t.data) for t in run]
        targets = [t.data if plain else aligned(t.record.length) for t, plain in zip(run, direct, strict=True)]
        parts: list[memoryview] = []
        for i, (transfer, target) in enumerate(zip(run, targets, strict=True)):
            room = padded(transfer.record.length)
            parts += [headers[i * PAGE : (i + 1) * PAGE], target[:room]]
            if len(target) < room:
                parts.append(spare[: room - len(target)])
        start = run[0].record.offset
        end = start + os.preadv(self._data, parts, start)
        found: list[RecordInvalid | None] = []
        for i, (transfer, target) in enumerate(zip(run, targets, strict=True)):
            if target is not transfer.data:
                transfer.data[:] = target[: transfer.record.length]
            if transfer.record.end > end:
                found.append(RecordInvalid("truncated"))
            else:
                page = headers[i * PAGE : (i + 1) * PAGE]
                found.append(_judge(transfer.record, page, digest(transfer.data)))
        return found

    def _read_large(self, transfer: Transfer) -> RecordInvalid | None:
        """In pieces, each hashed while other threads' pieces come in. A run of one record, by its size."""
        record, page, hasher = transfer.record, _headers()[:PAGE], xxhash.xxh3_128()
        for at in range(0, record.length, RUN_BYTES):
            piece = transfer.data[at : at + RUN_BYTES]
            head = (
                [] if at else [page]
            )  # comes with the first piece: a call of its own would wait for the disk once more
            wanted = len(piece) + PAGE * len(head)
            if os.preadv(self._data, [*head, piece], record.offset + PAGE * (1 - len(head)) + at) < wanted:
                return RecordInvalid("truncated")
            hasher.update(piece)
        return _judge(record, page, hasher.digest())

    def erase(self, record: Record) -> None:
        """Void a record's state in the footer, and its header: a restart must not find it. In this order, as a start
        believes the footer: dying in between must not leave a block listed that cannot be read."""
        if not self.writable:
            return
        if self.tail is not None:
            os.pwrite(self._plain, DEAD, self.tail.state_offset(self._ordinal(record)))
        header = encode_header(record, bytes(DIGEST_BYTES), live=False)
        os.pwrite(self._plain, header.ljust(PAGE, b"\0"), record.offset)

    def _ordinal(self, record: Record) -> int:
        return bisect_left(self.records, record.offset, key=lambda r: r.offset)

    # -- the whole file --------------------------------------------------------------------------------------------

    def write_footer(self, states: bytes) -> Tail:
        """Write the footer behind the last record; the caller sets `tail`."""
        footer, tail = encode_footer(self.number, self.end, self.records, states)
        os.ftruncate(self._plain, self.end)
        _write_all(self._plain, [memoryview(footer)], self.end)
        return tail

    def read_at(self, nbytes: int, offset: int) -> bytes:
        """Up to `nbytes`, through the page cache; fewer at the end of the file."""
        return os.pread(self._plain, nbytes, offset)

    def sync(self) -> None:
        os.fsync(self._plain)

    def close(self) -> None:
        if self._data != self._plain:
            os.close(self._data)
        os.close(self._plain)


def _judge(record: Record, page: memoryview, payload_digest: bytes) -> RecordInvalid | None:
    try:
        verify(record, page, payload_digest)
    except RecordInvalid as invalid:
        return invalid
    return None


_scratch = threading.local()


def _headers() -> memoryview:
    """A thread's own memory for headers and padding: mapping it anew for each read costs more than a small read."""
    if not hasattr(_scratch, "headers"):
        _scratch.headers = aligned(PAGE * (RUN_RECORDS + 1))
    found: memoryview = _scratch.headers
    return found


def _write_all(fd: int, parts: list[memoryview], offset: int) -> None:
    """Short writes are carried on; a disk that takes no more raises."""
    while parts:
        written = os.pwritev(fd, parts, offset)
        if not written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        offset += written
        while parts and written >= len(parts[0]):
            written -= len(parts.pop(0))
        if written:
            parts[0] = parts[0][written:]
