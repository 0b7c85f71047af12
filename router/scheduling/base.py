"""The contract of scheduling: three one-method protocols, and a profile that combines them as data.

A *filter* says why a worker can't take a request, a *scorer* rates those that can from 0 to 1, a *picker* chooses.
Prefill and decode are two profiles, not two schedulers. Nothing here knows of streams: `Candidate` is what a
scheduler may see of a worker, so the simulator runs these classes as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pdserve.types import Role, WorkerInfo


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
