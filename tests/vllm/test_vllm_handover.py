"""Prefill in one vLLM, decode in another: the same tokens as in one."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace

import pytest
from vllm_pair import BUDGET, MAX_LEN, Driven, Pair, before_vllm_has_it, make_request, renamed

from pdserve.errors import (
    ContextLengthExceeded,
    DigestMismatch,
    HandoverError,
    InvalidRequest,
    NotSupported,
    StaleBlock,
)
from pdserve.types import FinishReason, Grammar, GrammarKind, Phase, Request, SamplingParams

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)
SAMPLED = {"temperature": 0.9, "seed": 11}
WAYS: dict[str, dict[str, object]] = {
    "seeded": SAMPLED,
    "top_p_top_k_min_p": {"temperature": 1.1, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "seed": 12},
    "penalties": {**SAMPLED, "presence_penalty": 0.8, "frequency_penalty": 0.6, "repetition_penalty": 1.3},
    "min_tokens": {**SAMPLED, "min_tokens": 10, "logit_bias": ((2, 100.0),)},
    "logit_bias": {"logit_bias": ((198, -100.0), (260, 4.0))},
    "json_schema": {**SAMPLED, "grammar": Grammar(GrammarKind.JSON_SCHEMA, SCHEMA)},
    "regex": {**SAMPLED, "grammar": Grammar(GrammarKind.REGEX, "[a-f]{6,20}")},
    "json_object": {**SAMPLED, "grammar": Grammar(GrammarKind.JSON_OBJECT)},
}


def alone(engine: Driven, request: Request) -> list[list[int]]:
    """As one vLLM does it that has never seen the prompt."""
    return engine.run_alone(renamed(request, "alone " + request.request_id))[0]


def test_greedy_prompts_of_many_lengths_are_identical(pair: Pair) -> None:
    requests = [make_request(f"greedy{n}", n) for n in (1, 15, 16, 17, 63, 64, 129, 300, 701)]
    expected = [alone(pair.prefill, request) for request in requests]
    assert pair.run(*requests) == expected
    assert all(len(tokens) == 16 for (tokens,) in expected)


def test_chunks_are_announced_while_prefill_goes_on(pair: Pair) -> None:
    request = make_request("chunks", 5 * BUDGET + 9)
    p, d = pair.start(request)
    pair.prefill.run_until(lambda: pair.prefill.prefilled(p))
    chunks = pair.prefill.exports[p]
    assert [chunk.chunk_index for chunk in chunks] == list(range(len(chunks)))
    ends = [0, *(chunk.first_token + chunk.num_tokens for chunk in chunks)]
    assert [chunk.first_token for chunk in chunks] == ends[:-1]
    assert ends[-1] == len(request.prompt_token_ids)
    events = [what for what, handle in pair.prefill.order if handle == p]
    assert events.index("token") >= 3, "chunks must leave before the first token is sampled"
    pair.decode.engine.cancel(d)
    pair.prefill.engine.cancel(p)


@pytest.mark.parametrize("way", WAYS)
def test_sampling_goes_on_as_if_never_moved(pair: Pair, way: str) -> None:
    requests = [make_request(f"{way}{n}", n, 24, **WAYS[way]) for n in (20, 90, 150)]
    expected = [alone(pair.decode, request) for request in requests]
    assert pair.run(*requests) == expected


def test_every_choice_has_its_own_seed_and_goes_on_with_it(pair: Pair) -> None:
    request = make_request("choices", 100, n=3, **SAMPLED)
    expected = alone(pair.decode, request)
    assert pair.run(request) == [expected]
    assert len({tuple(tokens) for tokens in expected}) == 3


def test_logprobs_are_those_of_one_engine(pair: Pair) -> None:
    request = make_request("logprobs", 80, 8, logprobs=3)
    a = pair.decode.submit(renamed(request, "alone logprobs"), Phase.FULL)
    pair.decode.run_until(lambda: a in pair.decode.finishes)
    p, d = pair.prefill._next_handle, pair.decode._next_handle
    pair.run(request)
    expected, found = pair.decode.logprobs[a], pair.prefill.logprobs[p] + pair.decode.logprobs[d]
    assert [(e.index, e.rank, e.top_ids) for e in found] == [(e.index, e.rank, e.top_ids) for e in expected]
    assert [e.index for e in found] == list(range(8))
    assert [e.logprob for e in found] == pytest.approx([e.logprob for e in expected], abs=1e-3)
    assert all(e.top_logprobs[0] == e.logprob and len(e.top_ids) == 3 for e in found)


@pytest.mark.parametrize("way", ["greedy", "seeded", "penalties"])
def test_a_migrated_request_goes_on_after_its_outputs(pair: Pair, way: str) -> None:
    """Greedy outputs are folded into the prompt; where sampling looks at outputs they are forced."""
    request = make_request(f"migrated {way}", 70, 20, **WAYS.get(way, {}))
    (tokens,) = alone(pair.decode, request)
    migrated = replace(request, output_token_ids=(tuple(tokens[:7]),))
    assert pair.run(migrated) == [[tokens[7:]]]
    assert pair.decode.run_alone(renamed(migrated, "full " + way)) == [[tokens[7:]]]


def test_cached_prompts_are_exported_whole(pair: Pair) -> None:
    request = make_request("cached", 500)
    first = pair.run(request)
    p = pair.prefill._next_handle
    assert pair.run(request) == first
    assert pair.prefill.prompts[p].num_cached_tokens >= 256
    assert pair.prefill.prompts[p].num_prompt_tokens == 500


def test_a_choice_that_its_first_token_ends_is_not_decoded(pair: Pair) -> None:
    request = make_request("one token", 40, max_tokens=1)
    p = pair.prefill._next_handle
    assert len(pair.prefill.run_alone(request)[0][0]) == 1
    assert pair.prefill.finishes[p].reason is FinishReason.LENGTH
    (token,) = pair.prefill.tokens[p]
    stopped = make_request("one token", 40, stop_token_ids=(token,))
    p, d = pair.start(stopped)
    pair.prefill.run_until(lambda: p in pair.prefill.finishes)
    finish = pair.prefill.finishes[p]
    assert (finish.reason, finish.stop_token_id, finish.num_output_tokens) == (FinishReason.STOP, token, 1)
    pair.prefill.engine.cancel(p)
    pair.decode.engine.cancel(d)


def test_the_length_of_the_context_ends_a_choice(pair: Pair) -> None:
    request = make_request("long", MAX_LEN - 3, max_tokens=50)
    expected = alone(pair.decode, request)
    d = pair.decode._next_handle
    assert pair.run(request) == [expected]
    assert len(expected[0]) == 3
    assert pair.decode.finishes[d].reason is FinishReason.LENGTH
    assert pair.decode.finishes[d].num_output_tokens == 3


# What goes wrong


def spoil_byte(engine: Driven, handle: int, block_index: int) -> None:
    """As a late one-sided write would."""
    target = engine.engine.import_blocks(handle, 0, engine.engine._live[handle].num_context_tokens)
    assert target is not None
    engine.pool.blocks[target.blocks[block_index], 1000:60_000] ^= 0x3C


def test_a_corrupted_pull_is_refused_by_its_digest(pair: Pair) -> None:
    request = make_request("corrupted pull", 100)
    p, d = pair.start(request)
    pair.prefill.run_until(lambda: pair.prefill.prefilled(p))
    original = pair.manifest
    spoiled = pair.prefill.exports[p][0].blocks[0]

    def corrupt_after_digest(chunk: object) -> object:
        manifest = original(chunk)
        pair.prefill.pool.blocks[spoiled, 5] ^= 1
        return manifest

    pair.manifest = corrupt_after_digest
    with pytest.raises(DigestMismatch):
        pair.pull(p, d)
    pair.prefill.engine.cancel(p)
    pair.decode.engine.cancel(d)


@pytest.mark.parametrize("block_index", [0, 5, 11])
def test_recompute_gives_the_right_tokens_from_a_spoiled_staging_block(pair: Pair, block_index: int) -> None:
    request = make_request(f"spoiled{block_index}", 180)
    expected = alone(pair.decode, request)
    assert pair.run(request, before_resume=lambda d: spoil_byte(pair.decode, d, block_index)) == [expected]


@pytest.mark.parametrize(("spoil", "error"), [("bytes", DigestMismatch), ("generation", StaleBlock)])
def test_fail_ends_the_request_with_the_reason(pair: Pair, spoil: str, error: type[HandoverError]) -> None:
    """The engine whose policy is `fail` decodes here."""
    reverse = Pair(pair.decode, pair.prefill)
    request = make_request(f"fails {spoil}", 180)

    def reuse(block: int) -> None:
        reverse.decode.pool.generations[block] += 1

    def damage(handle: int) -> None:
        target = reverse.decode.engine.import_blocks(handle, 0, 180)
        if spoil == "bytes":
            spoil_byte(reverse.decode, handle, 3)
            return
        reused.enter_context(before_vllm_has_it(reverse.decode, lambda: reuse(target.blocks[3])))

    d = reverse.decode._next_handle
    with ExitStack() as reused:
        reverse.run(request, before_resume=damage)
    finish = reverse.decode.finishes[d]
    assert finish.reason is FinishReason.ERROR
    assert isinstance(finish.error, error)
    assert d not in reverse.decode.tokens


def test_resume_before_all_is_committed_is_refused(pair: Pair) -> None:
    p, d = pair.start(make_request("early", 40))
    pair.prefill.run_until(lambda: pair.prefill.prefilled(p))
    pair.decode.engine.import_blocks(d, 0, 16)
    pair.decode.engine.import_commit(d, 0, 16)
    with pytest.raises(HandoverError):
        pair.decode.engine.resume(d, [pair.prefill.tokens[p]], [False])
    with pytest.raises(HandoverError):
        pair.decode.engine.import_blocks(d, 8, 16)
    with pytest.raises(KeyError):
        pair.decode.engine.import_blocks(d + 1000, 0, 16)
    pair.prefill.engine.cancel(p)
    pair.decode.engine.cancel(d)


# Cancel, room


def test_cancel_frees_both_sides_wherever_the_request_is(pair: Pair) -> None:
    """`settle` in the fixture counts every block and slot."""
    request = make_request("cancelled", 600, 400)
    p, d = pair.start(request)
    pair.prefill.engine.cancel(p)
    pair.decode.engine.cancel(d)  # before anything ran
    p, d = pair.start(renamed(request, "cancelled 2"))
    pair.prefill.run_until(lambda: p in pair.prefill.exports)
    pair.prefill.engine.cancel(p)  # amid prefill
    p = pair.prefill.submit(renamed(request, "cancelled 3"), Phase.PREFILL)
    pair.prefill.run_until(lambda: pair.prefill.prefilled(p))
    pair.pull(p, d)
    pair.resume(p, d, request)
    pair.decode.engine.cancel(d)  # while vLLM loads
    d = pair.decode.submit(request, Phase.DECODE)
    p = pair.prefill.submit(renamed(request, "cancelled 4"), Phase.PREFILL)
    pair.prefill.run_until(lambda: pair.prefill.prefilled(p))
    pair.pull(p, d)
    pair.resume(p, d, request)
    pair.decode.run_until(lambda: d in pair.decode.tokens)
    pair.decode.engine.cancel(d)  # amid decode
    pair.decode.engine.cancel(d)
    tokens = len(pair.decode.tokens[d])
    pair.decode.settle()
    assert len(pair.decode.tokens[d]) == tokens, "nothing may come after a cancel"


def test_one_choice_can_be_cancelled(pair: Pair) -> None:
    request = make_request("two choices", 60, 30, n=2, **SAMPLED)
    expected = alone(pair.decode, request)
    handle = pair.decode.submit(renamed(request, "two choices b"), Phase.FULL)
    pair.decode.run_until(lambda: len(pair.decode.tokens.get(handle, [])) >= 3)
    pair.decode.engine.cancel_choice(handle)
    pair.decode.run_until(lambda: handle + 1 in pair.decode.finishes)
    assert handle not in pair.decode.finishes
    assert pair.decode.tokens[handle + 1] == expected[1]


def test_a_freed_block_gets_a_new_generation_before_it_is_written(pair: Pair) -> None:
    p = pair.prefill.submit(make_request("generation a", 64), Phase.PREFILL)
    pair.prefill.run_until(lambda: pair.prefill.prefilled(p))
    (block, *_), (generation, *_) = pair.prefill.exports[p][0].blocks, pair.prefill.exports[p][0].generations
    assert pair.prefill.pool.generations[block] == generation
    pair.prefill.engine.cancel(p)
    pair.prefill.settle()
    staging = pair.prefill.engine._staging
    assert pair.prefill.pool.generations[block] == generation, "it can still be found"
    everything, _ = staging.allocate(staging.num_blocks, 0)
    assert pair.prefill.pool.generations[block] == generation + 1
    staging.retire_blocks(everything)


def test_requests_wait_for_room_in_the_staging_area_in_order(pair: Pair) -> None:
    engine = pair.prefill
    room = engine.engine._staging.num_blocks
    size = MAX_LEN - 1
    requests = [make_request(f"room{i}", size, 2) for i in range(room // (size // 16 + 1) + 2)]
    handles = [engine.submit(request, Phase.PREFILL) for request in requests]
    first, last = handles[0], handles[-1]
    engine.run_until(lambda: engine.prefilled(first) and not engine.engine.has_work())
    assert not engine.prefilled(last)
    assert engine.engine.load().num_waiting >= 2
    d = pair.decode.submit(requests[0], Phase.DECODE)
    pair.pull(first, d)
    engine.engine.cancel(handles[1])
    engine.run_until(lambda: engine.prefilled(last))
    for handle in handles:
        engine.engine.export_release(handle)
        engine.engine.export_release(handle)
    pair.decode.engine.cancel(d)
    assert engine.engine.load().num_exported_blocks == 0


# Refusals


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"prompt_token_ids": ()}, InvalidRequest),
        ({"prompt_token_ids": (1, 60_000)}, InvalidRequest),
        ({"prompt_token_ids": (5,) * MAX_LEN}, ContextLengthExceeded),
        ({"deterministic": True}, NotSupported),
        ({"lora": "adapter"}, NotSupported),
        ({"params": SamplingParams(grammar=Grammar(GrammarKind.REGEX, "(unclosed"))}, InvalidRequest),
        ({"params": SamplingParams(grammar=Grammar(GrammarKind.JSON_SCHEMA, '{"type": 7}'))}, InvalidRequest),
        ({"params": SamplingParams(grammar=Grammar(GrammarKind.JSON_SCHEMA, "{"))}, InvalidRequest),
    ],
)
def test_what_cannot_be_run_is_refused_at_once(pair: Pair, change: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        pair.prefill.submit(replace(make_request("bad", 10), **change), Phase.PREFILL)


def test_what_vllm_itself_refuses_ends_the_request_with_an_error(pair: Pair) -> None:
    """A bias for a token outside the vocabulary is seen by vLLM alone."""
    handle = pair.prefill.submit(make_request("bias", 20, logit_bias=((900_000, 1.0),)), Phase.PREFILL)
    pair.prefill.run_until(lambda: handle in pair.prefill.finishes)
    assert isinstance(pair.prefill.finishes[handle].error, InvalidRequest)
    pair.prefill.engine.cancel(handle)
