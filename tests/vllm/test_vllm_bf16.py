"""One engine in bf16 that hands over to itself: another dtype (AMX packs its pages), another block size, few blocks,
and no digests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from test_vllm_handover import alone, spoil_byte
from vllm_pair import SMALL_BLOCK as BLOCK
from vllm_pair import Driven, Pair, SelfPair, keys_of, make_request, renamed

from pdserve.types import Phase

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]


@pytest.fixture
def engine(small: Driven) -> Driven:
    return small


@pytest.fixture
def pair(engine: Driven) -> Iterator[Pair]:
    yield SelfPair(engine, engine)
    engine.settle()


NUM_COMPARED = 4
"""bf16 rounds by batch shape (a logit of 16 to 0.06), and decode computes the last prompt token alone: later tokens may
part at a near tie. That pages are moved exactly is tested with vLLM's kernels alone."""


@pytest.mark.parametrize("length", [5, 32, 47, 200, 330])
def test_bf16_blocks_are_handed_over_whole(pair: Pair, engine: Driven, length: int) -> None:
    request = make_request(f"bf16 {length}", length, NUM_COMPARED, logprobs=1)
    a = engine.submit(renamed(request, "alone"), Phase.FULL)
    engine.run_until(lambda: a in engine.finishes)
    p, d = engine._next_handle, engine._next_handle + 1
    assert pair.run(request) == [[engine.tokens[a]]]
    moved = [entry.logprob for entry in engine.logprobs[p] + engine.logprobs[d]]
    assert moved == pytest.approx([entry.logprob for entry in engine.logprobs[a]], abs=0.4)


def test_without_the_check_a_spoiled_block_changes_the_output(pair: Pair, engine: Driven) -> None:
    """So decode does use what was handed over, and the check is what catches it elsewhere."""
    request = make_request("unchecked", 150, NUM_COMPARED)
    expected = alone(engine, request)
    assert pair.run(request) == [expected]
    spoiled = pair.run(renamed(request, "spoiled"), before_resume=lambda d: spoil_byte(engine, d, 4))
    assert spoiled != [expected]


def test_a_prefill_that_vllm_preempts_is_exported_whole_and_once(pair: Pair, engine: Driven) -> None:
    """The other request's growth takes the last block, so the prefill is thrown out amid its chunks and redone."""
    request = make_request("preempted", 13 * BLOCK, NUM_COMPARED)
    expected = alone(engine, request)
    grows = engine.submit(make_request("grows", 319, 60, ignore_eos=True), Phase.FULL)
    p, d = pair.start(request)
    engine.run_until(lambda: grows in engine.finishes and engine.prefilled(p))
    assert engine.engine.load().num_preemptions >= 1
    chunks = engine.exports[p]
    assert sum(chunk.num_tokens for chunk in chunks) == 13 * BLOCK
    pair.pull(p, d)
    pair.resume(p, d, request)
    engine.run_until(lambda: d in engine.finishes)
    assert [engine.tokens[p] + engine.tokens[d]] == expected


def test_without_the_check_a_spoiled_block_of_a_store_changes_the_output(engine: Driven) -> None:
    request = make_request("unchecked store", 150, NUM_COMPARED)
    expected = alone(engine, request)
    engine.keeps = {}
    engine.run_alone(renamed(request, "writes"))
    content = dict(
        zip(keys_of(request), [engine.keeps[key] for key in keys_of(renamed(request, "writes"))], strict=True)
    )
    engine.keeps = None
    found = []
    for name in ("right", "spoiled"):
        reader = renamed(request, "reads " + name)
        mine = dict(zip(keys_of(reader), content.values(), strict=True))
        handle = engine._next_handle
        target = engine.fill(handle, keys_of(reader), mine)
        engine.engine.cache_commit(handle, len(target.blocks))
        if name == "spoiled":
            engine.pool.blocks[target.blocks[4], 1000:60_000] ^= 0x3C
        engine.submit(reader, Phase.FULL)
        engine.run_until(lambda handle=handle: handle in engine.finishes)
        found.append([engine.tokens[handle]])
    assert found[0] == expected
    assert found[1] != expected
    engine.settle()


def test_a_request_that_vllm_preempts_publishes_every_block_with_its_own_bytes(engine: Driven) -> None:
    """Two outputs grow until one is thrown out and computed again, from other pages."""
    first, second = (make_request(f"grows {name}", 300, 100, ignore_eos=True) for name in "ab")
    preempted = engine.engine.load().num_preemptions
    engine.keeps = {}
    (tokens,), _ = engine.run_alone(first, second)
    assert engine.engine.load().num_preemptions > preempted
    keys = keys_of(first, tokens[:-1])
    blocks = [np.frombuffer(engine.keeps[key], dtype=np.uint16) for key in keys]
    again = replace(renamed(first, "grown"), prompt_token_ids=(*first.prompt_token_ids, *tokens[:-1]))
    engine.keeps = {}
    engine.run_alone(replace(again, params=make_request("", 1, 1).params))
    expected = [np.frombuffer(engine.keeps[key], dtype=np.uint16) for key in keys_of(again)]
    engine.keeps = None
    for block, other in zip(blocks, expected, strict=True):
        assert np.abs(as_floats(block) - as_floats(other)).mean() < 0.05
    engine.settle()


def as_floats(bf16: np.ndarray) -> np.ndarray:
    return (bf16.astype(np.uint32) << 16).view(np.float32)
