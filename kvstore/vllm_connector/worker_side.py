"""Beside the model: copies one rank's heads of every block between vLLM's pages and the staging area.

Saving: after each step the whole blocks that it finished are copied out, each block once even if the request is
preempted and computed again. Loading runs in a thread of its own while other requests decode. A staging block is
checked against its generation before and after it was copied, and against its digest, before vLLM's cache is touched.

Every transfer ends exactly once on the board, whatever happens: moved, dropped by vLLM (cancelled), or found bad.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import torch
import xxhash

from kvstore.transports.shm import SharedMemoryPool
from kvstore.vllm_connector.plan import Copies, LoadCopy, Save, SaveCopy
from pdserve.engine.vllm.board import Ending, TransferBoard
from pdserve.engine.vllm.pages import PagedKV, Span

logger = logging.getLogger(__name__)

LOAD_TOKENS = 1024
"""Tokens that a load checks and copies at once: bounds its private copy (330 MB for a 70B model in bf16)."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(slots=True)
class _Saved:
    """How far a save is on this rank, and the staging blocks it may write."""

    num_tokens: int
    blocks: list[int]
    num_grants: int = 0


@dataclass(frozen=True, slots=True)
class _Part:
    """Of one save, what this step copies: a request's tokens into these staging blocks."""

    slot: int
    span: Span
    blocks: list[int]


class WorkerSide:
    """One rank's. `block_shape` is [layer, K/V, kv_head of all ranks, token, head_dim]; a rank has its part of the
    heads, the same one as its neighbours where there are more ranks than heads."""

    def __init__(self, extra: dict[str, Any], rank: int, *, keeps_part: bool = True) -> None:
        """`keeps_part`: vLLM can compute the rest of a prompt whose beginning was loaded."""
        self._rank = rank
        self._keeps_part = keeps_part
        self._num_ranks = extra["num_ranks"]
        self._staging = SharedMemoryPool.attach(extra["staging"])
        self._board = TransferBoard.attach(extra["board"], extra["num_ranks"], extra["num_slots"])
        shape = tuple(extra["block_shape"])
        self._num_heads, self._block_tokens = shape[2], shape[3]
        flat = torch.from_numpy(self._staging.blocks).view(_DTYPES[extra["dtype"]])
        self._blocks = flat.view(len(flat), *shape)
        self._pages: PagedKV | None = None
        self._saved: dict[int, _Saved] = {}
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="kv-load")
        self._loaded: SimpleQueue[tuple[str, set[int]]] = SimpleQueue()
        self._bad_blocks: set[int] = set()

    def register(self, pages: PagedKV) -> None:
        self._pages = pages

    @property
    def _heads(self) -> slice:
        assert self._pages is not None
        first = self._rank * self._num_heads // self._num_ranks
        return slice(first, first + self._pages.num_heads)

    def start_loads(self, copies: Copies) -> None:
        for slot in copies.dropped:
            self._saved.pop(slot, None)
            self._board.end(self._rank, slot, Ending.DROPPED)
        if copies.loads and self._pages is not None:
            mark = self._pages.mark()  # a step under way may still write into blocks that were another request's
            for load in copies.loads:
                self._loader.submit(self._load_guarded, load, mark)

    # Saving

    def save(self, copies: Copies) -> None:
        """After the step's forward: the KV of its tokens is there, and vLLM has not reused the blocks yet."""
        assert self._pages is not None
        parts = [part for copy in copies.saves if (part := self._part(copy)) is not None]
        if parts:
            targets = [block for part in parts for block in part.blocks]
            self._blocks[targets, :, :, self._heads] = self._pages.read_spans([part.span for part in parts])
        for part in parts:
            self._saved[part.slot].num_tokens = part.span[2]
            self._board.advance(self._rank, part.slot, part.span[2])
        for copy in copies.saves:
            if copy.final:
                self._saved.pop(copy.save.slot, None)
                self._board.end(self._rank, copy.save.slot, Ending.DONE)

    def _part(self, copy: SaveCopy) -> _Part | None:
        """What is computed and has room; what has no room yet is tried again with the next copy."""
        save, size = copy.save, self._block_tokens
        saved = self._take_grants(save)
        last = min(copy.last, (save.first_block + len(saved.blocks)) * size)
        if last <= saved.num_tokens:
            return None
        start = saved.num_tokens // size - save.first_block
        blocks = saved.blocks[start : start - (saved.num_tokens - last) // size]
        return _Part(save.slot, (copy.vllm_blocks, saved.num_tokens, last), blocks)

    def _take_grants(self, save: Save) -> _Saved:
        saved = self._saved.get(save.slot)
        if saved is None:
            saved = self._saved[save.slot] = _Saved(save.first_block * self._block_tokens, list(save.blocks))
        granted = self._board.granted(save.slot, saved.num_grants)
        saved.blocks += granted
        saved.num_grants += len(granted)
        return saved

    # Loading

    def _load_guarded(self, copy: LoadCopy, mark: torch.cuda.Event | None) -> None:
        """In the loader's thread. Whatever goes wrong, the request comes back to vLLM and the slot ends."""
        assert self._pages is not None
        ending, bad = Ending.CORRUPT, set(copy.vllm_blocks[copy.first // self._pages.vllm_block :])
        try:
            self._pages.follow(mark)
            ending, bad = self._load(copy)
            self._pages.settle()
        except Exception:
            logger.exception("loading KV of request %s failed", copy.request_id)
        self._board.end(self._rank, copy.load.slot, ending)
        self._loaded.put((copy.request_id, bad))

    def _load(self, copy: LoadCopy) -> tuple[Ending, set[int]]:
        """How it ended, and vLLM's blocks from the first bad one on: those are computed anew, or the request fails."""
        assert self._pages is not None
        vllm_block = self._pages.vllm_block
        step = max(LOAD_TOKENS // vllm_block, 1) * vllm_block
        for first in range(copy.first, copy.last, step):
            last = min(first + step, copy.last)
            loaded, ending = self._load_part(copy, first, last)
            if loaded < last:
                loaded = loaded if self._keeps_part else 0
                self._board.advance(self._rank, copy.load.slot, loaded)
                return ending, set(copy.vllm_blocks[loaded // vllm_block :])
            self._board.advance(self._rank, copy.load.slot, last)
        return Ending.DONE, set()

    def _load_part(self, copy: LoadCopy, first: int, last: int) -> tuple[int, Ending]:
        """Load tokens [first, last): up to which it went, and what stopped it. The checks are made on a private copy,
        so that what was checked is what is decoded."""
        assert self._pages is not None
        pages, load = self._pages, copy.load
        start = first // pages.block_tokens - load.first_block
        span = slice(start, start - (first - last) // pages.block_tokens)
        numbers, expected = list(load.blocks[span]), np.array(load.generations[span], dtype=np.uint64)
        stale = self._staging.generations[numbers] != expected
        private = self._staging.blocks[numbers]
        stale |= self._staging.generations[numbers] != expected
        bad = stale | _differs(private, load.digests[span])
        if bad.any():  # keep whole blocks of vLLM only
            last = first + int(bad.argmax()) * pages.block_tokens
            last -= last % pages.vllm_block
        if last > first:
            count = -(-(last - first) // pages.block_tokens)
            blocks = torch.from_numpy(private).view(self._blocks.dtype).view(-1, *self._blocks.shape[1:])
            pages.write(list(copy.vllm_blocks), first, last, blocks[:count, :, :, self._heads])
        return last, Ending.STALE if stale.any() else Ending.CORRUPT

    def take_loaded(self) -> set[str]:
        """Requests whose load ended since the last call; their bad blocks go to `take_bad_blocks`."""
        ended: set[str] = set()
        while True:
            try:
                request_id, bad = self._loaded.get_nowait()
            except Empty:
                return ended
            ended.add(request_id)
            self._bad_blocks |= bad

    def take_bad_blocks(self) -> set[int]:
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def close(self) -> None:
        self._loader.shutdown(wait=True)
        self._board.close()
        self._staging.close()


def _differs(
    blocks: np.ndarray[Any, np.dtype[np.uint8]], digests: Iterable[str]
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which blocks do not have their digest; without digests none."""
    wrong = np.zeros(len(blocks), dtype=bool)
    for index, digest in enumerate(digests):
        wrong[index] = bool(digest) and xxhash.xxh3_128_hexdigest(blocks[index]) != digest
    return wrong
