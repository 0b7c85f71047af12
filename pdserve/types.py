"""The values that every process shares: frozen, slotted, free of protobuf.

One `Request` describes a request from its arrival to its end; the router makes it, the wire carries it, the
engine runs it. `pdserve.wire` converts these to and from messages; nothing else touches generated code.

Token ids are Python ints in tuples. Times are seconds as float where a name ends in `_s`, milliseconds as int
where it ends in `_ms`. Timeouts are always relative: two machines need not agree on the time of day.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import NoReturn

from msgspec import Struct

from pdserve.errors import InvalidRequest

MAX_LOGPROBS = 20
"""Alternatives per token that may be asked for: OpenAI's limit for `top_logprobs`."""
MAX_CHOICES = 128
"""Largest `n`: OpenAI's limit."""
MAX_STOP_STRINGS = 16
"""Stop strings per request. OpenAI allows 4; vLLM sets no limit; 16 bounds the matching cost per token."""
MAX_SEED = 2**63 - 1


class Role(Enum):
    """What a worker does now. A value, not a class, so that a warm worker can flip."""

    PREFILL = "prefill"
    DECODE = "decode"


class Phase(IntEnum):
    """What a submission asks of a worker."""

    PREFILL = 1
    """Compute the prompt's KV, export it chunk by chunk, sample the first token of every choice, then stop."""
    DECODE = 2
    """Import the prompt's KV and the tokens sampled so far, then go on to the end."""
    FULL = 3
    """Prefill and decode here, no hand-over."""


class FinishReason(IntEnum):
    """Why a choice ended. The names are OpenAI's, but for ERROR."""

    STOP = 1
    LENGTH = 2
    CANCELLED = 3
    ERROR = 4


class GrammarKind(IntEnum):
    """How `Grammar.source` is to be read."""

    JSON_OBJECT = 1
    JSON_SCHEMA = 2
    REGEX = 3


@dataclass(frozen=True, slots=True)
class Grammar:
    """A constraint on the output. `source` is the JSON schema or the regex as text; empty for JSON_OBJECT."""

    kind: GrammarKind
    source: str = ""


def _refuse(param: str, rule: str) -> NoReturn:
    raise InvalidRequest(f"{param} {rule}", param=param)


class SamplingParams(Struct, frozen=True):
    """How tokens are drawn. Names and meaning are vLLM's.

    `max_tokens`, `min_tokens`, penalties and grammar count outputs only, never the prompt (but
    `repetition_penalty`, which looks at both, as in vLLM and the CTRL paper, arXiv 1909.05858, section 4.1).
    A random draw is a function of (seed, choice, output index) alone, so batch, worker and hand-over don't matter.

    Raises `InvalidRequest` naming the field when a value is out of range.
    """

    n: int = 1
    temperature: float = 1.0
    """0 means greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 or -1: all tokens."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    """The router fills it in before it submits; None reaches no engine."""
    stop: tuple[str, ...] = ()
    """Stop strings: the router's matter, engines ignore them."""
    stop_token_ids: tuple[int, ...] = ()
    max_tokens: int | None = None
    """None: what the context leaves. The router resolves it before it submits."""
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    """None: none. k >= 0: the sampled token's logprob and the k most likely tokens'."""
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        self._check_draw()
        self._check_penalties()
        self._check_ends()

    def _check_draw(self) -> None:
        if not 1 <= self.n <= MAX_CHOICES:
            _refuse("n", f"must be from 1 to {MAX_CHOICES}")
        if not 0.0 <= self.temperature <= 2.0:
            _refuse("temperature", "must be from 0 to 2")
        if not 0.0 < self.top_p <= 1.0:
            _refuse("top_p", "must be above 0 and at most 1")
        if self.top_k < -1:
            _refuse("top_k", "must be -1, 0 (both: off) or positive")
        if not 0.0 <= self.min_p <= 1.0:
            _refuse("min_p", "must be from 0 to 1")
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED:
            _refuse("seed", f"must be from 0 to {MAX_SEED}")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            _refuse("logprobs", f"must be from 0 to {MAX_LOGPROBS}")

    def _check_penalties(self) -> None:
        if not -2.0 <= self.presence_penalty <= 2.0:
            _refuse("presence_penalty", "must be from -2 to 2")
        if not -2.0 <= self.frequency_penalty <= 2.0:
            _refuse("frequency_penalty", "must be from -2 to 2")
        if not 0.0 < self.repetition_penalty <= 10.0:
            _refuse("repetition_penalty", "must be above 0 and at most 10")
        for token_id, bias in self.logit_bias:
            if token_id < 0:
                _refuse("logit_bias", "must have token ids of 0 or more as keys")
            if not -100.0 <= bias <= 100.0:
                _refuse("logit_bias", "must have values from -100 to 100")

    def _check_ends(self) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            _refuse("stop", f"must have at most {MAX_STOP_STRINGS} strings")
        if self.stop and not all(self.stop):
            _refuse("stop", "must not contain an empty string")
        if self.stop_token_ids and min(self.stop_token_ids) < 0:
            _refuse("stop_token_ids", "must be 0 or more")
        if self.max_tokens is not None and self.max_tokens < 1:
            _refuse("max_tokens", "must be at least 1")
        if self.min_tokens < 0:
            _refuse("min_tokens", "must be 0 or more")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            _refuse("min_tokens", "must not exceed max_tokens")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class Request:
    """One request, from arrival to end; the same value at the router, on the wire and in the engine."""

    request_id: str
    model: str
    prompt_token_ids: Sequence[int]
    """A tuple; at the router packed (`pdserve.wire.columns.PackedIds`)."""
    params: SamplingParams
    lora: str = ""
    cache_root: bytes = bytes(16)
    """First link of the block-key chain (`pdserve.tokens.root_key`): model revision, tokenizer, LoRA, tenant."""
    block_keys: bytes = b""
    """16 bytes for each full prompt block; empty: the engine computes them from `cache_root` if it caches."""
    output_token_ids: tuple[tuple[int, ...], ...] = ()
    """Tokens sampled before this submission, one tuple a choice: a migrated request; empty for a fresh one."""
    deterministic: bool = False
    """Same tokens whatever else is in the batch, at the price of speed."""
    timeout_ms: int = 0
    """What is left for this leg, in ms; 0: no limit."""
    priority: int = 0
    traceparent: str = ""
    """W3C trace context, passed on as it came."""


@dataclass(frozen=True, slots=True)
class ParallelRank:
    """Which slice of the model a worker (or a KV block) belongs to; all zero on one device."""

    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    dp_rank: int = 0
    kv_group: int = 0


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Everything that must be equal before bytes of KV may be shared; its hash is the fingerprint.

    The physical order inside a block is [layer, K/V, kv_head, token, head_dim].
    """

    model_revision: str
    dtype: str
    block_tokens: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_bytes: int
    order: str = "layer,kv,head,token,dim"
    tp_size: int = 1
    pp_size: int = 1
    deterministic: bool = False
    """All of it is computed batch-invariantly: blocks of a worker that does not promise so must not get among it."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What an engine serves and within which bounds."""

    name: str
    revision: str
    tokenizer_id: str
    max_model_len: int
    """Tokens: prompt and output together."""
    vocab_size: int
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A worker as the router sees it: sent in its Hello."""

    worker_id: str
    incarnation: int
    """New at each start: the ns timestamp of the process's birth. Whatever was learnt of an older one is void."""
    role: Role
    address: str
    """host:port of the worker's gRPC services."""
    model: ModelInfo
    fingerprint: bytes
    block_tokens: int
    num_blocks: int
    max_num_seqs: int
    rank: ParallelRank = ParallelRank()
    transports: tuple[str, ...] = ()
    host_id: str = ""
    """Equal on two workers exactly if they can share memory."""
    labels: tuple[tuple[str, str], ...] = ()
    """Topology: node, rack, RDMA group."""
    store_address: str = ""
    """host:port of the node's KV store; empty: none."""


@dataclass(frozen=True, slots=True)
class KVTicket:
    """The right to pull one request's KV from one incarnation of a prefill worker, for a while."""

    request_id: str
    worker_id: str
    incarnation: int
    nonce: bytes
    """16 random bytes; known to prefill, router and decode only."""
    fingerprint: bytes
    address: str
    """host:port of the prefill worker's KvHandoverService."""
    lease_ms: int
    """The ticket is void this long after it was issued unless renewed."""
    num_prompt_tokens: int
    rank: ParallelRank = ParallelRank()
    version: int = 1


@dataclass(frozen=True, slots=True)
class KVManifest:
    """One exported chunk: where its blocks lie and how to know them again.

    Columns, one entry a block. The chunk holds tokens [first_token, first_token + num_tokens); first_token is a
    multiple of block_tokens, and only the request's last block may be partial.
    """

    chunk_index: int
    first_token: int
    num_tokens: int
    blocks: tuple[int, ...]
    """Block numbers in the exporter's hand-over memory."""
    generations: tuple[int, ...]
    digests: tuple[bytes, ...]
    """xxh3-128 of each whole block, 16 bytes."""
    final: bool
    """The prompt is complete with this chunk."""
    rank: ParallelRank = ParallelRank()
    version: int = 1
    ticket_id: bytes = b""
    """First 8 bytes of SHA-256 of the ticket's nonce: a late manifest of a replaced ticket is told apart by it."""


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Logprobs of one sampled token, of the model's distribution before penalties and temperature (as vLLM's
    `raw_logprobs` default): its own, and the most likely ones in falling order."""

    handle: int
    index: int
    """Output index of the token."""
    logprob: float
    rank: int
    """1 for the most likely token."""
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of one choice."""

    handle: int
    reason: FinishReason
    num_output_tokens: int
    stop_token_id: int | None = None
    """The token that ended it, if a stop token or EOS did; it is not part of the text."""
    error: Exception | None = None
    """A `pdserve.errors.PdserveError` when reason is ERROR."""


@dataclass(frozen=True, slots=True)
class PromptStats:
    """What became of a prompt: sent once, when its prefill is complete. From a DECODE request it says that all KV has
    come, and no more."""

    handle: int
    num_prompt_tokens: int
    num_cached_tokens: int
    """Of these, how many were found in a cache instead of computed."""
    num_fetched_tokens: int = 0
    """Of the cached, how many were brought from a store (DRAM, disk, a peer) for this request."""


@dataclass(frozen=True, slots=True)
class CacheDelta:
    """What changed in an engine's prefix cache: block keys. `removed` comes before `stored`; `reset`: whatever was
    known before is void."""

    stored: tuple[bytes, ...] = ()
    removed: tuple[bytes, ...] = ()
    reset: bool = False

    def __bool__(self) -> bool:
        return self.reset or bool(self.stored or self.removed)


@dataclass(slots=True)
class StepOutput:
    """What one engine step produced, in columns: entry i says that choice `handles[i]` got `counts[i]` tokens,
    the first of which is its output number `first_indexes[i]`; the ids follow each other in `token_ids`.

    A handle is a router's uint32 name for a choice; a request with n choices owns n consecutive handles, and
    the first names the request.
    """

    handles: list[int] = field(default_factory=list)
    first_indexes: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finishes: list[Finish] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    prompts: list[PromptStats] = field(default_factory=list)

    def add(self, handle: int, first_index: int, token_id: int) -> None:
        """Append one token of one choice."""
        self.handles.append(handle)
        self.first_indexes.append(first_index)
        self.counts.append(1)
        self.token_ids.append(token_id)

    def __bool__(self) -> bool:
        return bool(self.handles or self.finishes or self.prompts)


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """How busy an engine is; the router uses it only to correct its own accounting."""

    num_running: int = 0
    num_waiting: int = 0
    num_free_blocks: int = 0
    num_total_blocks: int = 0
    num_exported_blocks: int = 0
    """Held for a decode worker to pull."""
    num_prefill_tokens_waiting: int = 0
    num_preemptions: int = 0
    prefix_cache_queries: int = 0
    """Tokens looked up since start."""
    prefix_cache_hits: int = 0
    """Tokens found since start."""
    kv_bytes_pulled: int = 0
    """Bytes of KV that hand-over has brought here since start; the worker fills it in, not the engine."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a request goes, and why."""

    prefill: str | None
    decode: str | None
    reasons: tuple[str, ...] = ()
