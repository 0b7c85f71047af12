"""Requests that run in one engine from prompt to end: scheduling, prefix cache, choices, ends."""

import pytest

from pdserve.block_keys import block_keys
from pdserve.ends import end_of
from pdserve.errors import ConfigError, ContextLengthExceeded, EngineFailed, InvalidRequest, NotSupported
from pdserve.types import FinishReason, Phase, SamplingParams

EOS = 7


def prompt_of(length, first=1):
    return [(first + 3 * i) % 47 for i in range(length)]


def test_tokens_are_those_of_an_engine_alone(bench, alone):
    b = bench()
    request = b.submit(prompt_of(10), max_tokens=12)
    said = b.drain()
    assert said.tokens[0] == alone(request)[0]
    assert said.finishes[0].reason is FinishReason.LENGTH
    assert said.finishes[0].num_output_tokens == 12
    assert (said.prompts[0].num_prompt_tokens, said.prompts[0].num_cached_tokens) == (10, 0)
    b.assert_empty()


def test_a_long_prompt_is_computed_in_chunks(bench, alone):
    b = bench(chunk_tokens=16)
    request = b.submit(prompt_of(50), max_tokens=3)
    said = b.drain()
    assert b.runner.batches[:5] == [[(0, 0, 16)], [(0, 16, 16)], [(0, 32, 16)], [(0, 48, 2)], [(0, 50, 1)]]
    assert said.tokens[0] == alone(request)[0]


def test_a_step_stays_within_its_token_budget_and_decodes_come_first(bench):
    b = bench(256, max_num_batched_tokens=24, chunk_tokens=16, max_num_seqs=8)
    for i in range(6):
        b.submit(prompt_of(30, i), handle=i, max_tokens=6)
    b.drain()
    for batch in b.runner.batches:
        assert sum(num_tokens for _, _, num_tokens in batch) <= 24
        assert all(num_tokens <= 16 for _, _, num_tokens in batch)
    mixed = [batch for batch in b.runner.batches if len({start >= 30 for _, start, _ in batch}) == 2]
    assert mixed, "decodes and prompt chunks share steps"
    for batch in mixed:
        decodes = [start >= 30 for _, start, _ in batch]
        assert decodes == sorted(decodes, reverse=True)


def test_no_more_sequences_run_than_allowed(bench):
    b = bench(256, max_num_seqs=3)
    for i in range(7):
        b.submit(prompt_of(5, i), handle=i, max_tokens=4)
    b.drain()
    assert max(map(len, b.runner.batches)) == 3
    assert len(b.said.finishes) == 7


def test_requests_start_in_order_of_priority_then_arrival(bench):
    b = bench(max_num_seqs=1)
    for handle, priority in ((0, 5), (1, 0), (2, 5), (3, -1)):
        b.submit(prompt_of(5, handle), handle=handle, priority=priority, max_tokens=2)
    b.drain()
    assert list(b.said.finishes) == [3, 1, 0, 2]


def test_a_known_prefix_is_not_computed_again(bench, alone):
    b = bench()
    b.submit(prompt_of(18), max_tokens=2)
    b.drain()
    request = b.submit([*prompt_of(18)[:13], 3, 3], handle=1, max_tokens=5)
    before = b.runner.num_computed_tokens
    said = b.drain()
    assert said.prompts[1].num_cached_tokens == 12
    assert b.runner.num_computed_tokens - before == 3 + 4
    assert said.tokens[1] == alone(request)[0]
    load = b.engine.load()
    assert (load.prefix_cache_queries, load.prefix_cache_hits) == (18 + 15, 12)


def test_of_a_whole_known_prompt_the_last_block_is_computed(bench, alone):
    b = bench()
    b.submit(prompt_of(16), max_tokens=2)
    b.drain()
    request = b.submit(prompt_of(16), handle=1, max_tokens=5)
    said = b.drain()
    assert said.prompts[1].num_cached_tokens == 12
    assert said.tokens[1] == alone(request)[0]


def test_generated_tokens_are_found_by_the_next_turn(bench, alone):
    b = bench()
    b.submit(prompt_of(6), max_tokens=11)
    first = b.drain().tokens[0]
    request = b.submit([*prompt_of(6), *first, 9], handle=1, max_tokens=3)
    said = b.drain()
    assert said.prompts[1].num_cached_tokens == 16
    assert said.tokens[1] == alone(request)[0]


def test_keys_that_came_with_the_request_are_used(bench):
    b = bench()
    keys = block_keys(b"another root....", prompt_of(10), 4)
    b.submit(prompt_of(10), max_tokens=1, block_keys=keys)
    b.drain()
    b.submit(prompt_of(10), handle=1, max_tokens=1)
    b.submit(prompt_of(10), handle=2, max_tokens=1, block_keys=keys)
    said = b.drain()
    assert said.prompts[1].num_cached_tokens == 0
    assert said.prompts[2].num_cached_tokens == 8


def test_without_prefix_cache_nothing_is_found(bench):
    b = bench(prefix_cache=False)
    for handle in (0, 1):
        b.submit(prompt_of(16), handle=handle, max_tokens=1)
        b.drain()
    assert b.said.prompts[1].num_cached_tokens == 0


def test_choices_share_the_prompt_and_copy_its_tail_when_they_write(bench, alone):
    b = bench()
    request = b.submit(prompt_of(18), n=3, temperature=1.0, max_tokens=6)
    b.step()
    b.step()
    assert b.runner.num_computed_tokens == 18
    b.step()
    assert b.runner.num_copied_blocks == 2, "the last one writes to the original"
    assert b.engine.load().num_total_blocks - b.engine.load().num_free_blocks == 4 + 3
    said = b.drain()
    assert said.tokens == alone(request)
    assert len({tuple(tokens) for tokens in said.tokens.values()}) == 3
    assert len(said.prompts) == 1
    b.assert_empty()


def test_no_copy_where_the_prompt_ends_with_a_block(bench, alone):
    b = bench()
    request = b.submit(prompt_of(16), n=3, temperature=1.0, max_tokens=6)
    assert b.drain().tokens == alone(request)
    assert b.runner.num_copied_blocks == 0


def test_more_choices_than_slots_take_turns(bench, alone):
    b = bench(max_num_seqs=2)
    request = b.submit(prompt_of(10), n=5, temperature=1.0, max_tokens=6)
    assert b.drain().tokens == alone(request)
    b.assert_empty()


def test_eos_ends_a_choice_and_is_reported(bench, alone, request_of):
    endless = alone(request_of(prompt_of(9), max_tokens=300))[0]
    assert EOS in endless
    index = endless.index(EOS)
    b = bench(max_num_seqs=4)
    b.submit(prompt_of(9), max_tokens=400, ignore_eos=False)
    said = b.drain()
    assert said.tokens[0] == endless[: index + 1]
    assert said.finishes[0].reason is FinishReason.STOP
    assert said.finishes[0].stop_token_id == EOS
    assert said.finishes[0].num_output_tokens == index + 1


def test_a_stop_token_ends_a_choice_but_not_before_min_tokens(bench, alone, request_of):
    plain = alone(request_of(prompt_of(9), max_tokens=40))[0]
    b = bench()
    b.submit(prompt_of(9), max_tokens=40, stop_token_ids=(plain[2],))
    request = b.submit(prompt_of(9), handle=1, max_tokens=40, stop_token_ids=(plain[2],), min_tokens=10)
    said = b.drain()
    assert said.tokens[0] == plain[: plain.index(plain[2]) + 1]
    assert said.finishes[0].stop_token_id == plain[2]
    assert plain[2] not in said.tokens[1][:10]
    assert said.tokens[1] == alone(request)[0]
    assert said.finishes[1].num_output_tokens > 10


def test_the_context_length_ends_a_choice_even_below_min_tokens(bench):
    b = bench(max_model_len=20)
    b.submit(prompt_of(9), max_tokens=50, min_tokens=40)
    said = b.drain()
    assert len(said.tokens[0]) == 11
    assert said.finishes[0].reason is FinishReason.LENGTH


def test_logprobs_carry_handle_and_output_index(bench):
    b = bench()
    b.submit(prompt_of(9), handle=4, max_tokens=3, logprobs=0)
    assert [(entry.handle, entry.index) for entry in b.drain().logprobs] == [(4, 0), (4, 1), (4, 2)]


def test_without_room_the_youngest_is_preempted_and_goes_on_where_it_was(bench, alone):
    b = bench(12, max_model_len=48)
    requests = [b.submit(prompt_of(5 + i, i), handle=i, max_tokens=25) for i in range(6)]
    said = b.drain()
    assert b.engine.load().num_preemptions > 0
    for handle, request in enumerate(requests):
        assert said.tokens[handle] == alone(request)[0]
    assert said.finishes[0].handle == next(iter(said.finishes)), "the oldest is never preempted"
    b.assert_empty()


def test_choices_survive_preemption(bench, alone):
    b = bench(10, max_model_len=36)
    request = b.submit(prompt_of(10), n=4, temperature=1.0, max_tokens=20)
    assert b.drain().tokens == alone(request)
    assert b.engine.load().num_preemptions > 0
    b.assert_empty()


def test_low_priority_is_preempted_first(bench):
    b = bench(8, max_model_len=32, prefix_cache=False)
    b.submit(prompt_of(7, 1), handle=0, priority=9, max_tokens=20)
    b.submit(prompt_of(7, 2), handle=1, priority=0, max_tokens=20)
    b.drain()
    assert list(b.said.finishes) == [1, 0]
    assert b.engine.load().num_preemptions > 0


def test_an_older_request_takes_the_blocks_of_one_that_is_stuck(bench, alone):
    b = bench(4, max_model_len=16)
    b.submit(prompt_of(4, 5), handle=9, phase=Phase.PREFILL)
    b.drain()
    stuck = b.submit(prompt_of(7), handle=0, max_tokens=8)
    b.drain()
    assert 0 not in b.said.finishes, "it waits for the exported block"
    b.submit(prompt_of(4, 2), handle=1, max_tokens=1, priority=-1)
    b.drain()
    assert list(b.said.finishes) == [1]
    b.engine.export_release(9)
    assert b.drain().tokens[0] == alone(stuck)[0]
    b.assert_empty()


def test_below_min_tokens_only_lengths_end_a_choice(bench):
    model = bench(64, max_model_len=30).engine.model
    params = SamplingParams(min_tokens=5, max_tokens=9, stop_token_ids=(3,))
    for stop in (EOS, 3):
        assert end_of(params, model, stop, num_outputs=4, num_tokens=20) is None
        assert end_of(params, model, stop, num_outputs=5, num_tokens=20) == (FinishReason.STOP, stop)
    assert end_of(params, model, 1, num_outputs=9, num_tokens=20) == (FinishReason.LENGTH, None)
    assert end_of(params, model, 3, num_outputs=4, num_tokens=30) == (FinishReason.LENGTH, None)


def test_a_prompt_that_never_fits_is_refused_at_once(bench):
    b = bench(4, max_model_len=512)
    assert b.engine.model.max_model_len == 16
    with pytest.raises(ContextLengthExceeded, match="at most 16"):
        b.submit(prompt_of(16))
    b.submit(prompt_of(15), max_tokens=9)
    assert b.drain().finishes[0].reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [50]}, "prompt"),
        ({"prompt": [1], "outputs": [[50]]}, "prompt"),
        ({"prompt": [1], "outputs": [[1], [2]]}, "output_token_ids"),
        ({"prompt": [1, 2, 3, 4], "block_keys": b"x"}, "block_keys"),
    ],
)
def test_bad_requests_are_refused_with_the_field(bench, fields, param):
    b = bench()
    with pytest.raises(InvalidRequest) as caught:
        b.submit(**fields)
    assert caught.value.param == param
    b.assert_empty()


def test_a_handle_in_use_is_refused(bench):
    b = bench()
    b.submit([1], handle=3, n=2)
    with pytest.raises(InvalidRequest, match="in use"):
        b.submit([1], handle=4)


def test_cancel_frees_at_once_and_says_nothing(bench):
    b = bench()
    b.submit(prompt_of(30), handle=0, max_tokens=9)
    b.submit(prompt_of(9), handle=1, n=3, temperature=1.0, max_tokens=9)
    b.submit(prompt_of(9), handle=9, max_tokens=9)
    b.step()
    for handle in (0, 1, 9, 77):
        b.engine.cancel(handle)
    b.assert_empty()
    assert not b.engine.has_work()
    assert not b.said.finishes


def test_cancel_names_a_request_by_its_first_handle_only(bench):
    b = bench()
    b.submit(prompt_of(9), handle=1, n=2, temperature=1.0, max_tokens=9)
    b.engine.cancel(2)
    assert len(b.drain().finishes) == 2


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_cancelled_choice_leaves_the_others_alone(bench, alone, steps):
    b = bench()
    request = b.submit(prompt_of(20), n=3, temperature=1.0, max_tokens=8)
    for _ in range(steps):
        b.step()
    b.engine.cancel_choice(0)
    b.engine.cancel_choice(2)
    said = b.drain()
    assert said.tokens[1] == alone(request)[1]
    assert list(said.finishes) == [1]
    b.assert_empty()


def test_the_last_choice_cancelled_ends_the_request(bench):
    b = bench()
    b.submit(prompt_of(20), n=2, temperature=1.0, max_tokens=8)
    b.step()
    b.engine.cancel_choice(0)
    b.engine.cancel_choice(1)
    b.assert_empty()


def test_one_choice_that_fails_ends_alone_with_its_error(bench, alone):
    b = bench()
    b.runner.fail_handles = {1}
    request = b.submit(prompt_of(9), n=3, temperature=1.0, max_tokens=5)
    said = b.drain()
    assert said.finishes[1].reason is FinishReason.ERROR
    assert isinstance(said.finishes[1].error, EngineFailed)
    assert {0: said.tokens[0], 2: said.tokens[2]} == {i: alone(request)[i] for i in (0, 2)}
    b.assert_empty()


def test_a_migrated_request_goes_on_with_the_next_output(bench, alone, request_of):
    whole = alone(request_of(prompt_of(9), max_tokens=12))[0]
    b = bench()
    b.submit(prompt_of(9), outputs=[whole[:5]], max_tokens=12)
    said = b.drain()
    assert said.first_indexes[0] == 5
    assert said.tokens[0] == whole[5:]
    assert said.finishes[0].num_output_tokens == 12
    assert said.prompts[0].num_prompt_tokens == 9


def test_a_migrated_request_with_several_choices_computes_each_ones_outputs(bench, alone, request_of):
    whole = alone(request_of(prompt_of(9), n=3, temperature=1.0, max_tokens=12))
    b = bench()
    outputs = [whole[0][:5], [], whole[2][:9]]
    b.submit(prompt_of(9), outputs=outputs, n=3, temperature=1.0, max_tokens=12)
    said = b.drain()
    assert {i: [*outputs[i], *said.tokens[i]] for i in range(3)} == whole
    assert b.runner.num_computed_tokens == 9 + 5 + 9 + sum(len(said.tokens[i]) - 1 for i in range(3))
    b.assert_empty()


def test_a_migrated_choice_that_was_complete_gets_its_finish(bench, alone, request_of):
    whole = alone(request_of(prompt_of(9), n=2, temperature=1.0, max_tokens=6))
    b = bench()
    b.submit(prompt_of(9), outputs=[whole[0], whole[1][:3]], n=2, temperature=1.0, max_tokens=6)
    b.submit(prompt_of(9), outputs=[whole[0]], handle=2, max_tokens=6)
    said = b.drain()
    assert said.finishes[0].num_output_tokens == said.finishes[2].num_output_tokens == 6
    assert said.tokens == {1: whole[1][3:]}
    b.assert_empty()


@pytest.mark.parametrize("phase", [Phase.PREFILL, Phase.DECODE])
def test_choices_that_differ_have_no_context_to_hand_over(bench, phase):
    b = bench()
    with pytest.raises(NotSupported, match="FULL"):
        b.submit(prompt_of(9), outputs=[[1], [2]], n=2, phase=phase)
    b.assert_empty()


def test_what_ends_between_schedule_and_finish_is_not_run(bench, alone):
    b = bench()
    b.submit(prompt_of(9), handle=0, max_tokens=5)
    request = b.submit(prompt_of(9, 2), handle=1, n=2, temperature=1.0, max_tokens=5)
    batch = b.engine.schedule()
    assert (batch.num_tokens, batch.num_context_tokens, batch.num_sampled_tokens) == (18, 18, 3)
    b.engine.cancel(0)
    b.engine.cancel_choice(1)
    late = b.submit(prompt_of(9, 3), handle=5, max_tokens=5)
    b.take(b.engine.finish(batch))
    assert b.runner.batches == [[(1, 0, 9)]]
    said = b.drain()
    assert said.tokens == {2: alone(request)[1], 5: alone(late)[0]}
    b.assert_empty()


def test_a_second_batch_needs_the_first_one_finished(bench):
    b = bench()
    b.submit(prompt_of(9), max_tokens=5)
    batch = b.engine.schedule()
    with pytest.raises(RuntimeError, match="finish"):
        b.engine.schedule()
    b.engine.finish(batch)
    b.engine.schedule()


def test_close_can_be_called_twice(bench):
    b = bench()
    b.engine.close()
    b.engine.close()
    assert b.runner.closed == 1


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"num_blocks": 0}, "engine.num_blocks"),
        ({"max_num_seqs": 64, "max_num_batched_tokens": 64}, "engine.max_num_batched_tokens"),
        ({"chunk_tokens": 0}, "engine.chunk_tokens"),
        ({"watermark": 1.0}, "engine.watermark"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(bench, settings, key):
    with pytest.raises(ConfigError) as caught:
        bench(**{"num_blocks": 8, **settings})
    assert caught.value.key == key
