"""How far each transfer is: a few words of shared memory between the engine and vLLM's worker processes.

A transfer (one prompt loaded, one request saved) owns a slot from its start to its end. Each worker rank writes only
its own row: tokens moved so far, then how it ended. The engine polls: no message can be lost, doubled or come late, and
a crash on either side leaves nothing to clean up, because the memory is an anonymous file that vanishes with the last
process that holds it. A slot ends exactly once a rank; only then may the engine give it, and the staging blocks
that the transfer touched, to someone else.

The other way go *grants*: staging blocks for what a request generates, whose number nobody knows before. The engine
writes each transfer's into a ring, and no more of them at once than the ring holds. Last, one line of text: why vLLM's
side refuses to serve, which otherwise dies with the process that knows it.
"""

from __future__ import annotations

import mmap
import os
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

RING = 8
"""Grants of a transfer that may lie unused."""
_REFUSAL_BYTES = 512


class Ending(IntEnum):
    """How a rank's part of a transfer ended."""

    RUNNING = 0
    DONE = 1
    """All tokens moved."""
    DROPPED = 2
    """vLLM ended the request before all was moved; every save of what is generated ends so."""
    STALE = 3
    """A load found a staging block that had been given to someone else."""
    CORRUPT = 4
    """A load found a staging block whose bytes are not those that were committed."""


class TransferBoard:
    """Words [rank, slot, (progress, ending)] and [slot, (number of grants, ring of blocks)], u64. `create` on the
    engine's side, `attach` on the workers'."""

    def __init__(self, fd: int, num_ranks: int, num_slots: int) -> None:
        self._fd = fd
        self.num_ranks, self.num_slots = num_ranks, num_slots
        self._memory = mmap.mmap(fd, _size(num_ranks, num_slots))
        count = num_ranks * num_slots * 2
        words: NDArray[np.uint64] = np.frombuffer(self._memory, dtype=np.uint64, offset=_REFUSAL_BYTES)
        self._words = words[:count].reshape(num_ranks, num_slots, 2)
        self._grants = words[count:].reshape(num_slots, 1 + RING)

    @classmethod
    def create(cls, num_ranks: int, num_slots: int) -> TransferBoard:
        fd = os.memfd_create("pdserve-transfers")
        os.ftruncate(fd, _size(num_ranks, num_slots))
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
        self._grants[slot, 0] = 0

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

    def num_tokens_of(self, slots: list[int]) -> list[int]:
        """`num_tokens` of many slots."""
        moved: list[int] = self._words[:, slots, 0].min(axis=0).tolist()
        return moved

    def ended(self, slot: int) -> bool:
        """Whether no rank touches the transfer's blocks any more."""
        return bool(self._words[:, slot, 1].all())

    def ending(self, slot: int) -> Ending:
        """The worst ending of any rank."""
        return Ending(int(self._words[:, slot, 1].max()))

    def grant(self, slot: int, block: int) -> None:
        """The engine's: one more block for this transfer. The block is written before the count that shows it."""
        number = int(self._grants[slot, 0])
        self._grants[slot, 1 + number % RING] = block
        self._grants[slot, 0] = number + 1

    def granted(self, slot: int, known: int) -> list[int]:
        """A rank's: what was granted beyond the first `known`."""
        count = int(self._grants[slot, 0])
        return [int(self._grants[slot, 1 + number % RING]) for number in range(known, count)]

    @property
    def refusal(self) -> str:
        """Why vLLM's side does not serve; empty: it does."""
        return self._memory[:_REFUSAL_BYTES].rstrip(b"\0").decode(errors="replace")

    def refuse(self, reason: str) -> None:
        text = reason.encode()[:_REFUSAL_BYTES]
        self._memory[: len(text)] = text

    def close(self) -> None:
        """The numbers stay readable for their holders; the file goes when the last process lets go. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _size(num_ranks: int, num_slots: int) -> int:
    return _REFUSAL_BYTES + 8 * (num_ranks * num_slots * 2 + num_slots * (1 + RING))
