"""KV that leaves one engine and goes on in another, with pools in host memory and with device pools."""

import pytest

from pdserve.errors import ContextLengthExceeded, HandoverError, InvalidRequest
from pdserve.types import FinishReason, Phase


def prompt_of(length, first=1):
    return [(first + 3 * i) % 47 for i in range(length)]


@pytest.fixture(params=["host", "device"])
def pair(request, bench):
    """A prefill and a decode engine; device pools stage through 5 blocks of host memory."""

    def make(num_blocks=64, **settings):
        host = request.param == "host"
        return tuple(bench(num_blocks, host=host, staging_blocks=5, **settings) for _ in range(2))

    return make


def move(p, d, handle=0):
    """Prefill, hand over chunk by chunk as they appear, release, resume."""
    moved = 0
    for _ in range(1000):
        p.step()
        for chunk in [chunk for chunk in p.said.exports if chunk.handle == handle][moved:]:
            assert d.pull(p, handle, chunk)
            p.engine.export_release(handle, chunk.chunk_index)
            moved += 1
            if chunk.final:
                choices = range(handle, handle + 128)
                tokens = [p.said.tokens[choice] for choice in choices if choice in p.said.tokens]
                ended = [choice in p.said.finishes for choice in choices if choice in p.said.tokens]
                d.engine.resume(handle, tokens, ended)
                return
    raise AssertionError("the prompt does not come to an end")


def spans(said):
    return [(chunk.first_token, chunk.num_tokens, chunk.final) for chunk in said.exports]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("length", [1, 16, 37])
def test_tokens_are_those_of_one_engine_alone(pair, alone, n, length):
    p, d = pair()
    fields = {"n": n, "temperature": 1.0, "max_tokens": 9}
    request = p.submit(prompt_of(length), phase=Phase.PREFILL, **fields)
    d.submit(prompt_of(length), phase=Phase.DECODE, **fields)
    move(p, d)
    d.drain()
    assert {i: p.said.tokens[i] + d.said.tokens[i] for i in range(n)} == alone(request)
    assert set(d.said.first_indexes.values()) == {1}
    assert list(p.said.prompts) == [0]
    assert not d.said.prompts
    p.assert_empty()
    d.assert_empty()
    assert d.runner.num_computed_tokens == n * 8, "nothing of the prompt is computed twice"


def test_chunks_cover_the_prompt_exactly_and_leave_as_soon_as_their_blocks_are_whole(bench):
    b = bench(chunk_tokens=10)
    b.submit(prompt_of(37), phase=Phase.PREFILL)
    sizes = [[chunk.num_tokens for chunk in b.step().exports] for _ in range(4)]
    assert sizes == [[8], [12], [8], [9]]
    assert spans(b.said) == [(0, 8, False), (8, 12, False), (20, 8, False), (28, 9, True)]
    assert [chunk.chunk_index for chunk in b.said.exports] == [0, 1, 2, 3]
    assert len(b.said.tokens[0]) == 1
    assert not b.said.finishes
    assert not b.engine.has_work()
    load = b.engine.load()
    assert (load.num_exported_blocks, load.num_running) == (10, 0)


def test_a_cached_prefix_leaves_with_the_first_chunk(bench):
    b = bench(chunk_tokens=8)
    b.submit(prompt_of(30), max_tokens=1)
    b.drain()
    b.submit(prompt_of(30), handle=1, phase=Phase.PREFILL)
    b.drain()
    assert spans(b.said) == [(0, 30, True)]
    assert b.said.prompts[1].num_cached_tokens == 28


def test_a_choice_that_ends_with_its_first_token_is_finished_at_prefill(pair, alone):
    p, d = pair()
    request = p.submit(prompt_of(9), phase=Phase.PREFILL, n=2, temperature=1.0, max_tokens=1)
    d.submit(prompt_of(9), phase=Phase.DECODE, n=2, temperature=1.0, max_tokens=1)
    move(p, d)
    assert p.said.tokens == alone(request)
    assert {finish.reason for finish in p.said.finishes.values()} == {FinishReason.LENGTH}
    assert not d.step().output, "only to tell what the prefix cache took up"
    assert not d.engine.has_work()
    p.assert_empty()
    d.assert_empty()


def test_exported_blocks_stay_until_released_chunk_by_chunk(bench):
    b = bench(16, chunk_tokens=8)
    b.submit(prompt_of(24), phase=Phase.PREFILL)
    said = b.drain()
    before = [b.engine.memory.blocks[list(chunk.blocks)].copy() for chunk in said.exports]
    for i in range(4):
        b.submit(prompt_of(20, i + 5), handle=10 + i, max_tokens=9)
    b.drain()
    for chunk, content in zip(said.exports, before, strict=False):
        assert (b.engine.memory.blocks[list(chunk.blocks)] == content).all()
        assert tuple(b.engine.memory.generations[list(chunk.blocks)]) == chunk.generations
    for left, index in ((4, 0), (2, 2), (2, 2), (0, 1)):
        b.engine.export_release(0, index)
        assert b.engine.load().num_exported_blocks == left
    b.engine.export_release(0)
    b.assert_empty()


def test_release_of_all_ends_every_hold(pair):
    p, _ = pair()
    p.submit(prompt_of(37), phase=Phase.PREFILL)
    p.drain()
    p.engine.export_release(0)
    p.engine.export_release(0)
    p.assert_empty()


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_cancel_at_prefill_frees_exports_too_and_reuse_shows_in_the_generations(pair, steps):
    p, _ = pair(12, max_model_len=48)
    p.submit(prompt_of(40), phase=Phase.PREFILL)
    for _ in range(steps):
        p.step()
    p.engine.cancel(0)
    p.assert_empty()
    p.submit(prompt_of(41, 2), handle=1, phase=Phase.PREFILL)
    p.drain()
    old, new = ([chunk for chunk in p.said.exports if chunk.handle == handle] for handle in (0, 1))
    reused = {block for chunk in new for block in chunk.blocks}
    for chunk in old:
        for block, generation in zip(chunk.blocks, chunk.generations, strict=True):
            assert (p.engine.memory.generations[block] > generation) == (block in reused)
    assert not old or reused.intersection(*(chunk.blocks for chunk in old[:1]))


def test_a_device_exports_as_staging_has_room_while_decodes_go_on(bench, alone):
    b = bench(64, host=False, staging_blocks=2, chunk_tokens=32)
    request = b.submit(prompt_of(5), handle=9, max_tokens=30)
    b.step()
    b.submit(prompt_of(30), phase=Phase.PREFILL)
    b.step()
    assert spans(b.said) == [(0, 8, False)]
    while b.engine.has_work():
        b.step()
    assert b.said.tokens[9] == alone(request)[0]
    assert spans(b.said) == [(0, 8, False)]
    for index in range(4):
        b.engine.export_release(0, index)
        b.drain()
    assert spans(b.said) == [(0, 8, False), (8, 8, False), (16, 8, False), (24, 6, True)]
    b.assert_empty()


def test_import_takes_what_the_local_cache_has(pair, alone):
    p, d = pair()
    d.submit(prompt_of(30), handle=5, max_tokens=1)
    d.drain()
    computed = d.runner.num_computed_tokens
    request = p.submit(prompt_of(37), phase=Phase.PREFILL, max_tokens=9)
    d.submit(prompt_of(37), phase=Phase.DECODE, max_tokens=9)
    p.drain()
    first = d.engine.import_blocks(0, 0, 16)
    second = d.engine.import_blocks(0, 16, 16)
    assert (first.num_cached_blocks, second.num_cached_blocks) == (4, 3)
    assert len(set(first.blocks + second.blocks[:3])) == 7
    assert d.engine.import_blocks(0, 16, 16) == second
    for chunk in p.said.exports:
        d.pull(p, 0, chunk)
        p.engine.export_release(0, chunk.chunk_index)
        p.drain()
    d.engine.resume(0, [p.said.tokens[0]], [False])
    d.drain()
    assert p.said.tokens[0] + d.said.tokens[0] == alone(request)[0]
    assert d.runner.num_computed_tokens - computed == 8


def test_a_wholly_cached_context_needs_no_bytes(bench, alone):
    d = bench()
    request = d.submit(prompt_of(32), handle=5, max_tokens=9)
    tokens = d.drain().tokens[5]
    d.submit(prompt_of(32), phase=Phase.DECODE, max_tokens=9)
    assert d.engine.import_blocks(0, 0, 32).num_cached_blocks == 8
    d.engine.import_commit(0, 0, 32)
    d.engine.resume(0, [tokens[:1]], [False])
    assert d.drain().tokens[0] == alone(request)[0][1:]


def test_a_committed_block_is_found_by_others_and_not_written_again(pair):
    p, d = pair()
    p.submit(prompt_of(30), phase=Phase.PREFILL)
    p.drain()
    d.submit(prompt_of(30), phase=Phase.DECODE)
    assert d.pull(p, 0, p.said.exports[0])
    assert d.engine.import_blocks(0, 0, 16).num_cached_blocks == 4
    assert d.engine.import_blocks(0, 0, 24).num_cached_blocks == 4
    d.submit(prompt_of(17), handle=1, max_tokens=1)
    assert d.drain().prompts[1].num_cached_tokens == 16


def test_what_was_opened_but_not_committed_is_not_found(pair):
    _, d = pair()
    d.submit(prompt_of(30), phase=Phase.DECODE)
    d.engine.import_blocks(0, 0, 16)
    d.submit(prompt_of(17), handle=1, max_tokens=1)
    assert d.drain().prompts[1].num_cached_tokens == 0


def test_a_gap_is_not_jumped(pair):
    p, d = pair()
    p.submit(prompt_of(30), phase=Phase.PREFILL)
    p.drain()
    d.submit(prompt_of(30), phase=Phase.DECODE)
    second = next(chunk for chunk in p.said.exports if chunk.first_token == 16)
    assert d.pull(p, 0, second)
    with pytest.raises(HandoverError, match="only 0 of 30"):
        d.engine.resume(0, [p.said.tokens[0]], [False])
    d.submit(prompt_of(29), handle=1, max_tokens=1)
    assert d.drain().prompts[1].num_cached_tokens == 0


def test_a_retried_prefill_may_cut_the_context_differently(pair, alone, bench):
    p, d = pair()
    request = p.submit(prompt_of(30), phase=Phase.PREFILL, max_tokens=5)
    d.submit(prompt_of(30), phase=Phase.DECODE, max_tokens=5)
    p.drain()
    assert d.pull(p, 0, p.said.exports[0])
    d.engine.import_blocks(0, 16, 4)
    retry = bench(chunk_tokens=6)
    retry.submit(prompt_of(30), phase=Phase.PREFILL, max_tokens=5)
    for chunk in retry.drain().exports:
        assert d.pull(retry, 0, chunk)
    d.engine.resume(0, [retry.said.tokens[0]], [False])
    d.drain()
    assert retry.said.tokens[0] + d.said.tokens[0] == alone(request)[0]
    d.assert_empty()


def test_decode_submissions_wait_for_room_in_order(bench):
    d = bench(10, max_model_len=40)
    for handle in range(3):
        d.submit(prompt_of(20, handle), handle=handle, phase=Phase.DECODE)
    assert d.engine.load().num_free_blocks == 0
    assert d.engine.load().num_waiting == 1
    assert d.engine.import_blocks(0, 0, 16) is not None
    assert d.engine.import_blocks(1, 0, 16) is not None
    assert d.engine.import_blocks(2, 0, 16) is None
    d.engine.cancel(0)
    assert d.engine.import_blocks(2, 0, 16) is not None
    for handle in (1, 2):
        d.engine.cancel(handle)
    d.assert_empty()


def test_what_is_ready_to_come_takes_the_room_of_what_is_not(bench, alone):
    """Else the exporter, full of KV that has no room at decode, can't compute the KV that has."""
    p, d = bench(8, max_model_len=32), bench(8, max_model_len=32)
    for handle, priority in ((0, 1), (1, 0)):
        d.submit(prompt_of(20, handle), handle=handle, phase=Phase.DECODE, priority=priority, max_tokens=3)
    ready = p.submit(prompt_of(20, 1), handle=1, phase=Phase.PREFILL, priority=0, max_tokens=3)
    p.submit(prompt_of(20, 0), handle=0, phase=Phase.PREFILL, priority=1, max_tokens=3)
    p.drain()
    assert {chunk.handle for chunk in p.said.exports} == {1}, "no room for both at prefill"
    assert all(d.pull(p, 1, chunk) for chunk in p.said.exports)
    d.engine.resume(1, [p.said.tokens[1]], [False])
    p.engine.export_release(1)
    d.drain()
    assert p.said.tokens[1] + d.said.tokens[1] == alone(ready)[0]
    p.drain()
    assert all(d.pull(p, 0, chunk) for chunk in p.said.exports if chunk.handle == 0)


def test_a_running_sequence_takes_the_room_reserved_for_a_younger_one(bench, alone):
    d = bench(4, max_model_len=16)
    request = d.submit(prompt_of(7), max_tokens=8)
    d.step()
    d.submit(prompt_of(8, 3), handle=1, phase=Phase.DECODE)
    assert d.engine.load().num_free_blocks == 0
    assert d.drain().tokens[0] == alone(request)[0]
    assert d.engine.load().num_preemptions == 0


def test_through_a_staging_area_requests_leave_one_after_the_other(bench):
    b = bench(host=False, staging_blocks=3, chunk_tokens=8, max_num_batched_tokens=16)
    for handle in (0, 1):
        b.submit(prompt_of(16, handle), handle=handle, phase=Phase.PREFILL)
    b.drain()
    assert [chunk.handle for chunk in b.said.exports] == [0, 0]
    b.engine.cancel(0)
    b.drain()
    assert [chunk.handle for chunk in b.said.exports] == [0, 0, 1, 1]


def test_reserved_blocks_are_not_taken_by_other_requests(bench):
    d = bench(10, max_model_len=40)
    d.submit(prompt_of(30), phase=Phase.DECODE)
    d.submit(prompt_of(9), handle=1, max_tokens=1)
    assert not d.engine.step().output.handles
    assert not d.engine.has_work()
    d.engine.cancel(0)
    assert d.engine.has_work()
    assert 1 in d.drain().finishes


@pytest.mark.parametrize("progress", ["reserved", "opened", "committed", "resumed"])
def test_cancel_at_decode_frees_at_every_stage(pair, progress):
    p, d = pair()
    p.submit(prompt_of(20), phase=Phase.PREFILL, n=2, temperature=1.0, max_tokens=5)
    p.drain()
    d.submit(prompt_of(20), phase=Phase.DECODE, n=2, temperature=1.0, max_tokens=5)
    if progress == "opened":
        d.engine.import_blocks(0, 0, 16)
    if progress in ("committed", "resumed"):
        assert all(d.pull(p, 0, chunk) for chunk in p.said.exports)
    if progress == "resumed":
        d.engine.resume(0, [p.said.tokens[0], p.said.tokens[1]], [False, False])
        d.step()
    d.engine.cancel(0)
    d.assert_empty()
    with pytest.raises(KeyError):
        d.engine.import_blocks(0, 0, 16)
    with pytest.raises(KeyError):
        d.engine.import_commit(0, 0, 16)


def test_choices_marked_finished_are_not_run(pair, alone):
    p, d = pair()
    fields = {"n": 3, "temperature": 1.0, "max_tokens": 6}
    request = p.submit(prompt_of(10), phase=Phase.PREFILL, **fields)
    d.submit(prompt_of(10), phase=Phase.DECODE, **fields)
    p.drain()
    for chunk in p.said.exports:
        d.pull(p, 0, chunk)
    d.engine.resume(0, [p.said.tokens[i] for i in range(3)], [False, True, False])
    d.engine.cancel_choice(2)
    said = d.drain()
    assert list(said.finishes) == [0]
    assert p.said.tokens[0] + said.tokens[0] == alone(request)[0]
    d.assert_empty()


def test_a_migrated_request_moves_with_its_outputs(pair, alone, request_of):
    whole = alone(request_of(prompt_of(14), max_tokens=12))[0]
    p, d = pair()
    p.submit(prompt_of(14), outputs=[whole[:5]], phase=Phase.PREFILL, max_tokens=12)
    d.submit(prompt_of(14), outputs=[whole[:5]], phase=Phase.DECODE, max_tokens=12)
    move(p, d)
    d.drain()
    assert sum(chunk.num_tokens for chunk in p.said.exports) == 19
    assert (p.said.first_indexes[0], d.said.first_indexes[0]) == (5, 6)
    assert whole[:5] + p.said.tokens[0] + d.said.tokens[0] == whole
    assert d.said.finishes[0].num_output_tokens == 12


def test_a_decode_that_is_preempted_computes_its_context_here(bench, alone):
    p, d = bench(64), bench(12, max_model_len=48)
    requests = {}
    for handle in range(4):
        requests[handle] = p.submit(prompt_of(9, handle), handle=handle, phase=Phase.PREFILL, max_tokens=25)
        d.submit(prompt_of(9, handle), handle=handle, phase=Phase.DECODE, max_tokens=25)
    p.drain()
    waiting = list(p.said.exports)
    while waiting or d.engine.has_work():
        chunk = waiting[0] if waiting else None
        if chunk is not None and d.pull(p, chunk.handle, chunk):
            waiting.pop(0)
            d.engine.resume(chunk.handle, [p.said.tokens[chunk.handle]], [False])
        d.step()
    assert d.engine.load().num_preemptions > 0
    for handle, request in requests.items():
        assert p.said.tokens[handle] + d.said.tokens[handle] == alone(request)[0]
    d.assert_empty()


def test_two_that_arrived_whole_and_need_one_more_block_each_do_not_block_each_other(bench, alone):
    p, d = bench(64), bench(4, max_model_len=16, max_num_seqs=1)
    requests = {}
    for handle, priority in ((0, 1), (1, 0)):
        fields = {"priority": priority, "max_tokens": 6}
        requests[handle] = p.submit(prompt_of(8, handle), handle=handle, phase=Phase.PREFILL, **fields)
        d.submit(prompt_of(8, handle), handle=handle, phase=Phase.DECODE, **fields)
    p.drain()
    for chunk in p.said.exports:
        assert d.pull(p, chunk.handle, chunk)
        d.engine.resume(chunk.handle, [p.said.tokens[chunk.handle]], [False])
    d.drain()
    assert list(d.said.finishes) == [1, 0]
    for handle, request in requests.items():
        assert p.said.tokens[handle] + d.said.tokens[handle] == alone(request)[0]


def test_outputs_that_end_a_choice_are_finished_at_once(bench):
    d = bench()
    d.submit(prompt_of(8), handle=5, max_tokens=1)
    first = d.drain().tokens[5]
    d.submit([*prompt_of(8), 1], phase=Phase.DECODE, max_tokens=1)
    d.engine.import_blocks(0, 0, 9)
    d.engine.import_commit(0, 0, 9)
    d.engine.resume(0, [first], [False])
    assert d.drain().finishes[0].reason is FinishReason.LENGTH
    assert 0 not in d.said.tokens
    d.assert_empty()


def test_a_context_that_can_never_fit_is_not_waited_for(bench):
    d = bench(4, max_model_len=16)
    with pytest.raises(ContextLengthExceeded):
        d.submit(prompt_of(10), outputs=[prompt_of(7)], phase=Phase.DECODE)
    d.assert_empty()


@pytest.mark.parametrize("span", [(1, 4), (0, 5), (0, 32), (20, 4), (0, 0)])
def test_a_chunk_that_is_not_whole_blocks_of_the_context_is_refused(bench, span):
    d = bench()
    d.submit(prompt_of(18), phase=Phase.DECODE)
    with pytest.raises(HandoverError, match="not whole blocks"):
        d.engine.import_blocks(0, *span)


def test_commits_are_taken_for_opened_chunks_only_and_may_be_repeated(bench):
    d = bench()
    d.submit(prompt_of(18), phase=Phase.DECODE)
    d.engine.import_blocks(0, 0, 16)
    with pytest.raises(HandoverError, match="never opened"):
        d.engine.import_commit(0, 16, 2)
    d.engine.import_commit(0, 0, 16)
    d.engine.import_commit(0, 0, 16)


def test_a_chunk_larger_than_the_staging_area_is_refused_with_advice(bench):
    d = bench(host=False, staging_blocks=2)
    d.submit(prompt_of(18), phase=Phase.DECODE)
    with pytest.raises(HandoverError, match="staging_blocks"):
        d.engine.import_blocks(0, 0, 16)
    assert d.engine.import_blocks(0, 0, 8) is not None
    assert d.engine.import_blocks(0, 8, 8) is None
    d.engine.import_commit(0, 0, 8)
    assert d.engine.import_blocks(0, 8, 8) is not None
    d.engine.cancel(0)
    d.assert_empty()


@pytest.mark.parametrize(
    ("outputs", "finished", "error"),
    [
        ([[1]], [False], InvalidRequest),
        ([[1], []], [False, False], HandoverError),
        ([[1], [50]], [False, False], HandoverError),
    ],
)
def test_resume_with_wrong_outputs_is_refused(bench, outputs, finished, error):
    d = bench()
    d.submit(prompt_of(8), phase=Phase.DECODE, n=2, temperature=1.0)
    d.engine.import_blocks(0, 0, 8)
    d.engine.import_commit(0, 0, 8)
    with pytest.raises(error):
        d.engine.resume(0, outputs, finished)
