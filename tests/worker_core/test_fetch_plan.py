"""Fetch or compute, from what was measured."""

from __future__ import annotations

import pytest

from worker_core.fetch_plan import FetchPlanner

MIB = 1 << 20


def planner(compute_ms_per_block: float | None = 1.0, fetch_ms_per_block: float | None = 0.1) -> FetchPlanner:
    """Blocks of 16 tokens and 1 MiB, chunks of 4 blocks."""
    made = FetchPlanner(block_tokens=16, block_bytes=MIB, chunk_blocks=4)
    if compute_ms_per_block is not None:
        made.observe_step(16_000, compute_ms_per_block)
    if fetch_ms_per_block is not None:
        made.observe_read("dram", 1000 * MIB, fetch_ms_per_block)
    return made


def test_a_fast_source_gives_everything() -> None:
    assert planner().first_block("dram", cached=3, found=100) == 3


def test_a_source_much_slower_than_computing_gives_nothing_or_little() -> None:
    assert planner(fetch_ms_per_block=1000.0).first_block("dram", cached=0, found=40) == 40
    assert planner(fetch_ms_per_block=9.0).first_block("dram", cached=0, found=40) == 36, "the tail, meanwhile"


def test_a_split_must_be_worth_the_engines_time() -> None:
    assert planner(fetch_ms_per_block=0.2).first_block("dram", cached=0, found=40) == 0
    assert planner(fetch_ms_per_block=0.5).first_block("dram", cached=0, found=40) > 0


def test_a_source_as_fast_as_computing_gives_the_second_half() -> None:
    assert planner(fetch_ms_per_block=1.0).first_block("dram", cached=0, found=40) == 20
    assert planner(fetch_ms_per_block=1.0).first_block("dram", cached=20, found=40) in (28, 32)


def test_what_takes_longer_to_ask_for_than_to_compute_is_not_asked_for() -> None:
    made = planner()
    assert made.worth_asking(1)
    made.overhead_s.add(0.005)
    assert not made.worth_asking(4)
    assert made.worth_asking(6)


def test_one_slow_look_up_is_forgiven() -> None:
    made = planner()
    made.overhead_s.add(1.0)
    asked = [made.worth_asking(100) for _ in range(200)]
    assert not asked[0]
    assert asked[-1]


@pytest.mark.parametrize(("compute", "fetch"), [(None, 1.0), (1.0, None), (None, None)])
def test_what_was_never_measured_is_fetched(compute: float | None, fetch: float | None) -> None:
    made = planner(compute, fetch)
    assert made.worth_asking(1) or compute is not None
    assert made.first_block("dram", cached=2, found=40) == 2


def test_a_queue_before_the_engine_leaves_time_to_fetch_more() -> None:
    alone = planner(fetch_ms_per_block=2.0).first_block("dram", 0, 40)
    queued = planner(fetch_ms_per_block=2.0).first_block("dram", 0, 40, tokens_waiting=16 * 30)
    assert queued < alone


def test_a_source_that_lost_is_tried_again_some_day() -> None:
    made = planner(fetch_ms_per_block=100.0)
    decisions = [made.first_block("dram", 0, 8) for _ in range(200)]
    assert decisions[0] == 8
    assert decisions[-1] < 8


def test_measures_follow_a_change_within_two_dozen_samples() -> None:
    made = planner(fetch_ms_per_block=100.0)
    for _ in range(25):
        made.observe_read("dram", 10 * MIB, 0.001)
    assert made.first_block("dram", 0, 40) < 8


def test_tiny_steps_and_reads_say_nothing() -> None:
    made = planner(None, None)
    made.observe_step(3, 10.0)
    made.observe_read("dram", 100, 10.0)
    assert made.prefill_s_per_token.value is None
    assert made.first_block("dram", 0, 40) == 0
