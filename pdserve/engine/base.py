"""The contract between a worker and whatever runs the model.

An engine is driven by one thread: every method below is called from it and none blocks on the network. A worker
calls `submit`, `cancel` and the hand-over verbs between steps and `step` as long as `has_work` is true. What a step
produced comes back as one `StepResult`; the worker turns it into one message per router.

Small protocols instead of one large: `Engine` runs requests, `KVHandover` moves their KV in and out; all three engines
(torch, vllm, sim) have both, so that either role can be taken at any time. `KVCache` joins an engine's prefix cache to
a store: an engine without it is served all the same, and computes every prompt itself.

KV moves through *hand-over memory*: `num_blocks` blocks of `layout.block_bytes` each, plus one 64-bit generation a
block, in memory that a transport can register. On a CPU engine it is the KV pool itself, so a hand-over is one
copy. On a device engine it is a host staging area that the engine fills and empties. A block's generation grows by
one whenever the block is given to a new owner, *before* the first byte is overwritten: a reader that sees the same
generation before and after its read has read one owner's bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from pdserve.types import EngineLoad, KVLayout, ModelInfo, Phase, Request, StepOutput


class KVMemory(Protocol):
    """Hand-over memory: made by the worker (`kvstore.transports`), filled by the engine, read by peers."""

    @property
    def blocks(self) -> NDArray[np.uint8]:
        """Shape [num_blocks, block_bytes]; C-contiguous."""
        ...

    @property
    def generations(self) -> NDArray[np.uint64]:
        """Shape [num_blocks]; in the same registered region as the blocks."""
        ...


KVMemoryFactory = Callable[[int, int], KVMemory]
"""(num_blocks, block_bytes) -> KVMemory. An engine calls it once, when it knows the size of its pool."""


@dataclass(frozen=True, slots=True)
class ExportedChunk:
    """Blocks of one request's prompt that are final: they stay untouched until `export_release`.

    The chunk covers tokens [first_token, first_token + num_tokens); first_token is a multiple of block_tokens.
    `generations` are read when the chunk is exported.
    """

    handle: int
    chunk_index: int
    first_token: int
    num_tokens: int
    blocks: tuple[int, ...]
    generations: tuple[int, ...]
    final: bool


@dataclass(frozen=True, slots=True)
class PublishedBlocks:
    """Neighbouring full blocks of one choice's chain that its engine's prefix cache took up, or found there when it
    admitted the request: so that a choice's blocks are told from the first one on, though not always in order. Nothing
    holds them: who copies them out compares the generations before and after.

    `blocks` are numbers in hand-over memory, empty in an engine whose cache lies elsewhere (on a device): see
    `KVCache.cache_lend`.
    """

    handle: int
    """Of the choice; while the prompt is computed, of the request's first. Negative: told by key alone, of a cache that
    nobody can copy from."""
    first_block: int
    """Position of the first one in the request's chain."""
    keys: tuple[bytes, ...]
    blocks: tuple[int, ...] = ()
    generations: tuple[int, ...] = ()


@dataclass(slots=True)
class StepResult:
    """One step: tokens, ends and logprobs (`output`), the chunks that became exportable, and what the prefix cache took
    up and gave up (keys) since the step before: at its end every published key is in the cache, every evicted one is
    not. `num_prompt_tokens`: of the tokens computed, those of prompts (0: the engine doesn't tell), and `prefill_s` how
    long they took, where that is not the step's own duration (0: it is)."""

    output: StepOutput = field(default_factory=StepOutput)
    exports: list[ExportedChunk] = field(default_factory=list)
    published: list[PublishedBlocks] = field(default_factory=list)
    evicted: list[bytes] = field(default_factory=list)
    num_prompt_tokens: int = 0
    prefill_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ImportTarget:
    """Where a chunk's blocks are to be written. `blocks[i]` takes the chunk's i-th block; the first
    `num_cached_blocks` of them are here already and must not be pulled or written."""

    blocks: tuple[int, ...]
    num_cached_blocks: int = 0


class Engine(Protocol):
    """Runs requests. Not thread-safe: one thread owns it."""

    @property
    def model(self) -> ModelInfo: ...

    @property
    def layout(self) -> KVLayout: ...

    def submit(self, request: Request, handle: int, phase: Phase) -> None:
        """Take a request; its choices are `handle` to `handle + params.n - 1`.

        PREFILL: chunks appear in `StepResult.exports`, at the end one token a choice and a `PromptStats`; a choice
        that this token ends is finished, for the others nothing more comes; blocks stay until released.
        DECODE: nothing runs until `KVHandover.resume`; blocks for the prompt are reserved now or as soon as there
        is room. FULL: prefill and decode here. With `request.output_token_ids` the outputs so far are context,
        and the next token's output index follows them.

        Raises `InvalidRequest` (a grammar that doesn't compile, a token id outside the vocabulary),
        `ContextLengthExceeded`, `NotSupported`. It does not raise for lack of room: the request waits.
        """
        ...

    def cancel(self, handle: int) -> None:
        """Drop every choice of the request that `handle` (its first) names, now, without a `Finish`.

        Its blocks are freed at once, exported and imported ones included: the caller has ended, or fences by
        generation, whatever transfer touches them. Unknown handles are ignored (a cancel may cross a finish).
        """
        ...

    def cancel_choice(self, handle: int) -> None:
        """Stop one choice of a request (a stop string matched at the router), without a `Finish`."""
        ...

    def has_work(self) -> bool:
        """Whether `step` would do something now."""
        ...

    def step(self) -> StepResult:
        """Run one batch. An error that concerns one request ends that request with `FinishReason.ERROR`; raising
        means that the engine is broken."""
        ...

    def load(self) -> EngineLoad: ...

    def close(self) -> None:
        """Give back memory, threads and processes. Idempotent."""
        ...


class KVHandover(Protocol):
    """The engine's side of moving KV. Same thread as `Engine`; the handle is the request's first."""

    @property
    def memory(self) -> KVMemory: ...

    def export_release(self, handle: int, chunk_index: int | None = None) -> None:
        """The decode worker owns this chunk (None: all of them): the exporter's hold on its blocks ends. They may
        live on in the prefix cache. Idempotent; unknown handles are ignored."""
        ...

    def import_blocks(self, handle: int, first_token: int, num_tokens: int) -> ImportTarget | None:
        """Blocks to write this chunk of a DECODE submission into; None while its reservation waits for room.

        Asking twice for one chunk gives the same blocks. Raises `KeyError` for an unknown handle.
        """
        ...

    def import_commit(self, handle: int, first_token: int, num_tokens: int) -> None:
        """The chunk's bytes are there and verified; from now on they may be read and cached."""
        ...

    def resume(self, handle: int, output_token_ids: Sequence[Sequence[int]], finished: Sequence[bool]) -> None:
        """All chunks are committed: go on decoding after these outputs (one sequence a choice, as prefill sampled
        them; they follow the request's own `output_token_ids`); choices marked finished are not run."""
        ...


@runtime_checkable
class KVCache(Protocol):
    """The engine's prefix cache, filled from a store and copied to one. Same thread as `Engine`.

    A *fill* brings blocks of a prompt's chain in for the request that `handle` names, before or while that runs: open,
    write from another thread, commit or drop. What is committed is found by the request like any cached block; until
    the request took it, or has ended, it is held, but yields to a running request that has no other room.
    """

    def cache_open(self, handle: int, keys: Sequence[bytes], first_block: int = 0) -> ImportTarget | None:
        """Where to write blocks `first_block` and on of the chain `keys` (from its first block); None while there is
        no room beside what waits. Leading ones that are cached by now are not to be written. Blocks before
        `first_block` that are not cached are computed by the request meanwhile: it stops before `first_block` until
        the fill is committed or dropped. One fill a handle: raises `ValueError` while another one is there, or for an
        empty range.
        """
        ...

    def cache_commit(self, handle: int, num_blocks: int) -> None:
        """The first `num_blocks` of the target's blocks hold verified bytes: cache them; the others are given back.
        Nobody writes into any of them any more. Unknown handles are ignored."""
        ...

    def cache_drop(self, handle: int) -> None:
        """Nobody writes into the fill's blocks any more, and nobody wants them. Idempotent. `Engine.cancel` does the
        same for a fill that is committed; an open one it leaves to its writer."""
        ...

    def cache_lend(self, keys: Sequence[bytes]) -> tuple[int, ...] | None:
        """The leading ones of these blocks that are cached and have room, in hand-over memory, held there until
        `cache_return`; None when there is no room now. Only for blocks that were published without numbers."""
        ...

    def cache_return(self, blocks: Sequence[int]) -> None:
        """Nobody reads them any more."""
        ...


class HandoverEngine(Engine, KVHandover, Protocol):
    """What a worker needs: both."""
