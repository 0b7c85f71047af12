"""One choice: order, duplicates, text, stop strings, ends."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.types import Finish, FinishReason, Logprobs, SamplingParams
from router.choice import Choice, TextOptions

WORDS = {10: "a", 11: "b", 12: "St", 13: "op", 14: "c", 15: "STOP"}


class Words:
    """A detokeniser over a handful of tokens."""

    def push(self, token_id):
        return WORDS[token_id]

    def push_all(self, token_ids):
        return "".join(map(self.push, token_ids))

    def flush(self):
        return ""


class Owner:
    def __init__(self):
        self.ends = []
        self.errors = []

    def on_choice_end(self, choice, *, by_router):
        self.ends.append(by_router)

    def on_finish_error(self, finish):
        self.errors.append(finish)


def make(sink, **params):
    include = params.pop("include_stop", False)
    owner = Owner()
    got = sink()
    return Choice(0, Words(), TextOptions.of(SamplingParams(**params), include), got, owner), got, owner


def end(num_tokens, reason=FinishReason.LENGTH, stop_token_id=None):
    return Finish(1, reason, num_tokens, stop_token_id)


async def test_a_token_that_came_twice_is_given_once(sink):
    choice, got, _ = make(sink)
    choice.take(0, (10,), (), None)
    choice.take(0, (10,), (), None)
    choice.take(0, (10, 11), (), None)
    assert got.token_ids[0] == [10, 11]


async def test_tokens_that_came_early_wait_for_those_before(sink):
    choice, got, owner = make(sink)
    choice.take(2, (14,), (), None)
    choice.take(1, (11,), (), None)
    choice.end(end(3))
    assert not got.token_ids
    assert not owner.ends
    choice.take(0, (10,), (), None)
    assert got.token_ids[0] == [10, 11, 14]
    assert got.finishes[0] == (FinishReason.LENGTH, None)
    assert owner.ends == [False]


@given(st.lists(st.integers(1, 3), min_size=1, max_size=8), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_any_order_with_duplicates_gives_each_token_once(counts, rng: random.Random):
    class Flat:
        def __init__(self):
            self.token_ids, self.indexes, self.finished = [], [], 0

        def on_tokens(self, choice, text, token_ids, logprobs):
            self.token_ids += token_ids
            self.indexes += [entry.index for entry in logprobs]

        def on_finish(self, choice, reason, stop):
            self.finished += 1

    choice, got, _ = make(Flat)
    tokens = [10 + i % 5 for i in range(sum(counts))]
    parts, start = [], 0
    for count in counts:
        entries = [Logprobs(1, i, -1.0, 1) for i in range(start, start + count)]
        finish = end(len(tokens)) if start + count == len(tokens) else None
        parts.append((start, tuple(tokens[start : start + count]), entries, finish))
        start += count
    deliveries = parts + rng.sample(parts, rng.randint(0, len(parts)))
    rng.shuffle(deliveries)
    for part in deliveries:
        choice.take(*part)
    assert got.token_ids == tokens
    assert got.indexes == list(range(len(tokens)))
    assert got.finished == 1


async def test_a_stop_string_across_tokens_ends_the_choice_and_is_no_text(sink):
    choice, got, owner = make(sink, stop=("bStop",))
    for index, token_id in enumerate((10, 11, 12, 13, 14)):
        choice.take(index, (token_id,), (), None)
    assert got.texts[0] == "a"
    assert got.token_ids[0] == [10, 11, 12, 13]
    assert got.finishes[0] == (FinishReason.STOP, "bStop")
    assert owner.ends == [True]


async def test_a_stop_string_is_text_when_asked_for(sink):
    choice, got, _ = make(sink, stop=("Stop",), include_stop=True)
    choice.take(0, (10,), (), None)
    choice.take(1, (12, 13, 14), (), None)
    assert got.texts[0] == "aStop"


async def test_text_that_only_looked_like_a_stop_string_comes_at_the_end(sink):
    choice, got, _ = make(sink, stop=("Stopping",))
    choice.take(0, (10,), (), None)
    choice.take(1, (12,), (), None)
    assert got.texts[0] == "a"
    choice.take(2, (13,), (), end(3))
    assert got.texts[0] == "aStop"
    assert got.finishes[0] == (FinishReason.LENGTH, None)


async def test_stop_strings_do_not_count_before_min_tokens(sink):
    choice, got, _ = make(sink, stop=("a",), min_tokens=2)
    for index in range(3):
        choice.take(index, (10,), (), None)
    assert got.texts[0] == "aa"
    assert got.token_ids[0] == [10, 10, 10]


@pytest.mark.parametrize(("include", "text"), [(False, "a"), (True, "ab")])
async def test_a_stop_token_is_a_token_but_no_text(sink, include, text):
    choice, got, _ = make(sink, stop_token_ids=(11,), include_stop=include)
    choice.take(0, (10,), (), None)
    choice.take(1, (11,), (), end(2, FinishReason.STOP, 11))
    assert got.texts[0] == text
    assert got.token_ids[0] == [10, 11]
    assert got.finishes[0] == (FinishReason.STOP, 11)


async def test_eos_is_not_reported_as_a_stop_that_was_asked_for(sink):
    choice, got, _ = make(sink)
    choice.take(0, (11,), (), end(1, FinishReason.STOP, 11))
    assert got.finishes[0] == (FinishReason.STOP, None)


async def test_what_came_too_early_from_a_lost_worker_is_forgotten_with_it(sink):
    choice, got, owner = make(sink)
    choice.take(0, (10,), (), None)
    choice.take(2, (12,), (), None)
    choice.end(end(3))
    choice.forget_early()
    choice.take(1, (13,), (), None)
    choice.take(2, (14,), (), end(3))
    assert got.token_ids[0] == [10, 13, 14]
    assert owner.ends == [False]


async def test_nothing_comes_after_an_end_that_came_too_early(sink):
    choice, got, owner = make(sink)
    choice.take(1, (11,), (), end(2))
    choice.take(0, (10,), (), None)
    choice.take(2, (12,), (), None)
    assert got.token_ids[0] == [10, 11]
    assert owner.ends == [False]


async def test_nothing_comes_after_the_end(sink):
    choice, got, owner = make(sink)
    choice.take(0, (10,), (), end(1))
    choice.take(1, (11,), (), None)
    choice.end(end(1))
    assert got.token_ids[0] == [10]
    assert owner.ends == [False]
