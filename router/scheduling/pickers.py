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
