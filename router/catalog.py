"""What shaped each answer: a bounded memory of ended requests, for `explain`. No prompt, no output, no token ids."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from msgspec.structs import asdict

from pdserve.types import WorkerInfo
from router.scheduling.base import Decision, Forecast, Pick
from router.session import Link


@dataclass(slots=True)
class Attempt:
    """One placement of a request: what was chosen, why, what was expected and what came of it. Times are seconds since
    the request's arrival; None: it never got there."""

    bound_s: float
    waited_s: float
    """At the router, for a worker."""
    prefill_worker: str | None
    decode_worker: str | None
    prefill_incarnation: int | None
    decode_incarnation: int | None
    prefix_store: str
    """host:port of another node's store that the prefix was to come from; empty: none."""
    picks: tuple[Pick, ...]
    forecast: Forecast
    prefix_source: str = ""
    """How the cache of the worker that prefills was known: "events", "guess", "distrusted"; empty: not asked."""
    num_prior_tokens: int = 0
    """Output tokens that earlier attempts had given."""
    num_decoded_tokens: int = 0
    """Of each choice, after the first at the worker that decodes."""
    num_cached_tokens: int | None = None
    num_fetched_tokens: int | None = None
    first_token_s: float | None = None
    kv_arrived_s: float | None = None
    """Decode has all the KV."""
    decode_started_s: float | None = None
    ended_s: float | None = None
    outcome: str = ""
    handover_failed: bool = False
    spared_s: float = 0.0
    """Estimated: the stall that computing the prompt on the decode worker would have meant to those who decode there,
    all together."""

    def rebound(self, decision: Decision[Link]) -> None:
        """Its decode worker was lost before anything was handed over, and another one goes on."""
        if decision.decode is not None:
            info = decision.decode.info
            self.decode_worker, self.decode_incarnation = info.worker_id, info.incarnation
            self.picks += decision.picks

    @property
    def alone(self) -> str:
        """Why one worker did it all; empty for a pair."""
        notes = (note for pick in self.picks for note in pick.notes)
        return next((note.partition("=")[2] for note in notes if note.startswith("alone=")), "")

    @property
    def link(self) -> tuple[str, str] | None:
        """(prefill, decode) of a pair."""
        if self.prefill_worker is None or self.decode_worker is None:
            return None
        return self.prefill_worker, self.decode_worker

    @property
    def computes(self) -> tuple[str, int]:
        """The worker that computes the prompt, and its incarnation."""
        if self.prefill_worker is not None:
            return self.prefill_worker, self.prefill_incarnation or 0
        return self.decode_worker or "", self.decode_incarnation or 0

    def as_dict(self) -> dict[str, object]:
        plain = {name: getattr(self, name) for name in self.__slots__}
        plain["picks"] = [_plain_pick(pick) for pick in self.picks]
        plain["forecast"] = asdict(self.forecast) | {"ttft_s": self.forecast.ttft_s}
        plain["observed"] = self.observed()
        return plain

    def observed(self) -> dict[str, float | None]:
        """The same quantities as the forecast's, as they came out."""
        return {
            "ttft_s": _between(self.bound_s, self.first_token_s),
            "transfer_s": _between(self.first_token_s, self.kv_arrived_s or self.decode_started_s),
            "queue_decode_s": _between(self.kv_arrived_s, self.decode_started_s),
            "itl_s": self._itl_s(),
        }

    def _itl_s(self) -> float | None:
        started = self.decode_started_s or self.first_token_s
        if started is None or self.ended_s is None or self.num_decoded_tokens < 1:
            return None
        return (self.ended_s - started) / self.num_decoded_tokens


def attempt_of(decision: Decision[Link], bound_s: float, num_prior_tokens: int) -> Attempt:
    prefill = decision.prefill.info if decision.prefill is not None else None
    decode = decision.decode.info if decision.decode is not None else None
    pair = decision.decode if prefill is not None else None
    return Attempt(
        bound_s,
        decision.waited_s,
        *_names(prefill, decode),
        decision.prefix_store,
        decision.picks,
        decision.forecast,
        num_prior_tokens=num_prior_tokens,
        spared_s=pair.own.num_seqs * decision.forecast.prefill_s if pair is not None else 0.0,
    )


def _names(
    prefill: WorkerInfo | None, decode: WorkerInfo | None
) -> tuple[str | None, str | None, int | None, int | None]:
    return (
        prefill.worker_id if prefill else None,
        decode.worker_id if decode else None,
        prefill.incarnation if prefill else None,
        decode.incarnation if decode else None,
    )


def _plain_pick(pick: Pick) -> dict[str, object]:
    return {
        "role": pick.role,
        "worker": pick.worker_id,
        "passed": pick.num_passed,
        "workers": pick.num_workers,
        "scores": dict(pick.scores),
        "candidates": dict(pick.others),
        "notes": list(pick.notes),
    }


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start


@dataclass(slots=True)
class Record:
    """One request. Times are seconds since its arrival; None: it never got there."""

    request_id: str
    model: str
    revision: str
    arrived_at: float
    """Unix time, seconds."""
    policy: str = ""
    attempts: list[Attempt] = field(default_factory=list)
    """More than one: a worker was lost or refused it, and it was placed again."""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_fetched_tokens: int = 0
    num_output_tokens: int = 0
    num_choices: int = 1
    priority: int = 0
    seed: int | None = None
    seed_was_drawn: bool = False
    tokenised_s: float | None = None
    first_token_s: float | None = None
    decode_started_s: float | None = None
    ended_s: float | None = None
    outcome: str = ""
    """"ok", "cancelled", or the reason of the error that ended it."""
    leg: str = ""
    """Where it failed, if it did."""
    finish_reasons: tuple[str, ...] = ()
    """By choice; empty where one had not ended."""

    @property
    def last(self) -> Attempt | None:
        return self.attempts[-1] if self.attempts else None

    @property
    def prefill_worker(self) -> str | None:
        return self.attempts[-1].prefill_worker if self.attempts else None

    @property
    def decode_worker(self) -> str | None:
        return self.attempts[-1].decode_worker if self.attempts else None

    @property
    def decode_incarnation(self) -> int | None:
        return self.attempts[-1].decode_incarnation if self.attempts else None

    @property
    def bound_s(self) -> float | None:
        """When the attempt that gave the first token was bound."""
        given = (attempt.bound_s for attempt in self.attempts if attempt.first_token_s is not None)
        return next(given, self.attempts[-1].bound_s if self.attempts else None)

    def as_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        plain = {name: getattr(self, name) for name in self.__slots__ if name != "attempts"}
        plain["attempts"] = [attempt.as_dict() for attempt in self.attempts]
        last = self.last
        for name in ("prefill_worker", "decode_worker", "prefill_incarnation", "decode_incarnation"):
            plain[name] = getattr(last, name) if last else None
        plain["reasons"] = [reason for pick in (last.picks if last else ()) for reason in pick.reasons()]
        return plain


class Catalog:
    """The last `capacity` ended requests, by id."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._records: OrderedDict[str, Record] = OrderedDict()

    def __len__(self) -> int:
        return len(self._records)

    def add(self, record: Record) -> None:
        if self._capacity == 0:
            return
        self._records.pop(record.request_id, None)
        self._records[record.request_id] = record
        if len(self._records) > self._capacity:
            self._records.popitem(last=False)

    def find(self, request_id: str) -> Record | None:
        return self._records.get(request_id)
