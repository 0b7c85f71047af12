"""Sampling parameters refuse what is out of range, by the field's name; NaN is never in range."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pdserve.errors import InvalidRequest
from pdserve.types import MAX_CHOICES, MAX_LOGPROBS, MAX_SEED, MAX_STOP_STRINGS, SamplingParams

_WRONG: list[tuple[str, Any]] = [
    *(("n", value) for value in (0, -1, MAX_CHOICES + 1)),
    *(("temperature", value) for value in (-0.1, 2.1, math.nan, math.inf)),
    *(("top_p", value) for value in (0.0, 1.1, math.nan)),
    ("top_k", -2),
    *(("min_p", value) for value in (-0.1, 1.1, math.nan)),
    *((name, value) for name in ("presence_penalty", "frequency_penalty") for value in (-2.1, 2.1, math.nan)),
    *(("repetition_penalty", value) for value in (0.0, 10.1, math.nan)),
    *(("logit_bias", value) for value in (((-1, 0.0),), ((1, 101.0),), ((1, math.nan),))),
    *(("seed", value) for value in (-1, MAX_SEED + 1)),
    *(("stop", value) for value in (("",), ("a", ""), ("a",) * (MAX_STOP_STRINGS + 1))),
    ("stop_token_ids", (3, -1)),
    *(("max_tokens", value) for value in (0, -1)),
    ("min_tokens", -1),
    *(("logprobs", value) for value in (-1, MAX_LOGPROBS + 1)),
]


@pytest.mark.parametrize(("field", "value"), _WRONG)
def test_a_value_out_of_range_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field
    assert field in caught.value.message


def test_min_tokens_may_not_exceed_max_tokens() -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(min_tokens=5, max_tokens=4)
    assert caught.value.param == "min_tokens"
    assert SamplingParams(min_tokens=4, max_tokens=4).max_tokens == 4


def test_the_limits_themselves_are_taken() -> None:
    params = SamplingParams(
        n=MAX_CHOICES,
        temperature=2.0,
        top_p=1.0,
        top_k=-1,
        min_p=1.0,
        presence_penalty=-2.0,
        frequency_penalty=2.0,
        repetition_penalty=10.0,
        logit_bias=((0, -100.0), (1, 100.0)),
        seed=MAX_SEED,
        stop=("x",) * MAX_STOP_STRINGS,
        stop_token_ids=(0,),
        max_tokens=1,
        logprobs=MAX_LOGPROBS,
    )
    assert not params.greedy
    assert SamplingParams(temperature=0.0).greedy
