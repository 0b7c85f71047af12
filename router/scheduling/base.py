"""The contract of scheduling: how a request gets its workers, and the language that policies are written in.

Who serves requests (the router, the simulator) holds one `Policy` (made by name in `policies`) and drives it:

    ask = Ask(request_id, model, num_prompt_tokens, max_tokens, keys=packed block keys, ...)
    policy.enqueue(ask)                         # a request has arrived; nothing is sent yet
    for decision in policy.decide(workers, version):   # whenever something below has happened
        ...submit decision.ask to decision.prefill / decision.decode, or fail it with decision.error
    policy.prefilled(ask, cached, fetched)      # its prompt is computed (PromptStats or the first token)
    policy.decoding(ask)                        # decode has all its KV (its first token of a pair)
    policy.ended(ask, num_output_tokens)        # for whatever reason, once; before it is placed: the client has gone

Call `decide` after `enqueue`, `prefilled`, `ended`, when a worker comes, goes, drains or changes (`version` grows),
and at `next_wakeup()`, a time of the policy's clock or None. It is cheap when there is nothing to place. Until a
decision names its workers a request waits in the policy, in no engine's queue: it is bound late. What was placed is
counted here (`stations`), exactly and at once: a worker's reports (`Candidate.foreign`) only add what others put there.
A decision with `prefill` and `decode` is a pair, one with a single worker runs in phase FULL there (a prefill worker
when one token is wanted, a decode worker when disaggregation would not pay). `prefix_store`, when not empty, goes into
prefill's `Submission.prefix_store`. When a pair's decode worker is lost before it was bound, `redecide(ask, workers,
version)` names another one. When a worker is lost with a request on it: `ended`, then `enqueue` a new `Ask`.

The language: a *filter* says why a worker can't take a request, a *scorer* rates those that can from 0 to 1, a *picker*
chooses. Prefill and decode are two profiles, not two schedulers. Nothing here knows of streams or clocks: `Candidate`
is what a policy may see of a worker, time comes from a clock that is passed in, so the simulator runs these classes
as they are. Nothing here sees a prompt: only its length and its block keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from msgspec import Struct

from kvstore.index.base import NodeReach
from pdserve.errors import PdserveError
from pdserve.types import Role, WorkerInfo

WorkerT = TypeVar("WorkerT", bound="Candidate")
WorkerT_co = TypeVar("WorkerT_co", bound="Candidate", covariant=True)


@dataclass(slots=True)
class Outstanding:
    """Work on a worker that has not ended: sequences in or before its batch, prompt tokens to compute, and tokens of
    context held."""

    num_seqs: int = 0
    num_prefill_tokens: int = 0
    num_context_tokens: int = 0


class Candidate(Protocol):
    """A connected worker."""

    @property
    def info(self) -> WorkerInfo: ...

    @property
    def draining(self) -> bool: ...

    @property
    def own(self) -> Outstanding:
        """What this router has put there: exact and at once."""
        ...

    @property
    def foreign(self) -> Outstanding:
        """What the worker's last report held beyond that: other routers' requests."""
        ...


@dataclass(frozen=True, slots=True)
class Need:
    """What is to be placed. Token counts size the work; `partner` is the worker that has the other half, if one is
    chosen already."""

    role: Role
    model: str
    num_prompt_tokens: int
    max_tokens: int
    partner: WorkerInfo | None = None
    session: str = ""
    reach: Mapping[str, NodeReach] = field(default_factory=dict)
    """Leading blocks of the prompt that are held, by worker id and store address (`PrefixView.match`)."""


class Filter(Protocol):
    def refuse(self, worker: Candidate, need: Need) -> str | None:
        """A machine-readable reason such as "draining", or None to let it pass."""
        ...


class Scorer(Protocol):
    def score(self, workers: Sequence[Candidate], need: Need) -> Sequence[float]:
        """One value in [0, 1] for each worker, 1 the best."""
        ...


class Picker(Protocol):
    def pick(self, scores: Sequence[float]) -> int:
        """The index of the chosen one; `scores` is not empty."""
        ...


@dataclass(frozen=True, slots=True)
class Weighted:
    """A scorer in a profile. `name` is what placement reasons call it."""

    name: str
    scorer: Scorer
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Profile:
    """A policy, as data. `standing` filters look at the worker, role and model only, so their verdict holds until some
    worker changes; `filters` look at the request too and are asked each time."""

    standing: tuple[Filter, ...]
    filters: tuple[Filter, ...]
    scorers: tuple[Weighted, ...]
    picker: Picker


# --- the contract with whoever serves ---


@dataclass(slots=True, eq=False)
class Ask:
    """A request that wants workers. Identity is the object: keep it until `ended`."""

    request_id: str
    model: str
    num_prompt_tokens: int
    max_tokens: int
    keys: bytes = b""
    """Packed keys of the prompt's full blocks (`Request.block_keys`), 16 bytes each; empty: nothing can be reused."""
    num_choices: int = 1
    priority: int = 0
    """Lower is served first, as in engines."""
    session: str = ""
    """A client's name for its conversation; empty: none."""
    ttft_slo_s: float | None = None
    disaggregate: bool = True
    """False: one worker does all of it."""
    arrived_s: float = 0.0
    """Set by `enqueue`, in the policy's clock."""


class Forecast(Struct, frozen=True):
    """What a decision expects, in seconds from now: waiting for the worker, fetching a prefix from a store, computing
    the rest; then moving the KV to decode, and the time between tokens there. Tokens: of the prompt, found in the
    worker's own memory or its node's store (`num_cached_tokens`, fetched ones among them)."""

    queue_s: float = 0.0
    fetch_s: float = 0.0
    prefill_s: float = 0.0
    transfer_s: float = 0.0
    itl_s: float = 0.0
    num_cached_tokens: int = 0
    num_fetched_tokens: int = 0

    @property
    def ttft_s(self) -> float:
        return self.queue_s + self.fetch_s + self.prefill_s


class Pick(Struct, frozen=True):
    """Why a worker was taken for a role; put into words only when somebody asks."""

    role: str
    worker_id: str
    num_passed: int
    num_workers: int
    scores: tuple[tuple[str, float], ...]
    """Of the chosen one, by scorer: in [0, 1], or seconds where the name ends in `_s`."""
    others: tuple[tuple[str, float], ...] = ()
    """The candidates by worker id, with what the choice was made by; at most `MAX_LOGGED_CANDIDATES`, best first."""
    notes: tuple[str, ...] = ()
    """Machine-readable circumstances: "load_bound=p1", "waited_for=p0", "alone=short_suffix"."""

    def reasons(self) -> list[str]:
        scores = [f"{self.role}.{name}={score:.3f}" for name, score in self.scores]
        return [
            f"{self.role}={self.worker_id}",
            f"{self.role}.candidates={self.num_passed}/{self.num_workers}",
            *scores,
            *(f"{self.role}.{note}" for note in self.notes),
        ]


MAX_LOGGED_CANDIDATES = 16
"""Of a pick; a large pool's would make the decision log the router's largest memory."""


class Decision(Struct, Generic[WorkerT_co], frozen=True):
    """Where an ask goes, or (`error`) why it can't be placed: no worker may take it."""

    ask: Ask
    prefill: WorkerT_co | None = None
    decode: WorkerT_co | None = None
    prefix_store: str = ""
    """host:port of another node's store that holds more of the prefix than the worker's own node."""
    forecast: Forecast = Forecast()
    waited_s: float = 0.0
    picks: tuple[Pick, ...] = ()
    error: PdserveError | None = None

    @property
    def reasons(self) -> tuple[str, ...]:
        """Machine-readable: "decode=w1", "decode.candidates=2/3", "decode.least_context_tokens=0.75", ..."""
        return tuple(reason for pick in self.picks for reason in pick.reasons())


class PrefixView(Protocol):
    """Who holds a prompt's leading blocks: a `kvstore.index.KVIndex`, its nodes named by worker id (HBM) and by the
    store's address as workers give it (`WorkerInfo.store_address`)."""

    def match(self, keys: bytes, fingerprint: bytes) -> Mapping[str, NodeReach]: ...


class NoPrefixes:
    """A view that knows nothing."""

    def match(self, keys: bytes, fingerprint: bytes) -> Mapping[str, NodeReach]:
        return {}


class Policy(Protocol[WorkerT]):
    """See the module's head. One event loop; nothing blocks."""

    def enqueue(self, ask: Ask) -> None: ...

    def decide(self, workers: Sequence[WorkerT], version: int) -> list[Decision[WorkerT]]:
        """What can be bound now, in the order in which it should be sent, and what can't be served at all."""
        ...

    def redecide(self, ask: Ask, workers: Sequence[WorkerT], version: int) -> Decision[WorkerT]:
        """Another decode worker for a pair whose own was lost before it was bound."""
        ...

    def next_wakeup(self) -> float | None: ...

    def prefilled(self, ask: Ask, num_cached_tokens: int, num_fetched_tokens: int = 0) -> None: ...

    def decoding(self, ask: Ask) -> None: ...

    def ended(self, ask: Ask, num_output_tokens: int = 0) -> None: ...

    @property
    def num_waiting(self) -> int:
        """Asks that are not bound yet."""
        ...
