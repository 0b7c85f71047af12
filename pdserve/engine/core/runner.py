"""What the engine core asks of a model: the seam between scheduling and computing.

`LocalEngine` (engine.py) is three calls: schedule, run, postprocess. `run` is a `ModelRunner`: torch computes with a
real model, sim computes the next token from the KV bytes it finds. Scheduler, blocks, prefix cache and hand-over
are one code for both, so what the simulator and the property tests prove holds for the real engine.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pdserve.errors import PdserveError
from pdserve.types import KVLayout, Logprobs, ModelInfo, Request


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of one request, mutable, owned by the scheduler; a runner only reads it.

    Until the prompt is computed a request has one sequence (choice 0); then it is forked into its n choices, which
    share the prompt's blocks.
    """

    request: Request
    handle: int
    """Of this choice: the request's handle plus `choice`."""
    choice: int
    token_ids: list[int]
    """Prompt, then outputs."""
    num_prompt_tokens: int
    num_computed_tokens: int = 0
    """Tokens whose KV is in the blocks."""
    block_table: list[int] = field(default_factory=list)
    """Pool block of each run of `block_tokens` tokens."""

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens


@dataclass(frozen=True, slots=True)
class Scheduled:
    """What one step does for one sequence: compute tokens [start, start + num_tokens) of it; KV of [0, start) is in
    its blocks already, and its block_table has room for all. `choices` are the sequences whose next token is to be
    sampled from the logits of the last of these tokens: itself when decoding, the n forks (they differ in `choice`
    and, when migrated, in outputs) when a prompt ends, none in the middle of a prompt."""

    seq: Sequence
    start: int
    num_tokens: int
    choices: tuple[Sequence, ...] = ()


@dataclass(frozen=True, slots=True)
class Sampled:
    """The next token of one choice, or why there is none (that choice alone fails)."""

    token_id: int
    logprobs: Logprobs | None = None
    error: PdserveError | None = None


class ModelRunner(Protocol):
    """Computes. Called from the engine's thread only."""

    @property
    def model(self) -> ModelInfo: ...

    @property
    def layout(self) -> KVLayout: ...

    @property
    def pool_is_host_memory(self) -> bool:
        """Whether the KV pool can be the hand-over memory itself (CPU), or hand-over is staged (CUDA)."""
        ...

    def allocate(self, num_blocks: int, host_blocks: NDArray[np.uint8] | None) -> None:
        """Make the KV pool: over `host_blocks` ([num_blocks, block_bytes] uint8) where given, else on the device."""
        ...

    def open(self, seq: Sequence) -> None:
        """A sequence (choice) begins or resumes: prepare its sampling state (grammar, penalties) from its params and
        the outputs it has. Raises `InvalidRequest` when its grammar doesn't compile."""
        ...

    def drop(self, seq: Sequence) -> None:
        """The sequence has ended: forget its state. Idempotent."""
        ...

    def run(self, batch: Seq[Scheduled]) -> list[Sampled]:
        """Compute the batch, write the KV of its tokens, and sample: one entry for every choice, in the batch's order.
        Prompt chunks and decodes may come in one batch."""
        ...

    def copy_blocks(self, sources: Seq[int], targets: Seq[int]) -> None:
        """Copy pool blocks (a shared partial block is written by its fork: copy on write)."""
        ...

    def stage_out(self, pool_blocks: Seq[int], staging: NDArray[np.uint8], staging_blocks: Seq[int]) -> None:
        """Device pools only: copy pool blocks to host staging blocks ([*, block_bytes] uint8)."""
        ...

    def stage_in(self, staging: NDArray[np.uint8], staging_blocks: Seq[int], pool_blocks: Seq[int]) -> None:
        """Device pools only: the other way."""
        ...

    def close(self) -> None: ...
