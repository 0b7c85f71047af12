"""How far each transfer is: a few words of shared memory between the engine and vLLM's worker processes.

A transfer (one prompt saved, or loaded) owns a slot from its start to its end. Each worker rank writes only its own
row: tokens moved so far, then how it ended. The engine polls: no message can be lost, doubled or come late, and a
crash on either side leaves nothing to clean up, because the memory is an anonymous file that vanishes with the last
process that holds it. A slot ends exactly once a rank; only then may the engine give it, and the staging blocks
that the transfer touched, to someone else.
"""

from __future__ import annotations

import mmap
import os
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class Ending(IntEnum):
    """How a rank's part of a transfer ended."""

    RUNNING = 0
    DONE = 1
    """All tokens moved."""
    DROPPED = 2
    """vLLM ended the request before all was moved."""
    STALE = 3
    """A load found a staging block that had been given to someone else."""
    CORRUPT = 4
    """A load found a staging block whose bytes are not those that were committed."""


class TransferBoard:
    """Words [rank, slot, (progress, ending)], u64. `create` on the engine's side, `attach` on the workers'."""

    def __init__(self, fd: int, num_ranks: int, num_slots: int) -> None:
        self._fd = fd
        self.num_ranks, self.num_slots = num_ranks, num_slots
        memory = mmap.mmap(fd, num_ranks * num_slots * 16)
        words: NDArray[np.uint64] = np.frombuffer(memory, dtype=np.uint64)
        self._words = words.reshape(num_ranks, num_slots, 2)

    @classmethod
    def create(cls, num_ranks: int, num_slots: int) -> TransferBoard:
        fd = os.memfd_create("pdserve-transfers")
        os.ftruncate(fd, num_ranks * num_slots * 16)
        return cls(fd, num_ranks, num_slots)

    @classmethod
    def attach(cls, path: str, num_ranks: int, num_slots: int) -> TransferBoard:
        """Raises `OSError` when the engine's process is gone."""
        return cls(os.open(path, os.O_RDWR | os.O_CLOEXEC), num_ranks, num_slots)

    @property
    def path(self) -> str:
        """Where other processes of this user and PID namespace find it."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def start(self, slot: int) -> None:
        """The engine gives the slot to a new transfer."""
        self._words[:, slot] = 0

    def advance(self, rank: int, slot: int, num_tokens: int) -> None:
        self._words[rank, slot, 0] = num_tokens

    def end(self, rank: int, slot: int, ending: Ending) -> None:
        self._words[rank, slot, 1] = ending

    def end_all(self, slot: int) -> None:
        """The engine ends a transfer that never reached vLLM."""
        self._words[:, slot, 1] = Ending.DROPPED

    def num_tokens(self, slot: int) -> int:
        """Tokens that every rank has moved."""
        return int(self._words[:, slot, 0].min())

    def ended(self, slot: int) -> bool:
        """Whether no rank touches the transfer's blocks any more."""
        return bool(self._words[:, slot, 1].all())

    def ending(self, slot: int) -> Ending:
        """The worst ending of any rank."""
        return Ending(int(self._words[:, slot, 1].max()))

    def close(self) -> None:
        """The numbers stay readable for their holders; the file goes when the last process lets go. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
