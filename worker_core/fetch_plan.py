"""Fetch or compute: which blocks of a prompt are brought from a store, and which are computed meanwhile.

Costs are what was measured here: seconds a byte from each source, seconds a prompt token in the engine's steps. What
has not been measured yet is fetched, which measures it. Pure; the fetcher feeds it and asks.
"""

from __future__ import annotations

WEIGHT = 0.25
"""Of a new sample in a running mean: the last dozen or two count."""
MIN_STEP_TOKENS = 64
"""Prompt tokens of a step whose duration says something of prefill: in smaller ones the decodes weigh more."""
MIN_SAMPLE_BYTES = 64 << 10
"""Smaller reads tell of overhead, not of bandwidth."""
SPLIT_GAIN = 0.75
"""Of the time that fetching all would take: only below it is a part computed meanwhile, which takes the engine's time
from other requests."""
RETRY_FACTOR = 0.97
"""What was too slow looks so much better the next time: a slow moment is forgiven after a few dozen prompts."""


class Mean:
    """A running mean, None before the first sample."""

    def __init__(self) -> None:
        self.value: float | None = None

    def add(self, sample: float) -> None:
        self.value = sample if self.value is None else self.value + WEIGHT * (sample - self.value)


class FetchPlanner:
    """`chunk_blocks`: a prompt is split between the two at multiples of it: the engine's own chunk."""

    def __init__(self, block_tokens: int, block_bytes: int, chunk_blocks: int) -> None:
        self._block_tokens = block_tokens
        self._block_bytes = block_bytes
        self._chunk_blocks = max(1, chunk_blocks)
        self.prefill_s_per_token = Mean()
        self.overhead_s = Mean()
        """Of a fetch: look-up, opening blocks in the engine."""
        self._s_per_byte: dict[str, Mean] = {}

    def observe_step(self, num_prompt_tokens: int, duration_s: float) -> None:
        if num_prompt_tokens >= MIN_STEP_TOKENS:
            self.prefill_s_per_token.add(duration_s / num_prompt_tokens)

    def observe_read(self, source: str, nbytes: int, seconds: float) -> None:
        if nbytes >= MIN_SAMPLE_BYTES:
            self._s_per_byte.setdefault(source, Mean()).add(seconds / nbytes)

    def worth_asking(self, num_blocks: int) -> bool:
        """Whether a store could bring so many blocks sooner than they are computed, were it as fast as it ever is."""
        compute_s, overhead_s = self._compute_s(num_blocks), self.overhead_s.value
        if compute_s is None or overhead_s is None or compute_s > overhead_s:
            return True
        self.overhead_s.value = overhead_s * RETRY_FACTOR
        return False

    def first_block(self, source: str, cached: int, found: int, tokens_waiting: int = 0) -> int:
        """Of a chain of which the engine has `cached` blocks and the source has `found`: fetch from this block on,
        compute those before it at the same time. `found`: compute all. `tokens_waiting`: prompts before this one."""
        rate = self._s_per_byte.get(source)
        per_block = self._compute_s(1)
        if per_block is None or rate is None or rate.value is None:
            return cached
        fetch_s = self._block_bytes * rate.value
        wait_s = tokens_waiting / self._block_tokens * per_block

        def finished_s(first: int) -> float:
            """When blocks up to `found` are there. A pure fetch comes before the request queues."""
            fetching = (self.overhead_s.value or 0.0) + (found - first) * fetch_s
            if first == cached:
                return fetching + wait_s
            computing = wait_s + (first - cached) * per_block
            return computing if first == found else max(computing, fetching)

        best: int = min((*range(cached, found, self._chunk_blocks), found), key=finished_s)
        if finished_s(best) > SPLIT_GAIN * finished_s(cached):
            return cached
        rate.value *= RETRY_FACTOR
        return best

    def _compute_s(self, num_blocks: int) -> float | None:
        per_token = self.prefill_s_per_token.value
        return None if per_token is None else per_token * num_blocks * self._block_tokens
