"""Plain hand-over memory inside one process: for engines that stand alone, and for tests.

Workers use `kvstore.transports.shm.SharedMemoryPool`, which other processes can map.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class LocalMemory:
    """A `pdserve.engine.base.KVMemory` over ordinary arrays."""

    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        self._blocks = np.zeros((num_blocks, block_bytes), dtype=np.uint8)
        self._generations = np.zeros(num_blocks, dtype=np.uint64)

    @property
    def blocks(self) -> NDArray[np.uint8]:
        return self._blocks

    @property
    def generations(self) -> NDArray[np.uint64]:
        return self._generations
