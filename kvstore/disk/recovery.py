"""What a start finds: every segment file, read by its footer or, when that is missing or wrong, record by record.

A footer is missing when the process died with the segment open; then records may be torn, so that a scan checks each
payload too. Bytes that are no record (a torn write, a hole, an erased header, bit flips, zeros) are stepped over page
by page until the next header that names its own place. Nothing here raises for what a file contains.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from kvstore.disk.buffers import aligned
from kvstore.disk.folder import Folder
from kvstore.disk.footer import decode_entries, decode_tail
from kvstore.disk.record import PAGE, ZEROS, Header, Record, RecordInvalid, decode_header
from kvstore.disk.segment import Segment, Transfer
from kvstore.types import BlockId

log = logging.getLogger(__name__)

SCAN_BYTES = 64 << 10
"""Read at a time in search of headers: mostly one page of it is looked at before the scan jumps to the next record."""

Corrupt = Callable[[BlockId | None, str], None]


@dataclass(slots=True)
class Found:
    """What one segment file holds."""

    segment: Segment
    live: list[Record] = field(default_factory=list)
    """In order of place."""
    foreign: bool = False
    """Written by another version: not read."""


def recover(folder: Folder, *, direct: bool, corrupt: Corrupt) -> list[Found]:
    """Every segment of the folder that can be read, oldest first. Raises `OSError` when the folder cannot be."""
    found = []
    for number in folder.numbers():
        try:
            found.append(_open(folder, number, direct=direct, corrupt=corrupt))
        except OSError as error:
            log.warning("segment %d cannot be read (%s): left alone", number, error.strerror)
            corrupt(None, "unreadable")
    return found


def _open(folder: Folder, number: int, *, direct: bool, corrupt: Corrupt) -> Found:
    segment = Segment(folder, number, direct=direct)
    try:
        return _recover_one(segment, corrupt)
    except OSError:
        segment.close()
        raise


def newest(found: list[Found]) -> dict[BlockId, Record]:
    """Of each block the record with the highest sequence, in order of sequence."""
    records = sorted((r for segment in found for r in segment.live), key=lambda r: r.sequence)
    return {record.id: record for record in records}


def _recover_one(segment: Segment, corrupt: Corrupt) -> Found:
    found = Found(segment)
    try:
        _from_footer(found)
    except RecordInvalid as invalid:
        if invalid.reason == "version":
            found.foreign = True
            corrupt(None, "version")
            return found
        if invalid.reason not in ("no_footer", "truncated"):
            corrupt(None, invalid.reason)
        _scan(found, corrupt)
    return found


def _from_footer(found: Found) -> None:
    segment, size = found.segment, found.segment.file_bytes
    if size < PAGE:
        raise RecordInvalid("no_footer")
    tail = decode_tail(segment.number, segment.read_at(PAGE, size - PAGE), size)
    entries = decode_entries(segment.number, tail, segment.read_at(size - PAGE - tail.offset, tail.offset))
    for record, live in entries:
        segment.place(record)
        if live:
            found.live.append(record)
    segment.end, segment.tail = tail.offset, tail


def _scan(found: Found, corrupt: Corrupt) -> None:
    segment, size = found.segment, found.segment.file_bytes
    for header in _headers(segment, size, corrupt):
        record = header.record
        if not header.live:
            continue
        reason = _problem(segment, record, size)
        if reason is None:
            segment.place(record)
            found.live.append(record)
        else:
            corrupt(record.id, reason)


def _problem(segment: Segment, record: Record, size: int) -> str | None:
    if record.end > size:
        return "truncated"
    [invalid] = segment.read([Transfer(record, aligned(record.length)[: record.length])])
    return invalid.reason if invalid else None


def _headers(segment: Segment, size: int, corrupt: Corrupt) -> Iterator[Header]:
    """The headers that stand at the place they name; what lies between records is told once a stretch."""
    offset, junk = 0, False
    while offset + PAGE <= size:
        start = offset
        chunk = memoryview(segment.read_at(SCAN_BYTES, start))
        if len(chunk) < PAGE:
            return
        while offset + PAGE <= start + len(chunk):
            page = chunk[offset - start :][:PAGE]
            header = _header_at(segment.number, offset, page)
            if header is not None:
                junk = False
                yield header
                offset = header.record.end
                continue
            if not junk and page != ZEROS:
                junk = True
                corrupt(None, "no_header")
            offset += PAGE


def _header_at(number: int, offset: int, page: memoryview) -> Header | None:
    try:
        header = decode_header(page)
    except RecordInvalid:
        return None
    record = header.record
    return header if (record.segment, record.offset) == (number, offset) and record.length else None
