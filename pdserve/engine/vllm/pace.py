"""How long vLLM takes to compute prompts, by its own clock: what a worker weighs against fetching them.

vLLM's steps are not ours to time: several run while we wait for one output. But with its first output each request
tells when it was first scheduled and when its first token came. Prompts that are computed side by side share that time,
so only what no other one has accounted for is counted.
"""

from __future__ import annotations

import threading
from collections import deque

from pdserve.engine.base import StepResult

MIN_TOKENS = 64
"""Computed of a prompt; shorter ones say more of the decodes in their step."""
MAX_SPANS = 64
"""Of time that is accounted for; vLLM tells of prompts in about the order in which they end."""


class PrefillPace:
    """`add` is called in the driver's thread, `measured` in the engine's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counted: deque[tuple[float, float]] = deque(maxlen=MAX_SPANS)
        """Spans that don't overlap."""
        self._num_tokens = 0
        self._seconds = 0.0
        self._growing = False

    def add(self, num_tokens: int, scheduled_s: float, first_token_s: float) -> None:
        """A prompt of which so many tokens were computed between these times."""
        if num_tokens < MIN_TOKENS or not 0.0 < scheduled_s < first_token_s:
            return
        with self._lock:
            self._num_tokens += num_tokens
            self._seconds += self._count(scheduled_s, first_token_s)
            self._growing = True

    def _count(self, begin: float, end: float) -> float:
        """How much of this span is new."""
        overlapping = [span for span in self._counted if span[0] < end and begin < span[1]]
        known = sum(min(end, span[1]) - max(begin, span[0]) for span in overlapping)
        for span in overlapping:
            self._counted.remove(span)
        starts, ends = zip((begin, end), *overlapping, strict=True)
        self._counted.append((min(starts), max(ends)))
        return end - begin - known

    def measured(self) -> StepResult:
        """A step's result with what was measured, once a call has passed without news: prompts of one batch are told
        one by one."""
        with self._lock:
            growing, self._growing = self._growing, False
            if growing or not self._seconds:
                return StepResult()
            result = StepResult(num_prompt_tokens=self._num_tokens, prefill_s=self._seconds)
            self._num_tokens, self._seconds = 0, 0.0
            return result
