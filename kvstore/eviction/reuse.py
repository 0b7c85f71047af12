"""When a block will be used again: learnt hazards by kind and age, and what keeping a block is worth.

A *kind* is a number that the policy gives to blocks that behave alike; *age* is the time since the last use. For each
kind and age bin this table counts reuses and exposure (block-seconds spent at that age). The hazard of a cell is
reuses / exposure, shrunk towards what coarser views say: ever wider windows of age, then all kinds of its family
together, then a prior. So a new table ranks by age alone, as LRU does, and each cell departs from that only as far as
its own reuses carry.

Memory: two floats a cell, whatever the pool's size.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt

Table = npt.NDArray[np.float64]
"""[kinds, bins]"""

EDGES_S = (0.0, *(0.25 * 1.6**power for power in range(28)))
"""Age bins are [EDGES_S[i], EDGES_S[i + 1]): geometric, from a quarter second to a day; the last takes the rest."""
BINS = len(EDGES_S) - 1
WIDTHS_S: tuple[float, ...] = tuple(np.diff(EDGES_S).tolist())

_PRIOR_SHAPE = 0.3
_PRIOR_OFFSET_S = 30.0
"""Before anything is known the hazard is shape / (age + offset): falling with age, in no unit but time's."""
_POOL_REQUESTS = 100.0
_KIND_REQUESTS = 3.0
"""Reuses, counted in requests, that it takes to believe the counts (of a family, of one kind) as much as the coarser
view. Broad optima: between 30 and 100, and 2 and 4, hit ratios moved by less than .003 on all loads tried."""
_HALF_LIFE_S = 3600.0
"""Counts fade, so that the table follows a load that changes with the hours of the day."""


def bin_of(age_s: float) -> int:
    return min(bisect_right(EDGES_S, age_s) - 1, BINS - 1)


class ReuseTable:
    """Counts, in blocks, since one request's blocks may come back in part."""

    def __init__(self, families: Sequence[int]) -> None:
        """`families` says how many kinds each family has; kinds are numbered through."""
        kinds = sum(families)
        ends = accumulate(families)
        self._families = [slice(end - size, end) for size, end in zip(families, ends, strict=True)]
        self._reuses = [[0.0] * BINS for _ in range(kinds)]
        self._exposure_s = [[0.0] * BINS for _ in range(kinds)]
        self._blocks = 0.0
        self._blocks_squared = 0.0

    def passed(self, kind: int, first: int, last: int, blocks: int) -> None:
        """`blocks` lived through the whole of the bins [first, last)."""
        exposure_s = self._exposure_s[kind]
        for age_bin in range(first, last):
            exposure_s[age_bin] += blocks * WIDTHS_S[age_bin]

    def stayed(self, kind: int, age_bin: int, blocks: int, age_s: float) -> None:
        """`blocks` left the bin at `age_s`."""
        self._exposure_s[kind][age_bin] += blocks * max(0.0, age_s - EDGES_S[age_bin])

    def reused(self, kind: int, age_bin: int, blocks: int) -> None:
        self._reuses[kind][age_bin] += blocks

    def came(self, blocks: int) -> None:
        """A run of `blocks` was used: runs move as one, so their mean size says how many blocks one observation has."""
        self._blocks += blocks
        self._blocks_squared += blocks * blocks

    def grew(self, blocks: int, by: int) -> None:
        """A run that came is longer by so many blocks than was told, `blocks` in all."""
        self._blocks += by
        self._blocks_squared += blocks * blocks - (blocks - by) * (blocks - by)

    def fade(self, elapsed_s: float) -> None:
        factor = 0.5 ** (elapsed_s / _HALF_LIFE_S)
        self._reuses = [[count * factor for count in row] for row in self._reuses]
        self._exposure_s = [[seconds * factor for seconds in row] for row in self._exposure_s]
        self._blocks *= factor
        self._blocks_squared *= factor

    def hazards(self) -> Table:
        """Reuses a second, by kind and age bin; positive everywhere."""
        blocks_per_run = self._blocks_squared / self._blocks if self._blocks else 1.0
        reuses, exposure = np.array(self._reuses), np.array(self._exposure_s)
        middles = np.convolve(EDGES_S, [0.5, 0.5], "valid")
        prior = (_PRIOR_SHAPE / (middles + _PRIOR_OFFSET_S))[None]
        trust = _POOL_REQUESTS * blocks_per_run
        hazards = np.empty_like(reuses)
        for family in self._families:
            seen, spent_s = reuses[family].sum(0, keepdims=True), exposure[family].sum(0, keepdims=True)
            hazards[family] = _refined(prior, seen, spent_s, trust)
        return _refined(hazards, reuses, exposure, _KIND_REQUESTS * blocks_per_run)

    def values(self) -> Table:
        """What a block is worth now, by kind and age bin: expected hits per second of room (a Gittins index).

        That is the maximum over all spans of P(reused within the span) / E[time held in it].
        """
        hazards = self.hazards()
        steps = hazards * WIDTHS_S
        held_s = -np.expm1(-steps) / hazards
        reach = np.concatenate((np.zeros((len(steps), 1)), np.cumsum(steps, axis=1)), axis=1)
        best = np.empty_like(hazards)
        for first in range(BINS):
            ahead = reach[:, first:] - reach[:, first : first + 1]
            time_s = np.cumsum(np.exp(-ahead[:, :-1]) * held_s[:, first:], axis=1)
            best[:, first] = (-np.expm1(-ahead[:, 1:]) / time_s).max(axis=1)
        return best


def _refined(coarse: Table, reuses: Table, exposure_s: Table, trust: float) -> Table:
    """`coarse` hazards corrected by the counts, first over long windows of age, at last bin by bin.

    Each bin is scaled by (seen + trust) / (expected + trust) of its window: a gamma prior worth `trust` reuses.
    """
    hazards = coarse.copy()
    for reach in (BINS, 8, 4, 2, 1, 0):
        seen, expected = _windowed(reuses, reach), _windowed(exposure_s * hazards, reach)
        hazards *= (seen + trust) / (expected + trust)
    return hazards


def _windowed(cells: Table, reach: int) -> Table:
    """Sums over the bins up to `reach` away, by row."""
    sums = np.concatenate((np.zeros((len(cells), 1)), np.cumsum(cells, axis=1)), axis=1)
    bins = np.arange(BINS)
    return sums[:, np.minimum(bins + reach + 1, BINS)] - sums[:, np.maximum(bins - reach, 0)]
