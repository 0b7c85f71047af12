"""The prefix cache as a store sees it: filled, held, given way to, lent; and the news of what it has."""

import pytest

from pdserve.types import Phase


def prompt_of(length, first=1):
    return [(first + 3 * i) % 47 for i in range(length)]


def fetched(bench, handle, tokens, num_blocks):
    """As a fetch before the submission."""
    assert bench.open_fill(handle, tokens, num_blocks)
    bench.end_fill(handle, num_blocks)


def test_what_was_filled_is_not_computed_and_is_told(bench, alone):
    b = bench()
    fetched(b, 0, prompt_of(30), 5)
    request = b.submit(prompt_of(30), max_tokens=4)
    said = b.drain()
    assert said.tokens[0] == alone(request)[0]
    assert (said.prompts[0].num_cached_tokens, said.prompts[0].num_fetched_tokens) == (20, 20)
    assert b.runner.num_computed_tokens == 10 + 3
    b.assert_empty()


def test_only_what_was_committed_is_used(bench, alone):
    b = bench()
    assert b.open_fill(0, prompt_of(30), 6)
    b.end_fill(0, 2)
    request = b.submit(prompt_of(30), max_tokens=4)
    said = b.drain()
    assert said.tokens[0] == alone(request)[0]
    assert said.prompts[0].num_fetched_tokens == 8
    b.assert_empty()


def test_what_is_cached_already_is_neither_written_nor_counted_as_fetched(bench):
    b = bench()
    b.submit(prompt_of(10), handle=5, max_tokens=1)
    b.drain()
    assert b.open_fill(0, prompt_of(30), 6)
    target, *_ = b.fills[0]
    assert (target.num_cached_blocks, len(target.blocks)) == (2, 6)
    b.end_fill(0, 6)
    b.submit(prompt_of(30), max_tokens=1)
    stats = b.drain().prompts[0]
    assert (stats.num_cached_tokens, stats.num_fetched_tokens) == (24, 16)


def test_a_prompt_stops_before_what_is_being_fetched_and_goes_on_behind_it(bench, alone):
    b = bench(chunk_tokens=64)
    assert b.open_fill(0, prompt_of(41), 9, first_block=4)
    request = b.submit(prompt_of(41), max_tokens=3)
    b.drain()
    assert b.runner.batches == [[(0, 0, 16)]]
    assert not b.engine.has_work(), "it waits, and costs nothing meanwhile"
    b.end_fill(0, 5)
    said = b.drain()
    assert b.runner.batches[1] == [(0, 36, 5)]
    assert said.tokens[0] == alone(request)[0]
    assert (said.prompts[0].num_cached_tokens, said.prompts[0].num_fetched_tokens) == (20, 20)
    b.assert_empty()


def test_a_prompt_whose_tail_does_not_come_computes_it(bench, alone):
    b = bench(chunk_tokens=64)
    assert b.open_fill(0, prompt_of(41), 9, first_block=4)
    request = b.submit(prompt_of(41), max_tokens=3)
    b.drain()
    b.drop_fill(0)
    assert b.drain().tokens[0] == alone(request)[0]
    b.assert_empty()


def test_prompts_that_begin_alike_share_what_the_first_one_computes(bench, alone):
    b = bench(max_num_batched_tokens=24, chunk_tokens=16)
    first = b.submit(prompt_of(60), handle=0, max_tokens=2)
    second = b.submit([*prompt_of(60), 5], handle=1, max_tokens=2)
    said = b.drain()
    assert said.tokens == {0: alone(first)[0], 1: alone(second)[0]}
    assert b.runner.num_computed_tokens < 100, "of 121"
    assert said.prompts[1].num_cached_tokens > 0
    b.assert_empty()


def test_two_fills_of_the_same_blocks_keep_them_once(bench):
    b = bench(20)
    assert b.open_fill(0, prompt_of(24), 6)
    assert b.open_fill(1, prompt_of(24), 6)
    b.end_fill(0, 6)
    b.end_fill(1, 6)
    assert b.engine.load().num_free_blocks == 14
    b.engine.cache_drop(0)
    assert b.engine.load().num_free_blocks == 14
    b.engine.cache_drop(1)
    b.assert_empty()


def test_a_hold_gives_way_to_a_request_that_has_no_other_room(bench, alone):
    b = bench(12, max_model_len=48)
    fetched(b, 9, prompt_of(33, 2), 8)
    assert b.engine.load().num_free_blocks == 4
    request = b.submit(prompt_of(30), handle=0, max_tokens=4)
    assert b.drain().tokens[0] == alone(request)[0]
    b.assert_empty()


def test_a_hold_gives_way_to_a_growing_answer_before_anyone_is_preempted(bench, alone):
    b = bench(12, max_model_len=48)
    request = b.submit(prompt_of(9), handle=0, max_tokens=30)
    b.step()
    fetched(b, 9, prompt_of(33, 2), 8)
    assert b.drain().tokens[0] == alone(request)[0]
    assert b.engine.load().num_preemptions == 0
    b.assert_empty()


def test_a_hold_gives_way_to_a_reservation(bench):
    b = bench(12, max_model_len=48)
    fetched(b, 9, prompt_of(33, 2), 8)
    b.submit(prompt_of(30), handle=0, phase=Phase.DECODE)
    assert b.engine.import_blocks(0, 0, 30) is not None


def test_an_open_fill_outlives_the_request_until_its_writer_ends(bench):
    b = bench(12, max_model_len=48)
    b.submit(prompt_of(33), handle=0)
    assert not b.open_fill(0, prompt_of(33), 8), "what waits goes first"
    b.engine.cancel(0)
    assert b.open_fill(0, prompt_of(33), 8)
    b.engine.cancel(0)
    assert b.engine.load().num_free_blocks == 4
    b.end_fill(0, 8)
    assert b.engine.load().num_free_blocks == 12
    b.submit(prompt_of(33), handle=1, max_tokens=1)
    assert b.drain().prompts[1].num_cached_tokens == 32, "what came too late for one is there for the next"


def test_only_one_fill_at_a_time_and_never_of_nothing(bench):
    b = bench()
    assert b.open_fill(0, prompt_of(30), 5)
    with pytest.raises(ValueError, match="handle 0"):
        b.engine.cache_open(0, b.keys_of(prompt_of(30)))
    with pytest.raises(ValueError, match="first block 5"):
        b.engine.cache_open(1, b.keys_of(prompt_of(20)), 5)


def test_a_device_takes_a_long_fill_in_parts(bench, alone):
    b = bench(host=False, staging_blocks=3)
    assert b.open_fill(0, prompt_of(30), 7)
    assert len(b.fills[0][0].blocks) == 3
    b.end_fill(0, 3)
    assert b.open_fill(0, prompt_of(30), 7, first_block=3)
    b.end_fill(0, 3)
    request = b.submit(prompt_of(30), max_tokens=3)
    said = b.drain()
    assert said.tokens[0] == alone(request)[0]
    assert said.prompts[0].num_fetched_tokens == 24
    b.assert_empty()


def test_a_device_lends_copies_and_hand_overs_go_first(bench):
    b = bench(host=False, staging_blocks=3)
    b.submit(prompt_of(30), handle=0, max_tokens=1)
    b.drain()
    lent = b.engine.cache_lend(b.keys_of(prompt_of(30)))
    assert len(lent) == 3
    b.engine.check_integrity()
    assert b.engine.cache_lend(b.keys_of(prompt_of(30))) is None
    b.submit(prompt_of(20, 5), handle=1, phase=Phase.PREFILL)
    b.drain()
    b.engine.cache_return(lent)
    b.drain()
    assert [len(chunk.blocks) for chunk in b.said.exports] == [3]
    assert b.engine.cache_lend(b.keys_of(prompt_of(30))) is None


def test_every_choice_tells_its_chain_from_the_first_block(bench):
    b = bench()
    b.submit(prompt_of(10), handle=0, n=2, temperature=1.0, max_tokens=20)
    chains = {}
    while b.engine.has_work():
        for published in b.step().published:
            chain = chains.setdefault(published.handle, [])
            assert published.first_block <= len(chain), "no gap"
            chain[published.first_block :] = published.keys
    for choice in (0, 1):
        tokens = [*prompt_of(10), *b.said.tokens[choice]]
        assert chains[choice] == b.keys_of(tokens[: len(tokens) - 1])


def test_without_prefix_cache_there_is_nothing_to_fill_or_tell(bench):
    b = bench(prefix_cache=False)
    assert b.engine.cache_open(0, b.keys_of(prompt_of(30))) is None
    b.submit(prompt_of(30), max_tokens=9)
    while b.engine.has_work():
        assert not b.step().published
