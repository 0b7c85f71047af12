"""Memory that O_DIRECT accepts: page-aligned, in whole pages.

A caller's buffer that is so already (a block of a shared-memory pool) is read into and written from directly; any
other goes through an aligned copy.
"""

from __future__ import annotations

import mmap
from typing import TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from kvstore.disk.record import PAGE, padded

Buffer: TypeAlias = bytes | bytearray | memoryview | mmap.mmap | NDArray[np.uint8]
"""A block's bytes: contiguous; writable where it is read into."""


def view(buffer: Buffer) -> memoryview:
    """`buffer` as flat bytes, without a copy. Raises `ValueError` or `TypeError` when it is not contiguous."""
    return memoryview(cast(bytes, buffer)).cast("B")


def aligned(nbytes: int) -> memoryview:
    """Fresh zeroed memory, page-aligned, rounded up to whole pages (one at least)."""
    return memoryview(mmap.mmap(-1, max(padded(nbytes), PAGE)))


def is_aligned(data: memoryview) -> bool:
    """Whether O_DIRECT can use `data` as it stands."""
    if len(data) % PAGE or not len(data):
        return False
    address: int = np.frombuffer(data, np.uint8).__array_interface__["data"][0]  # a third of `.ctypes.data`'s time
    return address % PAGE == 0
