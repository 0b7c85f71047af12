"""A request inside the engine: one `Group`, of one `Choice` while its prompt is computed and of n afterwards.

`Choice` is the runner's `Sequence` plus what only scheduler and engine need, so a request stays one type from
submission to its end. The rules on what a request may ask for live here as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from pdserve.block_keys import KEY_BYTES, next_key
from pdserve.engine.core.runner import Scheduled, Sequence
from pdserve.errors import ContextLengthExceeded, InvalidRequest, NotSupported
from pdserve.types import ModelInfo, Phase, Request

Order = tuple[int, int, int]
"""(priority, arrival, choice): who goes first. As in vLLM, a lower priority value is served earlier."""


@dataclass(slots=True, eq=False)
class Choice(Sequence):
    """A sequence, its place in the order and the keys of its blocks."""

    group: Group = field(kw_only=True)
    order: Order = field(kw_only=True)
    keys: list[bytes] = field(kw_only=True)
    """Of its full blocks, as far as they are known."""
    num_published: int = 0
    """Leading blocks that the prefix cache knows."""
    decoding: bool = False
    """Running, one token a step: its context, or what had to be recomputed, is complete."""
    step: int = 0
    """The last step that it was scheduled in."""

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def alive(self) -> bool:
        """Whether somebody still wants what it computes."""
        return bool(self.group.open) if self is self.group.carrier else self.choice in self.group.open

    def key(self, index: int, block_tokens: int) -> bytes:
        """Key of its full block `index`."""
        while len(self.keys) <= index:
            start = len(self.keys) * block_tokens
            parent = self.keys[-1] if self.keys else self.request.cache_root
            self.keys.append(next_key(parent, self.token_ids[start : start + block_tokens]))
        return self.keys[index]


@dataclass(frozen=True, slots=True)
class Work(Scheduled):
    """What one step does for one sequence, in the core's own types."""

    seq: Choice
    choices: tuple[Choice, ...] = ()


@dataclass(slots=True, eq=False)
class Group:
    """One submission and the choices it still owes."""

    request: Request
    handle: int
    phase: Phase
    arrival: int
    open: set[int] = field(init=False)
    """Choices that have not ended."""
    carrier: Choice = field(init=False)
    """Computes (or imports) the context; it is choice 0 itself when n is 1, else it is forked at the end."""
    forks: dict[int, Choice] = field(default_factory=dict)
    context_done: bool = False
    num_cached_tokens: int = 0
    """Of the prompt: found in the cache, at its first admission or later, instead of computed."""
    num_fetched_tokens: int = 0
    """Of those, brought from a store for this request."""
    was_preempted: bool = False
    uses_cache: bool = False
    """Its chain was counted as used (`BlockManager.used`)."""
    num_exported_tokens: int = 0

    def __post_init__(self) -> None:
        self.open = set(range(self.request.params.n))
        self.carrier = self._choice(0, self._context())
        packed = self.request.block_keys
        self.carrier.keys = [packed[i : i + KEY_BYTES] for i in range(0, len(packed), KEY_BYTES)]

    @property
    def num_context_tokens(self) -> int:
        """What is computed before the choices part: exported by PREFILL, imported by DECODE."""
        return len(self.request.prompt_token_ids) + (len(self.prior_outputs(0)) if self.request.params.n == 1 else 0)

    @property
    def order(self) -> tuple[int, int]:
        return self.request.priority, self.arrival

    def prior_outputs(self, choice: int) -> tuple[int, ...]:
        """Tokens sampled before this submission."""
        return self.request.output_token_ids[choice] if self.request.output_token_ids else ()

    def sequences(self) -> Iterator[Choice]:
        """Every sequence that may hold blocks or a runner's state."""
        yield self.carrier
        yield from (fork for fork in self.forks.values() if fork is not self.carrier)

    def choices_at_context_end(self) -> tuple[Choice, ...]:
        """Who gets a token from the logits of the context's last token: not choices that have outputs of their own
        to compute first. Makes the forks; their blocks come later."""
        if self.request.params.n == 1:
            return (self.carrier,)
        return tuple(self.fork(choice, ()) for choice in sorted(self.open) if not self.prior_outputs(choice))

    def fork(self, choice: int, outputs: Seq[int]) -> Choice:
        """A choice that goes on from the context, after its prior outputs and these."""
        prompt = self.request.prompt_token_ids
        self.forks[choice] = self._choice(choice, [*prompt, *self.prior_outputs(choice), *outputs])
        return self.forks[choice]

    def _choice(self, choice: int, token_ids: list[int]) -> Choice:
        return Choice(
            request=self.request,
            handle=self.handle + choice,
            choice=choice,
            token_ids=token_ids,
            num_prompt_tokens=len(self.request.prompt_token_ids),
            group=self,
            order=(*self.order, choice),
            keys=[],
        )

    def _context(self) -> list[int]:
        prompt = self.request.prompt_token_ids
        return [*prompt, *self.prior_outputs(0)] if self.request.params.n == 1 else list(prompt)


def check_request(request: Request, phase: Phase, model: ModelInfo, block_tokens: int) -> None:
    """Raises `InvalidRequest`, `ContextLengthExceeded` or `NotSupported` for what this engine can't run."""
    prompt, params = request.prompt_token_ids, request.params
    outputs = request.output_token_ids
    if not prompt:
        raise InvalidRequest("the prompt is empty", param="prompt")
    for token_ids in (prompt, *outputs):
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < model.vocab_size):
            raise InvalidRequest(f"token ids must be from 0 to {model.vocab_size - 1}", param="prompt")
    if outputs and len(outputs) != params.n:
        raise InvalidRequest(f"{len(outputs)} outputs were given for n = {params.n}", param="output_token_ids")
    if request.block_keys and len(request.block_keys) != len(prompt) // block_tokens * KEY_BYTES:
        raise InvalidRequest(f"one key for each full block of {block_tokens} tokens is needed", param="block_keys")
    longest = len(prompt) + max(map(len, outputs), default=0)
    if len(prompt) >= model.max_model_len or longest > model.max_model_len:
        raise ContextLengthExceeded(
            f"the request has {longest} tokens; this worker takes at most {model.max_model_len}, the next one included",
            param="prompt",
        )
    if phase is not Phase.FULL and params.n > 1 and any(outputs):
        raise NotSupported(
            "choices that already differ share no context to hand over: send a migrated request with n > 1 in phase "
            "FULL, or each choice alone",
            param="n",
        )
