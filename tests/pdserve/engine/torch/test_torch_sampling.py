"""Sampling rules against brute force and against what they mean statistically."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.engine.core.runner import Sequence
from pdserve.engine.torch.sampling import adjust, choose, exponential_clocks, kept, largest, logprobs_of
from pdserve.types import Request, SamplingParams

FROZEN_CLOCKS = [0.4918525, 1.141107, 3.320734, 0.1269463, 1.267392]
"""As first drawn: a change would break seeded requests across releases."""

rows = st.lists(st.floats(-12, 12, width=32), min_size=2, max_size=60, unique=True).map(
    lambda values: np.array(values, dtype=np.float32)
)


def sequence(outputs: list[int], prompt: list[int] | None = None, **params: Any) -> Sequence:
    prompt = prompt or [1]
    request = Request("r", "m", tuple(prompt), SamplingParams(**params))
    return Sequence(request, 7, 0, [*prompt, *outputs], len(prompt))


def softmax(values: np.ndarray) -> np.ndarray:
    weights = np.exp(values.astype(np.float64) - float(values.max()))
    return weights / weights.sum()


# --- which tokens are kept ---


@settings(max_examples=200, derandomize=True)
@given(rows, st.floats(0.01, 0.99))
def test_top_p_keeps_the_shortest_likeliest_list_that_reaches_it(values: np.ndarray, top_p: float) -> None:
    found = kept(values, SamplingParams(top_p=top_p))
    order = np.argsort(-values, kind="stable")
    masses = softmax(values)[order].cumsum()
    assert found is not None
    assert found.tolist() == order[: len(found)].tolist()
    assert masses[len(found) - 1] >= top_p - 1e-5
    assert len(found) == 1 or masses[len(found) - 2] < top_p + 1e-5


@settings(max_examples=100, derandomize=True)
@given(rows, st.integers(1, 70))
def test_top_k_keeps_the_k_likeliest(values: np.ndarray, top_k: int) -> None:
    found = kept(values, SamplingParams(top_k=top_k))
    wanted = set(np.argsort(-values)[:top_k].tolist())
    assert wanted == (set(range(len(values))) if found is None else set(found.tolist()))


@settings(max_examples=100, derandomize=True)
@given(rows, st.floats(0.01, 1.0))
def test_min_p_keeps_what_is_at_least_that_share_of_the_likeliest(values: np.ndarray, min_p: float) -> None:
    found = kept(values, SamplingParams(min_p=min_p))
    shares = softmax(values) / softmax(values).max()
    assert found is not None
    assert all(shares[found] >= min_p * (1 - 1e-5))
    assert all(np.delete(shares, found) < min_p * (1 + 1e-5))


@settings(max_examples=100, derandomize=True)
@given(rows, st.floats(0.01, 0.5), st.integers(1, 20), st.floats(0.1, 0.95))
def test_filters_work_one_after_the_other(values: np.ndarray, min_p: float, top_k: int, top_p: float) -> None:
    found = kept(values, SamplingParams(min_p=min_p, top_k=top_k, top_p=top_p))
    ids = kept(values, SamplingParams(min_p=min_p))
    assert ids is not None
    after_k = kept(values[ids], SamplingParams(top_k=top_k))
    ids = ids if after_k is None else ids[after_k]
    after_p = kept(values[ids], SamplingParams(top_p=top_p))
    assert found is not None
    assert after_p is not None
    assert sorted(found.tolist()) == sorted(ids[after_p].tolist())


def test_top_p_needs_no_full_sort_to_be_exact_on_a_flat_distribution() -> None:
    values = np.linspace(0, 0.001, 49152, dtype=np.float32)
    found = kept(values, SamplingParams(top_p=0.9))
    assert found is not None
    assert len(found) == pytest.approx(0.9 * 49152, rel=1e-3)


def test_all_tokens_are_kept_when_nothing_filters() -> None:
    assert kept(np.zeros(5, np.float32), SamplingParams()) is None


@given(rows, st.integers(1, 70))
@settings(max_examples=50, derandomize=True)
def test_largest_is_sorted(values: np.ndarray, count: int) -> None:
    assert largest(values, count).tolist() == np.argsort(-values, kind="stable")[:count].tolist()


def test_largest_breaks_ties_by_index() -> None:
    assert largest(np.array([1, 3, 3, 2, 3], np.float32), 5).tolist() == [1, 2, 4, 3, 0]


# --- draws ---


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draws_follow_the_distribution(temperature: float) -> None:
    logits = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -2.0], np.float32)
    draws = 20_000
    params = SamplingParams(temperature=temperature, seed=11)
    found = np.bincount([choose(logits, params, 0, index) for index in range(draws)], minlength=6)
    # 20.5 is the 0.1 % point of chi-square with 5 degrees of freedom; the seed is fixed, so this never flickers.
    assert chi_square(found, softmax(logits / temperature) * draws) < 20.5


@pytest.mark.parametrize("varied", ["seed", "choice", "index"])
def test_draws_are_independent_in_each_argument(varied: str) -> None:
    logits = np.zeros(4, np.float32)
    fixed = {"seed": 5, "choice": 1, "index": 9}
    pairs = np.zeros((4, 4))
    for value in range(4000):
        first, second = ({**fixed, varied: 2 * value + i} for i in (0, 1))
        drawn = [
            choose(logits, SamplingParams(seed=args["seed"]), args["choice"], args["index"]) for args in (first, second)
        ]
        pairs[drawn[0], drawn[1]] += 1
    # 37.7: the 0.1 % point for 15 degrees of freedom.
    assert chi_square(pairs.ravel(), np.full(16, 250.0)) < 37.7


def test_the_same_arguments_draw_the_same_clocks_for_ever() -> None:
    clocks = exponential_clocks(2**63 - 1, 127, 8191, 5)
    np.testing.assert_allclose(clocks, FROZEN_CLOCKS, rtol=1e-6)
    np.testing.assert_array_equal(clocks, exponential_clocks(2**63 - 1, 127, 8191, 9)[:5])


def test_filtered_draws_stay_inside_the_filter() -> None:
    logits = np.array([3.0, 2.9, 0.0, -1.0], np.float32)
    params = SamplingParams(top_p=0.8, seed=1)
    assert {choose(logits, params, 0, index) for index in range(200)} == {0, 1}


def test_a_small_change_of_the_logits_leaves_nearly_every_draw_alone() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 3, 20_000).astype(np.float32)
    shaken = logits + generator.normal(0, 1e-5, 20_000).astype(np.float32)
    params = SamplingParams(seed=3)
    differing = sum(choose(logits, params, 0, i) != choose(shaken, params, 0, i) for i in range(300))
    assert differing == 0


def test_greedy_takes_the_lowest_id_of_a_tie() -> None:
    assert choose(np.array([1, 5, 5], np.float32), SamplingParams(temperature=0.0), 0, 0) == 1


# --- rules that change the logits ---


def test_penalties_follow_their_formulas() -> None:
    logits = np.array([2.0, -2.0, 4.0, 1.0, -1.0], np.float32)
    seq = sequence([2, 2, 4], prompt=[0, 1], repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25)
    adjust(logits, seq, ())
    wanted = [2.0 / 2, -2.0 * 2, 4.0 / 2 - 2 * 0.5 - 0.25, 1.0, -1.0 * 2 - 0.5 - 0.25]
    np.testing.assert_allclose(logits, wanted)


def test_presence_and_frequency_ignore_the_prompt() -> None:
    logits = np.zeros(4, np.float32)
    adjust(logits, sequence([], prompt=[1, 2], frequency_penalty=1.0, presence_penalty=1.0), ())
    assert not logits.any()


def test_logit_bias_is_added_and_unknown_ids_are_ignored() -> None:
    logits = np.zeros(4, np.float32)
    adjust(logits, sequence([], logit_bias=((1, 5.0), (3, -100.0), (99, 1.0))), ())
    assert logits.tolist() == [0.0, 5.0, 0.0, -100.0]


@pytest.mark.parametrize(
    ("num_outputs", "ignore_eos", "banned"), [(1, False, {2, 4}), (1, True, {4}), (2, False, set())]
)
def test_min_tokens_bans_what_would_end(num_outputs: int, ignore_eos: bool, banned: set[int]) -> None:
    logits = np.zeros(5, np.float32)
    seq = sequence([0] * num_outputs, min_tokens=2, stop_token_ids=(4,), ignore_eos=ignore_eos)
    adjust(logits, seq, (2,))
    assert set(np.flatnonzero(np.isneginf(logits)).tolist()) == banned


# --- logprobs ---


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = np.array([1.0, 3.0, 2.0, 0.0], np.float32)
    found = logprobs_of(logits, 2, sequence([9, 9], logprobs=3))
    expected = np.log(softmax(logits))
    assert (found.handle, found.index, found.rank) == (7, 2, 2)
    assert found.logprob == pytest.approx(expected[2])
    assert found.top_ids == (1, 2, 0)
    assert found.top_logprobs == pytest.approx(tuple(expected[[1, 2, 0]]))


def test_no_alternatives_are_told_when_none_are_asked_for() -> None:
    found = logprobs_of(np.zeros(4, np.float32), 0, sequence([], logprobs=0))
    assert found.top_ids == ()
    assert found.logprob == pytest.approx(-math.log(4))
    assert found.rank == 1
