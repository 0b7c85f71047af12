"""Ratings of workers, each in [0, 1]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b

from router.scheduling.base import Candidate, Need


def inverse_of(costs: Sequence[float]) -> list[float]:
    """1 for no cost, 0 for the largest; all 1 when nobody has any."""
    largest = max(costs)
    return [1.0 - cost / largest for cost in costs] if largest > 0 else [1.0] * len(costs)


class LeastTokens:
    """Fewest tokens outstanding: prompt tokens to compute for prefill, context held for decode. Own work is counted
    the moment it is placed; a worker's report only adds what others have put there."""

    def __init__(self, tokens: Callable[[Candidate], int]) -> None:
        self._tokens = tokens

    def score(self, workers: Sequence[Candidate], need: Need) -> Sequence[float]:
        return inverse_of([float(self._tokens(worker)) for worker in workers])


class LeastSeqs:
    """Fewest sequences for the seats that the worker has."""

    def score(self, workers: Sequence[Candidate], need: Need) -> Sequence[float]:
        return inverse_of([(w.own.num_seqs + w.foreign.num_seqs) / max(1, w.info.max_num_seqs) for w in workers])


def prefill_tokens(worker: Candidate) -> int:
    return worker.own.num_prefill_tokens + worker.foreign.num_prefill_tokens


def context_tokens(worker: Candidate) -> int:
    return worker.own.num_context_tokens + worker.foreign.num_context_tokens


class Equal:
    """All alike: the picker decides."""

    def score(self, workers: Sequence[Candidate], need: Need) -> Sequence[float]:
        return [1.0] * len(workers)


class LongestPrefix:
    """How much of the prompt the worker holds already. Alone it is a trap: what all prompts share draws them all to one
    worker."""

    def score(self, workers: Sequence[Candidate], need: Need) -> Sequence[float]:
        held = [need.reach.get(worker.info.worker_id) for worker in workers]
        tokens = [
            found.hbm * worker.info.block_tokens if found else 0 for found, worker in zip(held, workers, strict=True)
        ]
        return [min(1.0, count / max(1, need.num_prompt_tokens)) for count in tokens]


class SameSession:
    """One worker for a client's session, by rendezvous hashing: when a worker goes, only its own sessions move. All
    alike for requests without one."""

    def score(self, workers: Sequence[Candidate], need: Need) -> Sequence[float]:
        if not need.session:
            return [0.0] * len(workers)
        weights = [blake2b(f"{need.session}\0{w.info.worker_id}".encode(), digest_size=8).digest() for w in workers]
        best = max(weights)
        return [1.0 if weight == best else 0.0 for weight in weights]
