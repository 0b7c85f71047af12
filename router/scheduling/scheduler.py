"""Runs the profiles: one worker for a role, or a pair that can hand KV over."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic

from pdserve.errors import NoWorker
from pdserve.types import Role
from router.scheduling.base import Candidate, Filter, Need, Pick, Profile, Weighted, WorkerT
from router.scheduling.filters import (
    FitsPool,
    HasBlockSize,
    HasRole,
    MatchesPartner,
    NotDraining,
    ServesModel,
    compatible,
)
from router.scheduling.pickers import MaxScore
from router.scheduling.scorers import LeastSeqs, LeastTokens, context_tokens, prefill_tokens

MAX_NAMED_REFUSALS = 8
"""Candidates whose refusal an error names; a large pool's would not fit a status message."""


@dataclass(frozen=True, slots=True)
class Placed(Generic[WorkerT]):
    """`prefill` is None where decode does everything, `decode` where prefill does."""

    prefill: WorkerT | None
    decode: WorkerT | None
    picks: tuple[Pick, ...]

    @property
    def reasons(self) -> tuple[str, ...]:
        """Machine-readable: "decode=w1", "decode.candidates=2/3", "decode.least_context_tokens=0.75", ..."""
        return tuple(reason for pick in self.picks for reason in pick.reasons())


def standing_and_filters(block_tokens: int) -> tuple[tuple[Filter, ...], tuple[Filter, ...]]:
    """Those of every profile."""
    return (HasRole(), ServesModel(), NotDraining(), HasBlockSize(block_tokens)), (FitsPool(), MatchesPartner())


def least_loaded(seed: int, block_tokens: int) -> dict[Role, Profile]:
    """The default policy. Tokens weigh more than seats: a step's time follows tokens, seats only bound it."""
    standing, filters = standing_and_filters(block_tokens)
    picker = MaxScore(random.Random(seed))
    seqs = Weighted("least_seqs", LeastSeqs(), 1.0)
    prefill = Weighted("least_prefill_tokens", LeastTokens(prefill_tokens), 2.0)
    decode = Weighted("least_context_tokens", LeastTokens(context_tokens), 1.0)
    return {
        Role.PREFILL: Profile(standing, filters, (prefill, seqs), picker),
        Role.DECODE: Profile(standing, filters, (decode, seqs), picker),
    }


class Scheduler(Generic[WorkerT]):
    """Places requests on workers by one profile a role. `version` grows whenever a worker comes, goes or changes."""

    def __init__(self, profiles: dict[Role, Profile]) -> None:
        self._profiles = profiles
        self._version = -1
        self._pools: dict[tuple[Role, str], list[WorkerT]] = {}
        self._partnered: dict[str, list[WorkerT]] = {}

    def place_one(self, workers: Sequence[WorkerT], version: int, need: Need) -> Placed[WorkerT]:
        """The whole request on one worker of the needed role. Raises `NoWorker`."""
        worker, pick = self._choose(self._pool(workers, version, need.role, need.model), workers, need)
        return Placed(worker, None, (pick,)) if need.role is Role.PREFILL else Placed(None, worker, (pick,))

    def place_pair(self, workers: Sequence[WorkerT], version: int, need: Need) -> Placed[WorkerT]:
        """Decode first, for that leg lasts longest; then the prefill worker that suits it. Raises `NoWorker` naming
        the role that is missing."""
        prefills = self._pool(workers, version, Role.PREFILL, need.model)
        decodes = self._pool(workers, version, Role.DECODE, need.model)
        if need.model not in self._partnered:
            self._partnered[need.model] = [each for each in decodes if _has_partner(each, prefills)]
        sizes = need.model, need.num_prompt_tokens, need.max_tokens
        decode_need = Need(Role.DECODE, *sizes, None, need.session, need.reach)
        decode, decode_pick = self._choose(self._partnered[need.model] or decodes, workers, decode_need)
        prefill_need = Need(Role.PREFILL, *sizes, decode.info, need.session, need.reach)
        prefill, prefill_pick = self._choose(prefills, workers, prefill_need)
        return Placed(prefill, decode, (prefill_pick, decode_pick))

    def _pool(self, workers: Sequence[WorkerT], version: int, role: Role, model: str) -> list[WorkerT]:
        """Those that pass the standing filters."""
        if version != self._version:
            self._version = version
            self._pools.clear()
            self._partnered.clear()
        pool = self._pools.get((role, model))
        if pool is None:
            filters, need = self._profiles[role].standing, Need(role, model, 0, 0)
            pool = self._pools[role, model] = [each for each in workers if refusal(filters, each, need) is None]
        return pool

    def _choose(self, pool: Sequence[WorkerT], workers: Sequence[WorkerT], need: Need) -> tuple[WorkerT, Pick]:
        profile = self._profiles[need.role]
        passed = [worker for worker in pool if refusal(profile.filters, worker, need) is None]
        if not passed:
            raise no_worker(profile.standing + profile.filters, workers, need)
        totals, parts = _scores(profile, passed, need)
        index = profile.picker.pick(totals)
        chosen = passed[index]
        scores = tuple([(name, values[index]) for name, values in parts])
        return chosen, Pick(need.role.value, chosen.info.worker_id, len(passed), len(workers), scores)


def refusal(filters: Sequence[Filter], worker: Candidate, need: Need) -> str | None:
    for each in filters:
        reason = each.refuse(worker, need)
        if reason is not None:
            return reason
    return None


def _scores(
    profile: Profile, workers: Sequence[Candidate], need: Need
) -> tuple[list[float], list[tuple[str, Sequence[float]]]]:
    parts = [(each.name, each.scorer.score(workers, need)) for each in profile.scorers]
    totals = [0.0] * len(workers)
    for each, (_, scores) in zip(profile.scorers, parts, strict=True):
        for index, score in enumerate(scores):
            totals[index] += each.weight * score
    return totals, parts


def no_worker(filters: Sequence[Filter], workers: Sequence[Candidate], need: Need) -> NoWorker:
    refused = [f"{worker.info.worker_id}: {refusal(filters, worker, need)}" for worker in workers]
    named = ", ".join(refused[:MAX_NAMED_REFUSALS]) or "none is connected"
    more = f" and {len(refused) - MAX_NAMED_REFUSALS} more" if len(refused) > MAX_NAMED_REFUSALS else ""
    role = need.role.value
    return NoWorker(f"no {role} worker can take this request for {need.model} ({named}{more})", leg=role)


def _has_partner(worker: Candidate, others: Sequence[Candidate]) -> bool:
    return any(compatible(worker.info, other.info) for other in others)
