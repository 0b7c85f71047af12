"""The record: how one block stands in a segment file, and how a reader knows that it is whole.

A record is a header page and the block's bytes, padded to whole pages, so that O_DIRECT can read and write both. The
header says what the block is and where the record should stand: a page that was copied, moved or left over from an
older file is not taken for a record. Its own digest covers it, and it holds the payload's. A record counts only when
both digests agree; a write that was cut off anywhere fails one of them. That is why nothing is fsynced per block.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import xxhash

from kvstore.types import KEY_BYTES, BlockId

PAGE = 4096
"""Alignment of records and payloads: what O_DIRECT wants of any disk in use (logical blocks of 512 or 4096)."""
MAX_FINGERPRINT_BYTES = 64
VERSION = 1
"""Of the records and the footer. A segment of another version is not read."""
DIGEST_BYTES = 16

_LIVE, _ERASED = b"pdkvrec\n", b"pdkvdel\n"
_PREFIX = struct.Struct("<8sHHIQQQQ16s64s")
_HEADER = struct.Struct(_PREFIX.format + "16s")
HEADER_BYTES = _HEADER.size + DIGEST_BYTES
ZEROS = bytes(PAGE)


class RecordInvalid(ValueError):
    """A page that is no header, or a record whose bytes are not those written. `reason` is one word, for a metric."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def padded(nbytes: int) -> int:
    """`nbytes` rounded up to whole pages."""
    return -(-nbytes // PAGE) * PAGE


def record_bytes(length: int) -> int:
    """What a block of `length` bytes takes on disk."""
    return PAGE + padded(length)


@dataclass(frozen=True, slots=True)
class Record:
    """Where a block stands on disk. Of two records of a block, the one with the higher sequence counts."""

    id: BlockId
    segment: int
    offset: int
    """Of the header page, in the segment file; the payload follows it."""
    length: int
    """Of the payload, in bytes, without padding."""
    sequence: int

    @property
    def nbytes(self) -> int:
        return record_bytes(self.length)

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


def digest(data: bytes | memoryview) -> bytes:
    """xxh3-128, about 16 GB/s: it finds accidents, not forgery."""
    found: bytes = xxhash.xxh3_128_digest(data)
    return found


@dataclass(frozen=True, slots=True)
class Header:
    """A header page, read."""

    record: Record
    payload_digest: bytes
    live: bool
    """False once the block left: such a header is written over the first one, so that no restart brings it back."""


def encode_header(record: Record, payload_digest: bytes, *, live: bool = True) -> bytes:
    """The header without its padding: `HEADER_BYTES` long."""
    body = _HEADER.pack(
        _LIVE if live else _ERASED,
        VERSION,
        len(record.id.fingerprint),
        0,
        record.segment,
        record.offset,
        record.sequence,
        record.length,
        record.id.key,
        record.id.fingerprint,
        payload_digest,
    )
    return body + digest(body)


def decode_header(page: memoryview) -> Header:
    """What a header page says. Raises `RecordInvalid`."""
    body = page[: _HEADER.size]
    fields = _HEADER.unpack(body)
    magic, version, fingerprint_bytes, _, segment, offset, sequence, length, key, fingerprint, payload_digest = fields
    if magic not in (_LIVE, _ERASED):
        raise RecordInvalid("no_header")
    if digest(body) != bytes(page[_HEADER.size : HEADER_BYTES]):
        raise RecordInvalid("header_digest")
    if version != VERSION:
        raise RecordInvalid("version")
    record = Record(BlockId(key, fingerprint[:fingerprint_bytes]), segment, offset, length, sequence)
    return Header(record, payload_digest, magic == _LIVE)


def verify(record: Record, page: memoryview, payload_digest: bytes) -> None:
    """Raises `RecordInvalid` unless `page` is the header of exactly this record, and the digest its payload's."""
    header = decode_header(page)
    if header.record != record:
        raise RecordInvalid("other_record")
    if not header.live:
        raise RecordInvalid("erased")
    if payload_digest != header.payload_digest:
        raise RecordInvalid("payload_digest")


def check_id(block: BlockId) -> None:
    """Raises `ValueError` for an id that no record can hold."""
    if len(block.key) != KEY_BYTES:
        raise ValueError(f"a block key has {KEY_BYTES} bytes, not {len(block.key)}")
    if len(block.fingerprint) > MAX_FINGERPRINT_BYTES:
        raise ValueError(f"a fingerprint has at most {MAX_FINGERPRINT_BYTES} bytes, not {len(block.fingerprint)}")
