"""A request inside the vLLM engine, and the rules of how it becomes vLLM requests.

Every choice is a vLLM request of its own (its seed is the request's plus its number, which is what vLLM's own n
does too): choices can be cancelled one by one, and each has its own forced outputs. Their prompts share blocks through
vLLM's prefix cache. What was sampled before goes in as *forced* outputs; only where nothing looks at outputs (greedy,
no penalty, no grammar) may a migrated request's outputs be *folded* into its prompt, which saves a step for each.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pdserve.engine.base import ExportedChunk
from pdserve.errors import HandoverError
from pdserve.types import Phase, Request

if TYPE_CHECKING:
    from pdserve.engine.vllm.driver import Job


@dataclass(slots=True, eq=False)
class Choice:
    """One choice: what vLLM was given and how far it is."""

    number: int
    handle: int
    forced: tuple[int, ...] = ()
    """Outputs that vLLM is made to repeat."""
    job: Job | None = None
    """Its vLLM request, while that runs."""
    slot: int | None = None
    """Its transfer on the board."""
    num_seen: int = 0
    """Tokens that came from vLLM, forced ones included."""
    closed: bool = False
    """Nothing more is to be told about it."""


@dataclass(slots=True, eq=False)
class Live:
    """One submission, from `submit` until nothing of it is left here."""

    request: Request
    handle: int
    phase: Phase
    choices: list[Choice] = field(init=False)
    blocks: list[int] = field(default_factory=list)
    """Staging blocks of its context, as long as they are its own; empty before its reservation."""
    digests: dict[int, str] = field(default_factory=dict)
    """DECODE: of committed blocks, by index."""
    num_exported: int = 0
    """PREFILL: tokens announced so far."""
    num_chunks: int = 0
    chunks: dict[int, list[int]] = field(default_factory=dict)
    """PREFILL: blocks of announced chunks that were not released."""
    num_cached_tokens: int | None = None
    """As the first choice found its prompt."""
    prompt_told: bool = False

    def __post_init__(self) -> None:
        self.choices = [Choice(c, self.handle + c) for c in range(self.request.params.n)]

    @property
    def num_context_tokens(self) -> int:
        """What is handed over: the prompt, and outputs sampled before this submission (n = 1 only)."""
        return len(self.request.prompt_token_ids) + (len(self.prior(0)) if len(self.choices) == 1 else 0)

    @property
    def num_folded(self) -> int:
        """Prior outputs that go into vLLM's prompt instead of being forced."""
        return len(self.prior(0)) if len(self.choices) == 1 and _blind_to_outputs(self.request) else 0

    def prior(self, choice: int) -> tuple[int, ...]:
        return self.request.output_token_ids[choice] if self.request.output_token_ids else ()

    @property
    def vllm_prompt(self) -> tuple[int, ...]:
        return (*self.request.prompt_token_ids, *self.prior(0)[: self.num_folded])

    @property
    def has_open_choices(self) -> bool:
        return not all(choice.closed for choice in self.choices)

    @property
    def has_jobs(self) -> bool:
        return any(choice.job is not None for choice in self.choices)

    @property
    def slots(self) -> list[int]:
        return [choice.slot for choice in self.choices if choice.slot is not None]

    def carries_export(self, choice: Choice) -> bool:
        """The first choice's vLLM request is the one whose prompt is saved: it must run even if nobody wants its
        token."""
        return self.phase is Phase.PREFILL and choice.number == 0

    def span(self, first_token: int, num_tokens: int, block_tokens: int) -> tuple[int, int]:
        """Block indexes of a chunk. Raises `HandoverError` if it is not whole blocks of this context."""
        end, total = first_token + num_tokens, self.num_context_tokens
        aligned = end == total or not end % block_tokens
        if first_token % block_tokens or not (0 <= first_token < end <= total and aligned):
            raise HandoverError(f"chunk [{first_token}, {end}) is not whole blocks of a {total} token context")
        return first_token // block_tokens, -(-end // block_tokens)

    def next_chunk(self, num_saved: int, block_tokens: int, generations: NDArray[np.uint64]) -> ExportedChunk | None:
        """The blocks that were saved since the last call, if any; they are now held until released."""
        if num_saved == self.num_exported:
            return None
        blocks = self.blocks[self.num_exported // block_tokens : -(-num_saved // block_tokens)]
        chunk = ExportedChunk(
            handle=self.handle,
            chunk_index=self.num_chunks,
            first_token=self.num_exported,
            num_tokens=num_saved - self.num_exported,
            blocks=tuple(blocks),
            generations=tuple(generations[blocks].tolist()),
            final=num_saved == self.num_context_tokens,
        )
        self.chunks[self.num_chunks] = blocks
        self.num_chunks += 1
        self.num_exported = num_saved
        return chunk

    def transfer(self, slot: int, generations: list[int], verify: bool) -> dict[str, Any]:
        """What the connector is told (`kvstore.vllm_connector.Transfer`)."""
        loads = self.phase is Phase.DECODE
        return {
            "slot": slot,
            "blocks": self.blocks,
            "generations": generations,
            "num_tokens": self.num_context_tokens,
            "loads": loads,
            "digests": [self.digests[index] for index in range(len(self.blocks))] if loads and verify else [],
        }


def _blind_to_outputs(request: Request) -> bool:
    """Whether the next token depends on the tokens so far through the model alone."""
    params = request.params
    return (
        params.greedy
        and params.grammar is None
        and params.min_tokens == 0
        and params.presence_penalty == params.frequency_penalty == 0.0
        and params.repetition_penalty == 1.0
    )
