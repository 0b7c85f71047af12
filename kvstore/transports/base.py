"""One small interface to move bytes between registered memories, whatever the wire.

A transport registers local memory once, learns of peers at any time from the opaque descriptor that the other side
made, and reads or writes batches of (remote offset, local offset, length). Calls block: the caller runs them in a
thread of its own. Offsets count from the start of the region. Errors are `PeerLost` (dead or closed, at once) and
`TransferTimeout` (no progress within the bound); after either the local target's content is undefined.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Range:
    """`length` bytes at `remote` in the peer's region and at `local` in ours."""

    remote: int
    local: int
    length: int


@dataclass(frozen=True, slots=True)
class Region:
    """A registered piece of local memory. `descriptor` is what a peer needs to reach it: give it only to a peer
    whose identity or ticket was checked."""

    region_id: int
    nbytes: int
    descriptor: bytes


PIECE_BYTES = 1 << 20
"""Told of at a time: half of a second-level cache, so that whoever looks at it need not fetch it from memory again."""

Arrived = Callable[[Range], None]


def ignore(piece: Range) -> None:
    """Nobody wants to know."""


def pieces(ranges: Sequence[Range], max_bytes: int = PIECE_BYTES) -> Iterator[Range]:
    """The same bytes in the same order, cut."""
    for r in ranges:
        for done in range(0, r.length, max_bytes):
            yield Range(r.remote + done, r.local + done, min(max_bytes, r.length - done))


class Peer(Protocol):
    """A remote region that can be read and written. Thread-safe; operations on one peer may run side by side."""

    def read(self, ranges: Sequence[Range], into: NDArray[np.uint8], arrived: Arrived = ignore) -> None:
        """Fill the local ranges of `into` (1-D uint8). One call is one batch: few large ranges are best.

        `arrived` is called in this thread, in order, with each piece of each range once it is in place: early where
        the transport can (what it then does overlaps the transfer), at the end where not. What it raises ends the read.
        Raises `PeerLost`, `TransferTimeout`, `ValueError` for a range outside either region."""
        ...

    def write(self, ranges: Sequence[Range], source: NDArray[np.uint8]) -> None:
        """The other way. Returns when the peer's memory holds the bytes."""
        ...

    def close(self) -> None:
        """Idempotent. Operations under way raise `PeerLost`."""
        ...


class Transport(Protocol):
    """A way to move bytes; one instance a process."""

    @property
    def name(self) -> str: ...

    def register(self, memory: NDArray[np.uint8]) -> Region:
        """Make a 1-D uint8 array reachable for peers. It must stay alive until `deregister`."""
        ...

    def deregister(self, region: Region) -> None:
        """Peers can no longer reach it. Idempotent."""
        ...

    def connect(self, descriptor: bytes) -> Peer:
        """Reach a region that another process registered. Raises `PeerLost`."""
        ...

    def close(self) -> None:
        """Deregister everything, stop threads, close peers. Idempotent."""
        ...
