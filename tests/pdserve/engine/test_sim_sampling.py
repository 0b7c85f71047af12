from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.engine.sim_sampling import NUM_CANDIDATES, Vocabulary, logprobs, sample
from pdserve.types import SamplingParams

VOCABULARY = Vocabulary(size=1000, first_token=17, eos_token_ids=(2,), eos_period=64)
NO_EOS = Vocabulary(size=1000, first_token=17, eos_token_ids=(2,), eos_period=0)
digests = st.integers(0, 2**64 - 1)


def draw(digest, vocabulary=VOCABULARY, choice=0, prompt=(5, 6), outputs=(), **params):
    return sample(vocabulary, digest, SamplingParams(**params), choice, [*prompt, *outputs], len(prompt))


@settings(derandomize=True)
@given(digests)
def test_candidates_are_distinct_plain_tokens_with_eos_first_when_due(digest):
    tokens = VOCABULARY.candidates(digest)
    plain = tokens[1:] if tokens[0] == 2 else tokens
    assert len(set(plain)) == NUM_CANDIDATES
    assert all(17 <= token < 1000 for token in plain)
    assert NO_EOS.candidates(digest) == plain


def test_eos_is_due_about_once_a_period():
    due = sum(VOCABULARY.candidates(digest * 0x9E3779B97F4A7C15 % 2**64)[0] == 2 for digest in range(6400))
    assert 50 < due < 150


def _digest_with_eos():
    return next(d << 20 for d in range(1000) if VOCABULARY.candidates(d << 20)[0] == 2)


def test_eos_is_kept_away_by_ignore_eos_and_min_tokens():
    digest = _digest_with_eos()
    second = VOCABULARY.candidates(digest)[1]
    assert draw(digest, temperature=0) == 2
    assert draw(digest, temperature=0, ignore_eos=True) == second
    assert draw(digest, temperature=0, min_tokens=2, outputs=(9,)) == second
    assert draw(digest, temperature=0, min_tokens=2, outputs=(9, 9)) == 2


def test_stop_tokens_are_masked_below_min_tokens():
    digest = 12345
    first, second, *_ = NO_EOS.candidates(digest)
    params = {"temperature": 0, "stop_token_ids": (first,), "min_tokens": 1}
    assert draw(digest, NO_EOS, **params) == second
    assert draw(digest, NO_EOS, outputs=(9,), **params) == first


@settings(derandomize=True, max_examples=200)
@given(
    digests,
    st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    st.sampled_from([0, 1, 3, 50]),
    st.sampled_from([1.0, 0.5, 0.9]),
    st.sampled_from([0.0, 0.2]),
    st.booleans(),
    st.integers(0, 100),
)
def test_the_quick_way_draws_what_the_general_way_draws(digest, temperature, top_k, top_p, min_p, ignore_eos, seed):
    params = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
    params["ignore_eos"] = ignore_eos
    no_op_bias = ((999_999, -1.0),)
    assert draw(digest, **params) == draw(digest, logit_bias=no_op_bias, **params)


def test_draws_depend_on_seed_choice_and_index_alone():
    digest = 777
    base = [draw(digest, NO_EOS, seed=s, choice=c, outputs=[9] * i) for s in (1, 2) for c in range(8) for i in range(8)]
    again = [
        draw(digest, NO_EOS, seed=s, choice=c, outputs=[8] * i) for s in (1, 2) for c in range(8) for i in range(8)
    ]
    assert base == again
    assert len(set(base)) > 5


def test_temperature_and_filters_shape_the_draws():
    def tokens(**params):
        return Counter(NO_EOS.candidates(777).index(draw(777, NO_EOS, seed=s, **params)) for s in range(2000))

    assert set(tokens(temperature=0)) == {0}
    assert set(tokens(top_k=3)) == {0, 1, 2}
    assert set(tokens(top_p=0.5)) == {0, 1}
    assert max(tokens(min_p=0.3)) == 2
    assert tokens(temperature=0.5)[0] > tokens(temperature=1.0)[0] > tokens(temperature=2.0)[0] > 0
    assert tokens(temperature=1.0)[0] / 2000 == pytest.approx(0.39, abs=0.04)


def test_bias_forces_and_forbids():
    first, second, *_ = NO_EOS.candidates(777)
    assert draw(777, NO_EOS, temperature=0, logit_bias=((500, 100.0),)) == 500
    assert draw(777, NO_EOS, temperature=0, logit_bias=((first, -100.0),)) == second


def test_penalties_turn_away_from_what_was_said():
    first, second, *_ = NO_EOS.candidates(777)
    for params in ({"presence_penalty": 2.0}, {"frequency_penalty": 2.0}):
        assert draw(777, NO_EOS, temperature=0, outputs=(first,), **params) == second
        assert draw(777, NO_EOS, temperature=0, prompt=(first,), **params) == first
    for said in ({"prompt": (first,)}, {"outputs": (first,)}):
        assert draw(777, NO_EOS, temperature=0, repetition_penalty=1.2, **said) == second


def test_logprobs_fall_with_rank_and_hold_the_sampled_token():
    tokens = NO_EOS.candidates(777)
    found = logprobs(NO_EOS, 777, tokens[4], 20, handle=7, index=3)
    assert (found.handle, found.index, found.rank, found.top_ids) == (7, 3, 5, tuple(tokens[:20]))
    assert list(found.top_logprobs) == sorted(found.top_logprobs, reverse=True)
    assert found.logprob == found.top_logprobs[4] < 0
    assert logprobs(NO_EOS, 777, 999, 0, 7, 3).logprob < found.top_logprobs[-1]
