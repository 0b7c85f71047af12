"""Memory of our own that a library moves bytes to and from, where it cannot promise to have stopped.

Mooncake on tcp has no way to cancel: a read that timed out may still arrive when the peer wakes up, minutes later. Had
it gone straight into a KV block, it would overwrite whoever owns that block by then. So it lands here and is copied;
a place whose transfer failed that way is never used again. The copy runs at 5 to 14 GB/s, the library at 1 to 2.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvstore.transports.base import Range
from pdserve.errors import PeerLost, TransferTimeout

PLACES = 2
"""Transfers at a time; the others wait. On two cores more did not pay."""
MAX_ABANDONED = 8
"""After so many transfers that never ended the library is not trusted any more: 256 MB are out of use by then."""


class Registrar(Protocol):
    def register(self, address: int, nbytes: int) -> None: ...

    def deregister(self, address: int, nbytes: int) -> None: ...


class Place:
    """One piece of registered memory, used by one transfer at a time."""

    def __init__(self, nbytes: int) -> None:
        self.memory = np.frombuffer(mmap.mmap(-1, nbytes), dtype=np.uint8)
        self.address: int = self.memory.ctypes.data

    def pack(self, lengths: Sequence[int]) -> list[int]:
        """Addresses for pieces of these lengths, one behind the other."""
        ends = accumulate(lengths)
        return [self.address + end - length for end, length in zip(ends, lengths, strict=True)]

    def fill(self, batch: Sequence[Range], source: NDArray[np.uint8]) -> None:
        """Copy the local side of `batch` here."""
        at = 0
        for r in batch:
            self.memory[at : at + r.length] = source[r.local : r.local + r.length]
            at += r.length

    def empty(self, batch: Sequence[Range], into: NDArray[np.uint8]) -> None:
        """The other way."""
        at = 0
        for r in batch:
            into[r.local : r.local + r.length] = self.memory[at : at + r.length]
            at += r.length


class Landing:
    """A few places, made when they are first needed."""

    def __init__(self, library: Registrar, nbytes: int) -> None:
        self._library, self._nbytes = library, nbytes
        self._free: list[Place] = []
        self._made: list[Place] = []
        self._abandoned = 0
        self._changed = threading.Condition()

    @contextmanager
    def take(self) -> Iterator[Place]:
        """Waits for a free place. Raises `PeerLost` when too many were lost."""
        place = self._next()
        try:
            yield place
        except TransferTimeout:
            with self._changed:
                self._abandoned += 1
                self._changed.notify_all()
            raise
        except BaseException:
            self._put_back(place)
            raise
        self._put_back(place)

    def _next(self) -> Place:
        with self._changed:
            while True:
                if self._free:
                    return self._free.pop()
                if self._abandoned >= MAX_ABANDONED:
                    raise PeerLost(f"{self._abandoned} transfers never ended: this transport is not used any more")
                if len(self._made) - self._abandoned < PLACES:
                    return self._make()
                self._changed.wait()

    def _make(self) -> Place:
        place = Place(self._nbytes)
        self._library.register(place.address, self._nbytes)
        self._made.append(place)
        return place

    def _put_back(self, place: Place) -> None:
        with self._changed:
            self._free.append(place)
            self._changed.notify()

    def close(self) -> None:
        """Nobody uses a place any more."""
        for place in self._made:
            self._library.deregister(place.address, self._nbytes)
        self._made.clear()
        self._free.clear()
