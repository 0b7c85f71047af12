"""What shaped each answer: a bounded memory of ended requests, for `explain`. No prompt, no output."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import asdict, dataclass

from router.scheduling.scheduler import Pick


@dataclass(slots=True)
class Record:
    """One request. Times are seconds since its arrival; None: it never got there."""

    request_id: str
    model: str
    revision: str
    arrived_at: float
    """Unix time, seconds."""
    prefill_worker: str | None = None
    decode_worker: str | None = None
    prefill_incarnation: int | None = None
    decode_incarnation: int | None = None
    picks: tuple[Pick, ...] = ()
    """Why these workers: `reasons` has it in words."""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_choices: int = 1
    seed: int | None = None
    seed_was_drawn: bool = False
    tokenised_s: float | None = None
    first_token_s: float | None = None
    decode_started_s: float | None = None
    ended_s: float | None = None
    outcome: str = ""
    """"ok", "cancelled", or the reason of the error that ended it."""
    finish_reasons: tuple[str, ...] = ()
    """By choice; empty where one had not ended."""

    def as_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        plain = asdict(self)
        plain["reasons"] = [reason for pick in self.picks for reason in pick.reasons()]
        del plain["picks"]
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
