"""How long things will take: the engine's timing model, corrected for each worker by what is observed there.

One `Predictor` serves a whole pool; `Pace` is a worker's own factor on it. Seconds everywhere.
"""

from __future__ import annotations

from functools import lru_cache

from pdserve.engine.timing import StepWork, TimingModel, chunk_pairs

PACE_WEIGHT = 0.1
"""Of the latest observation in a pace: a worker that slows down is known after some ten prompts."""
PACE_BOUNDS = (0.1, 10.0)
"""One observation counts at most this much: a stalled process must not be remembered as a slow one."""

SMALL_STEP_LOSS = 1.25
"""Times what a token costs in a full step: steps whose tokens cost more are too small, prompts should share them."""
FULL_STEP_TOKENS = 8192
UNBOUNDED_TOKENS = 1 << 30

CONTEXT_GRAIN = 1024
"""Tokens of context that make no difference to a forecast: so that forecasts can be remembered."""


class Pace:
    """Observed seconds for each predicted second: 1.0 until something was observed."""

    __slots__ = ("factor",)

    def __init__(self) -> None:
        self.factor = 1.0

    def observe(self, predicted_s: float, observed_s: float) -> None:
        if predicted_s > 0 and observed_s > 0:
            low, high = PACE_BOUNDS
            ratio = min(max(observed_s / predicted_s, low), high)
            self.factor += PACE_WEIGHT * (ratio - self.factor)


class Predictor:
    """Prefill and decode by a timing model. `chunk_tokens`: of a prompt in one step, as the engines are configured."""

    def __init__(self, timing: TimingModel, chunk_tokens: int) -> None:
        self._timing = timing
        self._chunk_tokens = chunk_tokens
        self.prefill_s = lru_cache(maxsize=8192)(self._prefill_s)
        """(new tokens, cached tokens before them) -> seconds, alone on a worker. Cached: candidates ask alike."""
        self._decode_s = lru_cache(maxsize=8192)(self._decode_step_s)
        self.shared_tokens = self._shared_tokens()
        """A step of fewer tokens is too small: another short prompt costs less in it than in a step of its own. 1: no
        step is, tokens are all that costs."""

    def _prefill_s(self, num_new: int, num_cached: int) -> float:
        total_ms, start, left = 0.0, num_cached, num_new
        while left > 0:
            tokens = min(left, self._chunk_tokens)
            total_ms += self._timing.step_ms(StepWork(tokens, chunk_pairs(start, tokens)))
            start += tokens
            left -= tokens
        return total_ms / 1000

    def _shared_tokens(self) -> int:
        """The smallest step of tiny prompts whose tokens cost about what they cost in a full one."""
        limit = SMALL_STEP_LOSS * self.step_s(FULL_STEP_TOKENS) / FULL_STEP_TOKENS
        if limit <= 0:  # the model knows nothing of time
            return UNBOUNDED_TOKENS
        tokens = 1
        while tokens < FULL_STEP_TOKENS and self.step_s(tokens) > limit * tokens:
            tokens += max(1, tokens // 16)
        return tokens

    def step_s(self, num_tokens: int) -> float:
        """One step of so many tokens of short prompts."""
        return self._timing.step_ms(StepWork(num_tokens, num_tokens)) / 1000

    def itl_s(self, num_seqs: int, num_context_tokens: int) -> float:
        """Between two tokens of a batch that attends to so many tokens in all, give or take `CONTEXT_GRAIN`."""
        return self._decode_s(num_seqs, num_context_tokens // CONTEXT_GRAIN) if num_seqs > 0 else 0.0

    def _decode_step_s(self, num_seqs: int, grains: int) -> float:
        work = StepWork(decodes=num_seqs, decode_context=grains * CONTEXT_GRAIN + CONTEXT_GRAIN // 2)
        return self._timing.step_ms(work) / 1000

    def mixed_s(self, num_new: int, num_cached: int, num_seqs: int, num_context_tokens: int) -> float:
        """A whole prompt computed on a worker that decodes: every chunk's step carries the batch along."""
        chunks = max(1, -(-num_new // self._chunk_tokens))
        return self.prefill_s(num_new, num_cached) + chunks * self.itl_s(num_seqs, num_context_tokens)
