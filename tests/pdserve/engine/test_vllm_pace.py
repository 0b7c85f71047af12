"""What the vLLM engine reports of its prefill: tokens over the time that they took together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.engine.vllm.pace import PrefillPace


def told(pace: PrefillPace) -> tuple[int, float]:
    """Once nothing new comes."""
    assert pace.measured().num_prompt_tokens == 0
    result = pace.measured()
    return result.num_prompt_tokens, result.prefill_s


def test_one_prompt_takes_its_own_time_and_is_told_once() -> None:
    pace = PrefillPace()
    pace.add(1000, 5.0, 7.5)
    assert told(pace) == (1000, 2.5)
    assert pace.measured().num_prompt_tokens == 0


def test_prompts_side_by_side_share_their_time() -> None:
    pace = PrefillPace()
    for tokens in (100, 200, 300):
        pace.add(tokens, 5.0, 6.0)
    assert told(pace) == (600, 1.0)


def test_a_long_one_that_ends_last_adds_what_the_short_one_had_not_counted() -> None:
    pace = PrefillPace()
    pace.add(100, 8.0, 9.0)
    pace.add(900, 1.0, 10.0)
    assert told(pace) == (1000, 9.0)


@pytest.mark.parametrize("span", [(0.0, 5.0), (5.0, 5.0), (5.0, 0.0)])
def test_what_has_no_times_and_short_ones_say_nothing(span: tuple[float, float]) -> None:
    pace = PrefillPace()
    pace.add(1000, *span)
    pace.add(10, 1.0, 2.0)
    assert told(pace) == (0, 0.0)


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 20)), min_size=1, max_size=40))
def test_no_moment_is_counted_twice_whatever_the_order(spans: list[tuple[int, int]]) -> None:
    pace = PrefillPace()
    for begin, length in spans:
        pace.add(64, float(begin), float(begin + length))
    moments = {moment for begin, length in spans for moment in range(begin, begin + length)}
    assert told(pace) == (64 * len(spans), float(len(moments)))
