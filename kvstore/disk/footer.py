"""A sealed segment's footer: its table of contents, so that a start reads a few pages a segment and not every header.

The footer stands behind the last record: one entry a record, one state byte a record, padding, and the tail page, the
file's last. The digest covers the entries but not the state bytes: those change in place when a block leaves. A state
byte that lies does no harm: a block taken for dead is a miss, one taken for live has an erased header and fails its
check when read. A footer that does not verify is not used: the segment is then scanned.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.disk.record import DIGEST_BYTES, PAGE, VERSION, Record, RecordInvalid, digest, padded
from kvstore.types import BlockId

_MAGIC = b"pdkvend\n"
_TAIL = struct.Struct("<8sHHIQQ16s")
_ENTRY = struct.Struct("<QQQH16s64s")
LIVE, DEAD = b"\x01", b"\x00"


def footer_bytes(count: int) -> int:
    """What the footer of `count` records takes."""
    return padded(count * (_ENTRY.size + 1)) + PAGE


@dataclass(frozen=True, slots=True)
class Tail:
    """The last page of a sealed segment."""

    count: int
    offset: int
    """Where the entries start: the end of the last record."""
    entries_digest: bytes

    def state_offset(self, ordinal: int) -> int:
        """Where the state byte of the `ordinal`-th record stands."""
        return self.offset + self.count * _ENTRY.size + ordinal


def encode_footer(segment: int, offset: int, records: Sequence[Record], states: bytes) -> tuple[bytes, Tail]:
    """The whole footer, `footer_bytes(len(records))` long."""
    entries = b"".join(
        _ENTRY.pack(r.offset, r.length, r.sequence, len(r.id.fingerprint), r.id.key, r.id.fingerprint) for r in records
    )
    tail = Tail(len(records), offset, digest(entries))
    packed = _TAIL.pack(_MAGIC, VERSION, 0, tail.count, segment, offset, tail.entries_digest)
    table = entries + states
    page = (packed + digest(packed)).ljust(PAGE, b"\0")
    return table.ljust(padded(len(table)), b"\0") + page, tail


def decode_tail(segment: int, page: bytes, file_bytes: int) -> Tail:
    """Raises `RecordInvalid` for a page that is not this segment's tail, or that does not fit the file."""
    if len(page) != PAGE:
        raise RecordInvalid("truncated")
    packed = page[: _TAIL.size]
    magic, version, _, count, number, offset, entries_digest = _TAIL.unpack(packed)
    if magic != _MAGIC:
        raise RecordInvalid("no_footer")
    if digest(packed) != page[_TAIL.size : _TAIL.size + DIGEST_BYTES] or number != segment:
        raise RecordInvalid("footer_digest")
    if version != VERSION:
        raise RecordInvalid("version")
    if offset + footer_bytes(count) != file_bytes:
        raise RecordInvalid("footer_place")
    return Tail(count, offset, entries_digest)


def decode_entries(segment: int, tail: Tail, table: bytes) -> list[tuple[Record, bool]]:
    """Every record, in order of place, and whether it is live. Raises `RecordInvalid`."""
    entries, states = table[: tail.count * _ENTRY.size], table[tail.count * _ENTRY.size :]
    if digest(entries) != tail.entries_digest or len(states) < tail.count:
        raise RecordInvalid("footer_digest")
    found = []
    for ordinal, fields in enumerate(_ENTRY.iter_unpack(entries)):
        offset, length, sequence, fingerprint_bytes, key, fingerprint = fields
        record = Record(BlockId(key, fingerprint[:fingerprint_bytes]), segment, offset, length, sequence)
        found.append((record, states[ordinal : ordinal + 1] == LIVE))
    return found
