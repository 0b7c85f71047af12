"""Draws tokens from a made-up distribution: the sim engine's stand-in for logits and a sampler.

A digest of the KV picks which tokens are likely; how likely they are depends on the rank alone. So the usual draw is
a look-up in a cached table (2 µs), and yet temperature, filters, penalties, biases, `min_tokens` and logprobs act
as they do on a real model. Draws are a function of (seed, choice, output index).
"""

from __future__ import annotations

import math
import struct
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, takewhile

import xxhash

from pdserve.types import Logprobs, SamplingParams

NUM_CANDIDATES = 24
"""Tokens that can be drawn, in falling likelihood: more than `top_logprobs` may ask for."""
_SLOPE = 0.5
"""Fall of the logit from rank to rank: the first token has 0.37 of the mass, about a small model's on plain text."""
_TOP_LOGIT = 12.0
"""Of the likeliest token; all candidates' logits are positive, as a real model's mostly are: it matters to
`repetition_penalty` alone."""
_TAIL_LOGIT = -18.0
"""Of every token that is no candidate: only a bias lifts it."""
_LOG_MASS = math.log(sum(math.exp(-_SLOPE * rank) for rank in range(NUM_CANDIDATES + 1)))
_DRAW = struct.Struct("<QII")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Which tokens a digest may make likely: ids from `first_token` (those below are special), and EOS, which is the
    likeliest token once in `eos_period` digests."""

    size: int
    first_token: int
    eos_token_ids: tuple[int, ...]
    eos_period: int

    def candidates(self, digest: int) -> list[int]:
        """Distinct tokens, the likeliest first; EOS, when it is due, precedes `NUM_CANDIDATES` others."""
        span = self.size - self.first_token
        start = digest % span
        step = 1 + (digest >> 32) % (span // (2 * NUM_CANDIDATES))
        tokens = [self.first_token + (start + rank * step) % span for rank in range(NUM_CANDIDATES)]
        if self.eos_token_ids and self.eos_period and (digest >> 20) % self.eos_period == 0:
            return [self.eos_token_ids[0], *tokens]
        return tokens


def sample(
    vocabulary: Vocabulary, digest: int, params: SamplingParams, choice: int, token_ids: Sequence[int], num_prompt: int
) -> int:
    """The next token of a choice whose `token_ids` (prompt, then outputs) have KV with this digest."""
    tokens = vocabulary.candidates(digest)
    num_outputs = len(token_ids) - num_prompt
    masked = _masked(vocabulary, params, num_outputs)
    if _is_plain(params):
        allowed = [token for token in tokens if token not in masked] if masked else tokens
        table = _rank_table(len(allowed), params.temperature, params.top_k, params.top_p, params.min_p)
    else:
        logits = _adjusted(tokens, masked, params, token_ids[:num_prompt], token_ids[num_prompt:])
        allowed = list(logits)
        table = _cumulated(list(logits.values()), params.temperature, params.top_k, params.top_p, params.min_p)
    last = len(table) - 1
    return allowed[bisect_right(table, _draw(params.seed or 0, choice, num_outputs), hi=last) if last else 0]


def logprobs(vocabulary: Vocabulary, digest: int, token: int, num_top: int, handle: int, index: int) -> Logprobs:
    """Of the sampled token and the `num_top` likeliest, before bias, penalties and temperature."""
    tokens = vocabulary.candidates(digest)
    rank = tokens.index(token) if token in tokens else len(tokens) + token
    logprob = max(-_SLOPE * rank, _TAIL_LOGIT - _TOP_LOGIT) - _LOG_MASS
    top = tuple(tokens[:num_top])
    return Logprobs(handle, index, logprob, rank + 1, top, tuple(-_SLOPE * r - _LOG_MASS for r in range(len(top))))


def _draw(seed: int, choice: int, index: int) -> float:
    """Uniform in [0, 1)."""
    return float(xxhash.xxh3_64_intdigest(_DRAW.pack(seed, choice, index)) >> 11) * 2.0**-53


def _masked(vocabulary: Vocabulary, params: SamplingParams, num_outputs: int) -> set[int]:
    """Tokens that must not come now. Other than a real model this one keeps quiet about EOS when told to ignore it."""
    if num_outputs < params.min_tokens:
        return {*vocabulary.eos_token_ids, *params.stop_token_ids}
    return set(vocabulary.eos_token_ids) if params.ignore_eos else set()


def _is_plain(params: SamplingParams) -> bool:
    return not (
        params.logit_bias
        or params.presence_penalty
        or params.frequency_penalty
        or params.repetition_penalty != 1.0
        or (params.min_tokens and params.stop_token_ids)
    )


def _adjusted(
    tokens: list[int], masked: set[int], params: SamplingParams, prompt: Sequence[int], outputs: Sequence[int]
) -> dict[int, float]:
    """Logits by token after bias and penalties, in falling order."""
    logits = {token: _TOP_LOGIT - _SLOPE * rank for rank, token in enumerate(tokens)}
    for token, bias in params.logit_bias:
        logits[token] = logits.get(token, _TAIL_LOGIT) + bias
    kept = {
        token: _penalised(params, logit, outputs.count(token), token in prompt)
        for token, logit in logits.items()
        if token not in masked
    }
    return dict(sorted(kept.items(), key=lambda entry: -entry[1]))


def _penalised(params: SamplingParams, logit: float, count: int, in_prompt: bool) -> float:
    """As in vLLM: repetition scales (prompt and outputs), the other two subtract (outputs only)."""
    if params.repetition_penalty != 1.0 and (count or in_prompt):
        logit = logit / params.repetition_penalty if logit > 0 else logit * params.repetition_penalty
    return logit - params.frequency_penalty * count - params.presence_penalty * (count > 0)


@lru_cache(maxsize=1024)
def _rank_table(size: int, temperature: float, top_k: int, top_p: float, min_p: float) -> list[float]:
    return _cumulated([-_SLOPE * rank for rank in range(size)], temperature, top_k, top_p, min_p)


def _cumulated(logits: Sequence[float], temperature: float, top_k: int, top_p: float, min_p: float) -> list[float]:
    """Cumulated probabilities of the tokens that survive the filters; `logits` fall. One entry: no draw is needed."""
    if temperature == 0.0:
        return [1.0]
    weights = [math.exp((logit - logits[0]) / temperature) for logit in logits]
    weights = weights[:top_k] if top_k > 0 else weights
    weights = list(takewhile(lambda weight: weight >= min_p, weights))
    mass = sum(weights)
    sums = [total / mass for total in accumulate(weights)]
    kept = next((rank + 1 for rank, total in enumerate(sums) if total >= top_p), len(sums))
    return [total / sums[kept - 1] for total in sums[:kept]]
