"""From scores to one worker."""

from __future__ import annotations

import random
from collections.abc import Sequence


class MaxScore:
    """The highest score; equals are drawn by lot, or idle pools would send everything to their first worker."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def pick(self, scores: Sequence[float]) -> int:
        best = max(scores)
        equals = [index for index, score in enumerate(scores) if score == best]
        return equals[0] if len(equals) == 1 else self._rng.choice(equals)


class RoundRobin:
    """The next one of as many as there are, whatever their scores."""

    def __init__(self) -> None:
        self._next = 0

    def pick(self, scores: Sequence[float]) -> int:
        index = self._next % len(scores)
        self._next = index + 1
        return index


class TwoChoices:
    """The better of two drawn by lot: nearly as good as the best of all, and no herd runs to one idle worker."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def pick(self, scores: Sequence[float]) -> int:
        if len(scores) == 1:
            return 0
        first, second = self._rng.sample(range(len(scores)), 2)
        return first if scores[first] >= scores[second] else second
