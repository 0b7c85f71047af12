"""KV bytes without a model: 16 bytes a token that are a function of every token up to it.

Two little-endian 64-bit words a token: `state`, a running sum of mixed (token, position) pairs, and a check word made
from it. The sum makes a prompt's KV one vectorised pass (12,000 tokens in 0.2 ms), and still each entry depends on
the whole prefix and its order. A sequence's `digest` is taken over all its KV bytes, so it tells of any wrong one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

KV_BYTES = 16
"""Of one token."""
WORDS = KV_BYTES // 8

Words = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
"""Constants of splitmix64 (Steele, Lea and Flood 2014), whose finaliser mixes 64 bits well."""


def _mix(words: Words) -> Words:
    words = (words ^ (words >> np.uint64(30))) * _MIX_1
    words = (words ^ (words >> np.uint64(27))) * _MIX_2
    return words ^ (words >> np.uint64(31))


def initial_state(model_seed: int, lora: str) -> int:
    """What precedes the first token: another model or LoRA gives other KV for the same tokens."""
    return xxhash.xxh3_64_intdigest(lora.encode(), seed=model_seed)


def kv_terms(token_ids: Words, positions: Words) -> Words:
    """What each token adds to the state; both arguments and the result have shape [num_tokens]."""
    return _mix(_mix(positions * _GOLDEN + _GOLDEN) ^ token_ids)


def kv_words(states: Words, positions: Words) -> Words:
    """The KV of tokens with these states: shape [num_tokens, 2]."""
    return np.stack((states, _mix(states + positions * _MIX_1 + _GOLDEN)), axis=1)


def chain(state: int, first: int, token_ids: Sequence[int]) -> Words:
    """KV of tokens `first` and on, given the state before them: shape [len(token_ids), 2]."""
    positions = np.arange(first, first + len(token_ids), dtype=np.uint64)
    terms = kv_terms(np.array(token_ids, dtype=np.uint64), positions)
    return kv_words(np.cumsum(terms, dtype=np.uint64) + np.uint64(state), positions)


def digest(kv: NDArray[np.uint8] | Words) -> int:
    """64 bits over all of a sequence's KV, at 16 GB/s: stands for the logits of its last token."""
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(kv).data)
