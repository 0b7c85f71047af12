"""From a row of logits to the next token: vLLM's rules, in numpy, one row a choice.

A draw is a race of exponential clocks: token i wins when E_i / p_i is smallest, where E_i is a function of (seed,
choice, output index, token id) alone. That is an exact sample from p, and it needs no running sum over the
vocabulary, so a last-bit difference in some logit changes the winner only where two tokens tie: a request gives the
same tokens on another worker, in another batch, and after a hand-over.

Order of rules, as in vLLM: logit_bias, min_tokens, penalties, grammar, then (not when greedy) temperature, min_p,
top_k, top_p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from pdserve.engine.core.runner import Sampled, Sequence
from pdserve.types import Logprobs, SamplingParams

Floats: TypeAlias = NDArray[np.float32]
Ids: TypeAlias = NDArray[np.int64]

_FIRST_NUCLEUS = 256
"""Tokens sorted at first to find a top_p nucleus; eight times as many each time that is too few."""
_BELOW_ONE = np.float32(1.0 - 2.0**-24)


def is_plain_greedy(params: SamplingParams) -> bool:
    """Nothing but the arg max: rows that are done in one go."""
    return (
        params.greedy
        and params.logprobs is None
        and params.grammar is None
        and not (params.min_tokens or params.logit_bias or has_penalties(params))
    )


def has_penalties(params: SamplingParams) -> bool:
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)


# --- rules that change the logits ---


def adjust(logits: Floats, seq: Sequence, eos_token_ids: Seq[int]) -> None:
    """Apply logit_bias, min_tokens and penalties in place to one row [vocab_size]."""
    params = seq.request.params
    for token_id, bias in params.logit_bias:
        if token_id < len(logits):
            logits[token_id] += bias
    if seq.num_output_tokens < params.min_tokens:
        ending = [*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)]
        logits[[token_id for token_id in ending if token_id < len(logits)]] = -np.inf
    if has_penalties(params):
        _penalise(logits, seq, params)


def _penalise(logits: Floats, seq: Sequence, params: SamplingParams) -> None:
    """Repetition over prompt and outputs (CTRL, arXiv 1909.05858), frequency and presence over outputs (OpenAI)."""
    if params.repetition_penalty != 1.0:
        seen = np.unique(np.asarray(seq.token_ids))
        values = logits[seen]
        factor = np.float32(params.repetition_penalty)
        logits[seen] = np.where(values > 0, values / factor, values * factor)
    if params.presence_penalty or params.frequency_penalty:
        seen, counts = np.unique(np.asarray(seq.token_ids[seq.num_prompt_tokens :], dtype=np.int64), return_counts=True)
        logits[seen] -= np.float32(params.frequency_penalty) * counts.astype(np.float32)
        logits[seen] -= np.float32(params.presence_penalty)


# --- drawing ---


def choose(logits: Floats, params: SamplingParams, choice: int, index: int) -> int:
    """The next token from adjusted logits [vocab_size]: output number `index` of `choice`."""
    if params.greedy:
        return int(logits.argmax())
    scaled = logits / np.float32(params.temperature)
    ids = kept(scaled, params)
    clocks = exponential_clocks(params.seed or 0, choice, index, len(logits))
    if ids is None:
        return int((scaled - np.log(clocks)).argmax())
    return int(ids[(scaled[ids] - np.log(clocks[ids])).argmax()])


def kept(scaled: Floats, params: SamplingParams) -> Ids | None:
    """Token ids that min_p, top_k and top_p leave, each computed over what the one before left; None: all."""
    ids: Ids | None = None
    if params.min_p > 0.0:
        ids = np.flatnonzero(scaled >= scaled.max() + np.float32(math.log(params.min_p)))
    if 0 < params.top_k < (len(scaled) if ids is None else len(ids)):
        ids = _top_k(scaled, ids, params.top_k)
    if params.top_p < 1.0:
        ids = _top_p(scaled, ids, params.top_p)
    return ids


def _top_k(scaled: Floats, ids: Ids | None, k: int) -> Ids:
    """All that are at least as likely as the k-th: ties stay in, as in vLLM."""
    values = scaled if ids is None else scaled[ids]
    threshold = np.partition(values, len(values) - k)[len(values) - k]
    left = np.flatnonzero(values >= threshold)
    return left if ids is None else ids[left]


def _top_p(scaled: Floats, ids: Ids | None, top_p: float) -> Ids:
    """The shortest list of likeliest tokens (ties by id) whose probabilities reach `top_p`."""
    values = scaled if ids is None else scaled[ids]
    weights = np.exp(values - values.max())
    target = top_p * float(weights.sum(dtype=np.float64))
    size = _FIRST_NUCLEUS
    while True:
        order = largest(values, size)
        reached = weights[order].cumsum(dtype=np.float64)
        if reached[-1] >= target or size >= len(values):
            break
        size *= 8
    left = order[: int(np.searchsorted(reached, target)) + 1]
    return left if ids is None else ids[left]


def largest(values: Floats, count: int) -> Ids:
    """Indexes of the `count` largest values in falling order, ties by index."""
    if not count:
        return np.empty(0, dtype=np.intp)
    if count < len(values):
        found = np.argpartition(values, len(values) - count)[len(values) - count :]
    else:
        found = np.arange(len(values))
    return found[np.lexsort((found, -values[found]))]


def exponential_clocks(seed: int, choice: int, index: int, vocab_size: int) -> Floats:
    """One standard exponential variable a token. Philox4x64 (Salmon et al., SC 2011) keyed by the arguments; its
    raw stream is fixed by numpy's compatibility policy, so every machine draws the same."""
    key = np.array([seed, choice << 40 | index], dtype=np.uint64)
    bits = np.random.Philox(key=key).random_raw((vocab_size + 1) // 2).view(np.uint32)[:vocab_size]
    uniform = (bits.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    clocks: Floats = -np.log1p(-np.minimum(uniform, _BELOW_ONE))
    return clocks


# --- logprobs ---


def logprobs_of(logits: Floats, token_id: int, seq: Sequence) -> Logprobs:
    """Of the model's own distribution: `logits` as they came from it."""
    top = float(logits.max())
    total = top + math.log(float(np.exp(logits - np.float32(top)).sum(dtype=np.float64)))
    alternatives = largest(logits, min(seq.request.params.logprobs or 0, len(logits)))
    if not seq.request.params.logprobs:
        alternatives = alternatives[:0]
    return Logprobs(
        handle=seq.handle,
        index=seq.num_output_tokens,
        logprob=float(logits[token_id]) - total,
        rank=int((logits > logits[token_id]).sum()) + 1,
        top_ids=tuple(alternatives.tolist()),
        top_logprobs=tuple((logits[alternatives].astype(np.float64) - total).tolist()),
    )


def sample_plain_greedy(logits: Floats) -> list[Sampled]:
    """Arg max of every row [N, vocab_size]; the lowest id wins a tie."""
    return [Sampled(token_id) for token_id in logits.argmax(-1).tolist()]
