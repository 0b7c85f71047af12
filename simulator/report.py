"""What users felt: counted from the outcomes of a run. Times in seconds unless a name ends in `_ms`.

ITL of a request is (end - first token) / (outputs - 1), as aiperf counts it. Goodput: requests whose TTFT and mean ITL
meet the SLO, over the span in which requests arrived; one that was refused is a miss.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pdserve.errors import PdserveError


@dataclass(slots=True)
class Outcome:
    """One request."""

    arrived_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    bound_s: float | None = None
    predicted_ttft_s: float = 0.0
    first_token_s: float | None = None
    decoding_s: float | None = None
    ended_s: float | None = None
    num_cached_tokens: int = 0
    num_fetched_tokens: int = 0
    prefill_worker: str = ""
    alone: bool = False
    error: PdserveError | None = None

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_s is None else self.first_token_s - self.arrived_s

    @property
    def itl_s(self) -> float:
        """0 for a single token."""
        if self.ended_s is None or self.first_token_s is None or self.num_output_tokens < 2:
            return 0.0
        return (self.ended_s - self.first_token_s) / (self.num_output_tokens - 1)


@dataclass(frozen=True, slots=True)
class Slo:
    ttft_s: float = 2.0
    itl_s: float = 0.030


@dataclass(frozen=True, slots=True)
class Summary:
    """`reuse`: part of the prompts' tokens that was not computed anew; `reuse_fetched`: part of them that came from a
    store. `load_max_over_mean`: prompt tokens computed, by worker that computes prompts."""

    num_requests: int
    num_failed: int
    goodput_rps: float
    ttft_mean_ms: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    itl_mean_ms: float
    itl_p99_ms: float
    reuse: float
    reuse_fetched: float
    alone: float
    load_max_over_mean: float


def summarise(outcomes: Sequence[Outcome], slo: Slo, span_s: float, num_computing: int) -> Summary:
    """`span_s`: in which the requests arrived; `num_computing`: workers that compute prompts."""
    done = [each for each in outcomes if each.error is None and each.ended_s is not None]
    ttfts = np.array([each.ttft_s for each in done if each.ttft_s is not None] or [0.0])
    itls = np.array([each.itl_s for each in done if each.num_output_tokens > 1] or [0.0])
    good = sum(each.ttft_s is not None and each.ttft_s <= slo.ttft_s and each.itl_s <= slo.itl_s for each in done)
    prompts = sum(each.num_prompt_tokens for each in done)
    return Summary(
        num_requests=len(outcomes),
        num_failed=len(outcomes) - len(done),
        goodput_rps=good / span_s,
        ttft_mean_ms=_ms(ttfts.mean()),
        ttft_p50_ms=_ms(np.percentile(ttfts, 50)),
        ttft_p99_ms=_ms(np.percentile(ttfts, 99)),
        itl_mean_ms=_ms(itls.mean()),
        itl_p99_ms=_ms(np.percentile(itls, 99)),
        reuse=sum(each.num_cached_tokens for each in done) / max(prompts, 1),
        reuse_fetched=sum(each.num_fetched_tokens for each in done) / max(prompts, 1),
        alone=sum(each.alone for each in done) / max(len(done), 1),
        load_max_over_mean=_imbalance(done, num_computing),
    )


def _imbalance(done: Sequence[Outcome], num_computing: int) -> float:
    loads: Counter[str] = Counter()
    for each in done:
        loads[each.prefill_worker] += each.num_prompt_tokens - each.num_cached_tokens
    return max(loads.values(), default=0) * num_computing / max(sum(loads.values()), 1)


def _ms(seconds: float) -> float:
    return round(float(seconds) * 1000, 3)
