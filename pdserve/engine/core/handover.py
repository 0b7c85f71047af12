"""The books of the hand-over: chunks that peers may read, and contexts that arrive from peers.

`Exports` belongs to PREFILL submissions: blocks are held from the step that completes them until the decode worker
owns a copy. `Import` belongs to one DECODE submission: from its reservation until it runs like any other sequence.
Both work in pool blocks and leave it to the area (handover_area.py) where the bytes lie for peers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pdserve.engine.base import ExportedChunk, ImportTarget
from pdserve.engine.core.handover_area import HandoverArea
from pdserve.engine.core.scheduler import Reservation
from pdserve.engine.core.sequences import Group
from pdserve.errors import HandoverError, InvalidRequest


@dataclass(slots=True)
class _PendingExport:
    """Computed and held, but not yet where peers can read it."""

    handle: int
    first_token: int
    num_tokens: int
    pool_blocks: list[int]
    final: bool


class Exports:
    """All chunks of all requests that this engine holds for peers."""

    def __init__(self, area: HandoverArea, block_tokens: int) -> None:
        self._area = area
        self._block_tokens = block_tokens
        self._pending: deque[_PendingExport] = deque()
        self._held: dict[int, dict[int, list[int]]] = {}
        """Area blocks by handle and chunk index."""
        self._num_chunks: dict[int, int] = {}
        self._leaving: int | None = None
        """The request of which a part has left."""

    @property
    def num_blocks(self) -> int:
        return sum(map(len, self._blocks())) + sum(len(pending.pool_blocks) for pending in self._pending)

    @property
    def has_pending(self) -> bool:
        return bool(self._pending)

    def holds(self, handle: int) -> bool:
        return bool(self._held.get(handle)) or any(pending.handle == handle for pending in self._pending)

    def offer(self, handle: int, block_table: Sequence[int], first_token: int, end: int, final: bool) -> None:
        """Tokens [first_token, end) are final: hold their blocks and export them as soon as there is room."""
        first, last = first_token // self._block_tokens, -(-end // self._block_tokens)
        blocks = list(block_table[first:last])
        self._area.pool.acquire(blocks)
        self._pending.append(_PendingExport(handle, first_token, end - first_token, blocks, final))

    def flush(self) -> list[ExportedChunk]:
        """Move pending chunks out while there is room; a large one leaves in parts."""
        chunks = []
        while (pending := self._next()) is not None:
            blocks = self._area.export(pending.pool_blocks)
            if not blocks:
                break
            chunks.append(self._export(pending, blocks))
            if not pending.pool_blocks:
                self._pending.remove(pending)
            self._leaving = None if chunks[-1].final else pending.handle
        return chunks

    def _next(self) -> _PendingExport | None:
        """In order. Through a staging area one request after the other: else a request that has room at its decode
        worker may wait here for the room of one that has none there, and that one for the first."""
        if self._area.staged and self._leaving is not None:
            return next((pending for pending in self._pending if pending.handle == self._leaving), None)
        return self._pending[0] if self._pending else None

    def release(self, handle: int, chunk_index: int | None) -> None:
        """End the hold on one chunk, or on all and on those that have not left yet."""
        if chunk_index is None:
            self.drop(handle)
        else:
            self._area.release(self._held.get(handle, {}).pop(chunk_index, []))

    def drop(self, handle: int) -> None:
        for blocks in self._held.pop(handle, {}).values():
            self._area.release(blocks)
        for pending in [pending for pending in self._pending if pending.handle == handle]:
            self._area.pool.free(pending.pool_blocks)
            self._pending.remove(pending)

    def forget(self, handle: int) -> None:
        """The request is gone and its handle may be used again."""
        self.drop(handle)
        self._num_chunks.pop(handle, None)
        if self._leaving == handle:
            self._leaving = None

    def area_blocks(self) -> Iterator[Sequence[int]]:
        return self._blocks()

    def pool_blocks(self) -> Iterator[Sequence[int]]:
        return (pending.pool_blocks for pending in self._pending)

    def _blocks(self) -> Iterator[list[int]]:
        return (blocks for chunks in self._held.values() for blocks in chunks.values())

    def _export(self, pending: _PendingExport, blocks: list[int]) -> ExportedChunk:
        """The leading `len(blocks)` blocks of a pending chunk, of which the rest stays pending."""
        num_tokens = min(pending.num_tokens, len(blocks) * self._block_tokens)
        index = self._num_chunks.get(pending.handle, 0)
        self._num_chunks[pending.handle] = index + 1
        self._held.setdefault(pending.handle, {})[index] = blocks
        chunk = ExportedChunk(
            handle=pending.handle,
            chunk_index=index,
            first_token=pending.first_token,
            num_tokens=num_tokens,
            blocks=tuple(blocks),
            generations=self._area.generations_of(blocks),
            final=pending.final and num_tokens == pending.num_tokens,
        )
        pending.first_token += num_tokens
        pending.num_tokens -= num_tokens
        del pending.pool_blocks[: len(blocks)]
        return chunk


@dataclass(slots=True)
class _Opened:
    """A chunk that a transfer writes now."""

    target: ImportTarget
    area_blocks: list[int]
    pool_blocks: list[int]


@dataclass(slots=True)
class Import:
    """The context of one DECODE submission on its way in."""

    area: HandoverArea
    reservation: Reservation
    num_tokens: int
    block_tokens: int
    block_table: list[int] = field(default_factory=list)
    num_ready_blocks: int = 0
    """Leading blocks that are here: cached or committed. Others may read them, so nobody writes them again."""
    _committed: set[int] = field(default_factory=set)
    """Indexes of blocks that are here, behind a gap."""
    _opened: dict[tuple[int, int], _Opened] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return bool(self.block_table) and self.num_ready_blocks == len(self.block_table)

    @property
    def num_ready_tokens(self) -> int:
        return min(self.num_ready_blocks * self.block_tokens, self.num_tokens)

    def begin(self, block_table: list[int], num_cached_blocks: int) -> None:
        """The blocks are there, the first of them with their content."""
        self.block_table, self.num_ready_blocks = block_table, num_cached_blocks

    def open(self, first_token: int, num_tokens: int) -> ImportTarget | None:
        """Where to write a chunk, the same place each time it is asked for; None while the area has no room.

        A chunk that overlaps another one takes its place: a retried prefill may cut the context differently.
        """
        known = self._opened.get((first_token, num_tokens))
        if known is not None:
            return known.target
        start, end = self._span(first_token, num_tokens)
        self._abandon_overlapping(first_token, first_token + num_tokens)
        num_cached = max(0, min(self.num_ready_blocks, end) - start)
        cached, missing = self.block_table[start : start + num_cached], self.block_table[start + num_cached : end]
        area_blocks = self.area.open_import(missing)
        if area_blocks is None:
            return None
        target = ImportTarget((*cached, *area_blocks), num_cached)
        self._opened[first_token, num_tokens] = _Opened(target, area_blocks, missing)
        return target

    def commit(self, first_token: int, num_tokens: int) -> None:
        """The chunk has arrived. Saying so twice does no harm."""
        span = self._span(first_token, num_tokens)
        opened = self._opened.pop((first_token, num_tokens), None)
        if opened is not None:
            self.area.commit_import(opened.area_blocks, opened.pool_blocks)
            self._committed.update(range(*span))
        elif not all(index < self.num_ready_blocks or index in self._committed for index in range(*span)):
            raise HandoverError(f"tokens [{first_token}, {first_token + num_tokens}) were committed, but never opened")
        while self.num_ready_blocks in self._committed:
            self._committed.remove(self.num_ready_blocks)
            self.num_ready_blocks += 1

    def abandon(self) -> None:
        """No transfer writes any more."""
        for opened in self._opened.values():
            self.area.abandon_import(opened.area_blocks)
        self._opened.clear()

    def _abandon_overlapping(self, first_token: int, end: int) -> None:
        for start, length in [span for span in self._opened if span[0] < end and first_token < sum(span)]:
            self.area.abandon_import(self._opened.pop((start, length)).area_blocks)

    def area_blocks(self) -> Iterator[Sequence[int]]:
        return (opened.area_blocks for opened in self._opened.values())

    def _span(self, first_token: int, num_tokens: int) -> tuple[int, int]:
        """Block indexes of a chunk. Raises `HandoverError` if it is not whole blocks of this context."""
        end = first_token + num_tokens
        aligned = end == self.num_tokens or not end % self.block_tokens
        if first_token % self.block_tokens or not (0 <= first_token < end <= self.num_tokens and aligned):
            raise HandoverError(
                f"chunk [{first_token}, {end}) is not whole blocks of a {self.num_tokens} token context"
            )
        return first_token // self.block_tokens, -(-end // self.block_tokens)


def check_resume(
    group: Group, incoming: Import, outputs: Sequence[Sequence[int]], finished: Sequence[bool], vocab_size: int
) -> None:
    """Whether what prefill sampled fits the request. Raises `InvalidRequest`, `HandoverError`."""
    n = group.request.params.n
    if len(outputs) != n or len(finished) != n:
        raise InvalidRequest(f"{len(outputs)} outputs and {len(finished)} ends for n = {n}", param="outputs")
    if not incoming.complete:
        ready, total = incoming.num_ready_tokens, incoming.num_tokens
        raise HandoverError(f"only {ready} of {total} context tokens have arrived")
    for choice in group.open:
        if not finished[choice] and not outputs[choice]:
            raise HandoverError(f"choice {choice} has no output to go on from")
        if not all(0 <= token_id < vocab_size for token_id in outputs[choice]):
            raise HandoverError(f"choice {choice} has token ids outside the vocabulary")
