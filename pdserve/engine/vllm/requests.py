"""A request inside the vLLM engine, and the rules of how it becomes vLLM requests.

Every choice is a vLLM request of its own (its seed is the request's plus its number, which is what vLLM's own n
does too): choices can be cancelled one by one, and each has its own forced outputs. Their prompts share blocks through
vLLM's prefix cache. What was sampled before goes in as *forced* outputs; only where nothing looks at outputs (greedy,
no penalty, no grammar) may a migrated request's outputs be *folded* into its prompt, which saves a step for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pdserve.block_keys import KEY_BYTES, next_key
from pdserve.engine.base import ExportedChunk
from pdserve.errors import HandoverError
from pdserve.types import Phase, Request

if TYPE_CHECKING:
    from pdserve.engine.vllm.driver import Job


PARAMS_KEY = "pdserve"
"""Our part of vLLM's `kv_transfer_params`; other connectors beside ours have their own."""


@dataclass(slots=True, eq=False)
class Choice:
    """One choice: what vLLM was given and how far it is."""

    number: int
    handle: int
    forced: tuple[int, ...] = ()
    """Outputs that vLLM is made to repeat."""
    outputs: list[int] = field(default_factory=list)
    """All of its outputs that are known, prior ones included."""
    keys: list[bytes] = field(default_factory=list)
    """Of its full blocks, as far as they were asked for."""
    job: Job | None = None
    """Its vLLM request, while that runs."""
    load_slot: int | None = None
    """On the board: what vLLM loads for it."""
    save_slot: int | None = None
    """On the board: what vLLM saves of it."""
    num_seen: int = 0
    """Tokens that came from vLLM, forced ones included."""
    closed: bool = False
    """Nothing more is to be told about it."""

    @property
    def slots(self) -> list[int]:
        return [slot for slot in (self.load_slot, self.save_slot) if slot is not None]


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
    num_fetched_tokens: int = 0
    """Brought from a store for it."""
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

    def num_tokens(self, choice: Choice) -> int:
        """Known tokens of a choice: prompt and outputs."""
        return len(self.request.prompt_token_ids) + len(choice.outputs)

    def keys(self, choice: Choice, num_blocks: int, block_tokens: int) -> list[bytes]:
        """Keys of a choice's first blocks, as many of them as its known tokens fill."""
        if not choice.keys:
            packed = self.request.block_keys
            choice.keys = [packed[i : i + KEY_BYTES] for i in range(0, len(packed), KEY_BYTES)]
        num_blocks = min(num_blocks, self.num_tokens(choice) // block_tokens)
        for index in range(len(choice.keys), num_blocks):
            parent = choice.keys[-1] if choice.keys else self.request.cache_root
            choice.keys.append(next_key(parent, self._tokens(choice, index * block_tokens, block_tokens)))
        return choice.keys[:num_blocks]

    def _tokens(self, choice: Choice, first: int, count: int) -> Sequence[int]:
        prompt = self.request.prompt_token_ids
        start = max(first - len(prompt), 0)
        stop = max(first + count - len(prompt), 0)
        return (*prompt[first : first + count], *choice.outputs[start:stop])

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
        """Of every transfer of its."""
        return [slot for choice in self.choices for slot in choice.slots]

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
