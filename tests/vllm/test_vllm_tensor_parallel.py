"""Staging blocks hold all heads, so prefill and decode need not be split among as many ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from test_vllm_handover import SAMPLED, alone
from vllm_pair import Driven, Pair, make_request, running_engine, settings

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def split() -> Iterator[Driven]:
    """The embedded model's 3 KV heads, one a rank."""
    engine_args = {**settings().engine_args, "tensor_parallel_size": 3}
    with running_engine(engine_args=engine_args) as engine:
        yield engine


def test_one_rank_prefills_and_three_decode_and_the_other_way(prefill: Driven, split: Driven) -> None:
    request = make_request("ranks", 201, 10, **SAMPLED)
    expected = [alone(prefill, request)]
    assert Pair(prefill, split).run(request) == expected
    assert Pair(split, prefill).run(make_request("ranks back", 201, 10, **SAMPLED)) == [
        alone(prefill, make_request("ranks back", 201, 10, **SAMPLED))
    ]
    prefill.settle()
    split.settle()
