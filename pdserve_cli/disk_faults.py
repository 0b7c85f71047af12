"""Bit rot on purpose: flips bytes of every Nth block in a disk tier's segment files, behind the store's back."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kvstore.disk.folder import SUFFIX
from kvstore.disk.record import PAGE, Record, RecordInvalid, decode_header


@dataclass(slots=True)
class Rot:
    """Strikes as often as it is told, and no record twice: a bit that flips back would be no fault."""

    every: int
    rng: random.Random
    struck: set[tuple[Path, int, int]] = field(default_factory=set)
    """File, offset and sequence of each record that was corrupted."""

    def strike(self, folder: Path) -> int:
        """Flip a bit in the payload of every `every`-th live record, beginning with a random one; returns how many.

        The store may run meanwhile: that is how a disk does it, too.
        """
        number = self.rng.randrange(self.every)
        before = len(self.struck)
        for path in sorted(folder.rglob("*" + SUFFIX)):
            for record in live_records(path):
                name = (path, record.offset, record.sequence)
                if number % self.every == 0 and name not in self.struck:
                    flip_bit(path, record.offset + PAGE + self.rng.randrange(record.length), self.rng)
                    self.struck.add(name)
                number += 1
        return len(self.struck) - before


def live_records(path: Path) -> Iterator[Record]:
    """The records of one segment file whose headers are whole and not erased."""
    number = int(path.stem, 16)
    data = memoryview(path.read_bytes())
    offset = 0
    while offset + PAGE <= len(data):
        record, live = _record_at(number, offset, data)
        if record is None:
            offset += PAGE
            continue
        if live:
            yield record
        offset = record.end


def _record_at(number: int, offset: int, data: memoryview) -> tuple[Record | None, bool]:
    """The record whose header stands here, if one does, and whether it is live."""
    try:
        header = decode_header(data[offset : offset + PAGE])
    except RecordInvalid:
        return None, False
    record = header.record
    here = (record.segment, record.offset) == (number, offset) and record.length and record.end <= len(data)
    return (record, header.live) if here else (None, False)


def flip_bit(path: Path, offset: int, rng: random.Random) -> None:
    """One bit of the byte at `offset`."""
    fd = os.open(path, os.O_RDWR)
    try:
        os.pwrite(fd, bytes([os.pread(fd, 1, offset)[0] ^ (1 << rng.randrange(8))]), offset)
    finally:
        os.close(fd)
