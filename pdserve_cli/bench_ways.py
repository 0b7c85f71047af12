"""Ways to do the same thing, timed side by side: each round runs each way once, in an order of its own."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

MIN_WAY_S = 0.02
"""A way that is faster than this is run several times a round: a single run would time the clock's neighbours."""


def _nothing() -> float:
    return 0.0


@dataclass(slots=True)
class Way:
    """`run` moves `nbytes`."""

    nbytes: int
    run: Callable[[], None]
    prepare: Callable[[], None] = lambda: None
    """Before each round, not timed."""
    cpu_s: Callable[[], float] = _nothing
    """CPU seconds of other processes so far."""
    repeat: int = 1
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def warm_up(self) -> None:
        """Run once, uncounted, and find how often a round should run it."""
        self.prepare()
        began = time.perf_counter()
        self.run()
        took = time.perf_counter() - began
        self.repeat = max(1, min(256, int(MIN_WAY_S / max(took, 1e-6))))

    def measure(self) -> None:
        self.prepare()
        cpu, began = time.process_time() + self.cpu_s(), time.perf_counter()
        for _ in range(self.repeat):
            self.run()
        took = time.perf_counter() - began
        self.seconds.append(took / self.repeat)
        self.cpu.append((time.process_time() + self.cpu_s() - cpu) / self.repeat)

    @property
    def gb_per_s(self) -> float:
        return self.nbytes / 1e9 / statistics.median(self.seconds)

    @property
    def cpu_s_per_gb(self) -> float:
        return statistics.fmean(self.cpu) / (self.nbytes / 1e9)


def interleave(ways: Mapping[str, Way], rounds: int) -> None:
    """Measure all of them; their figures are in them afterwards."""
    for way in ways.values():
        way.warm_up()
    for turn in range(rounds):
        for way in random.Random(turn).sample(list(ways.values()), len(ways)):
            way.measure()


def ratio(ours: Way, others: list[Way]) -> float:
    """Ours over the other that is fastest by its median, round by round, so that what slowed a whole round cancels;
    the median of that."""
    best = max(others, key=lambda way: way.gb_per_s)
    return statistics.median(theirs / mine for theirs, mine in zip(best.seconds, ours.seconds, strict=True))
