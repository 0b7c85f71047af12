"""Bit rot on purpose: flips bytes of every Nth block in a disk tier's segment files, behind the store's back."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

from kvstore.disk.folder import SUFFIX
from kvstore.disk.record import PAGE, Record, RecordInvalid, decode_header


def corrupt_folder(folder: Path, every: int, rng: random.Random) -> int:
    """Flip one byte in the payload of every `every`-th live record, starting at a random one; returns how many.

    The store may run: it is what a disk does to it.
    """
    chosen = rng.randrange(every)
    flipped = 0
    for path in sorted(folder.glob("*" + SUFFIX)):
        with path.open("r+b", buffering=0) as file:
            for record in list(live_records(path)):
                if chosen % every == 0:
                    _flip(file.fileno(), record.offset + PAGE + rng.randrange(record.length), rng)
                    flipped += 1
                chosen += 1
    return flipped


def live_records(path: Path) -> Iterator[Record]:
    """The records of one segment file whose headers are whole and not erased."""
    number = int(path.stem, 16)
    data = memoryview(path.read_bytes())
    offset = 0
    while offset + PAGE <= len(data):
        try:
            header = decode_header(data[offset : offset + PAGE])
        except RecordInvalid:
            offset += PAGE
            continue
        record = header.record
        if (record.segment, record.offset) != (number, offset) or record.end > len(data):
            offset += PAGE
            continue
        if header.live:
            yield record
        offset = record.end


def _flip(fd: int, offset: int, rng: random.Random) -> None:
    byte = os.pread(fd, 1, offset)[0]
    os.pwrite(fd, bytes([byte ^ (1 << rng.randrange(8))]), offset)
