"""Ratings of workers, each in [0, 1]."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
