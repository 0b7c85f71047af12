"""The life of one chunk of a prompt's KV, the same six states on both sides of a hand-over.

    reserved -> computing -> exported -> pulling -> owned -> freed

Exporter: blocks are set aside; being computed; final and announced; a decode worker may be reading them; that worker
has its copy; our hold is over. Importer: nothing is known yet; prefill computes it; its manifest is here; being
read; committed; no longer this ledger's. Any state may end in `freed`: that is what cancels and timeouts do. A
request's state is derived from its chunks, never stored.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum


class ChunkState(IntEnum):
    RESERVED = 0
    COMPUTING = 1
    EXPORTED = 2
    PULLING = 3
    OWNED = 4
    FREED = 5


def _allowed(old: ChunkState, new: ChunkState) -> bool:
    """One step on, or the end."""
    return old is not ChunkState.FREED and (new == old + 1 or new is ChunkState.FREED)


class Chunk:
    """One chunk's state. A transition that the life above doesn't have raises `RuntimeError`: a bug, not an event."""

    __slots__ = ("index", "state")

    def __init__(self, index: int) -> None:
        self.index = index
        self.state = ChunkState.RESERVED

    def to(self, new: ChunkState) -> None:
        if not _allowed(self.state, new):
            raise RuntimeError(f"chunk {self.index} cannot go from {self.state.name} to {new.name}")
        self.state = new


def request_state(chunks: Iterable[Chunk]) -> ChunkState:
    """The least advanced chunk tells how far the request is; one without chunks has only reserved."""
    return min((chunk.state for chunk in chunks), default=ChunkState.RESERVED)
