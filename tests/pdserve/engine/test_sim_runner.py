import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.engine.core.runner import Scheduled, Sequence
from pdserve.engine.sim_kv import KV_BYTES, chain, digest, initial_state
from pdserve.engine.sim_runner import SimRunner
from pdserve.engine.sim_sampling import Vocabulary
from pdserve.errors import NotSupported
from pdserve.types import Grammar, GrammarKind, ModelInfo, Request, SamplingParams

BLOCK = 4
MODEL = ModelInfo("m", "r", "t", 1024, 1000, (2,))


def make_runner(num_blocks=64, seed=0, host_memory=True):
    runner = SimRunner(MODEL, Vocabulary(1000, 17, (2,), 0), BLOCK, seed, host_memory)
    pool = np.zeros((num_blocks, BLOCK * KV_BYTES), dtype=np.uint8)
    runner.allocate(num_blocks, pool)
    return runner, pool


def make_seq(tokens, blocks, num_prompt=None, choice=0, lora="", **params):
    params.setdefault("temperature", 0)
    request = Request("r", "m", tuple(tokens), SamplingParams(**params), lora=lora)
    return Sequence(request, 10 + choice, choice, list(tokens), num_prompt or len(tokens), 0, list(blocks))


def run_one(runner, seq, start, num_tokens, sampled=True):
    results = runner.run([Scheduled(seq, start, num_tokens, (seq,) if sampled else ())])
    return results[0].token_id if sampled else None


tokens_lists = st.lists(st.integers(0, 999), min_size=1, max_size=40)


@settings(derandomize=True)
@given(tokens_lists, st.data())
def test_kv_is_one_chain_however_it_is_cut(tokens, data):
    whole = chain(initial_state(0, ""), 0, tokens)
    cut = data.draw(st.integers(0, len(tokens)))
    state = int(whole[cut - 1, 0]) if cut else initial_state(0, "")
    assert np.array_equal(whole[cut:], chain(state, cut, tokens[cut:]))


@settings(derandomize=True)
@given(tokens_lists, st.data())
def test_a_changed_token_changes_all_kv_from_there(tokens, data):
    place = data.draw(st.integers(0, len(tokens) - 1))
    changed = [*tokens[:place], tokens[place] + 1, *tokens[place + 1 :]]
    a, b = chain(5, 0, tokens), chain(5, 0, changed)
    assert np.array_equal(a[:place], b[:place])
    assert not (a[place:] == b[place:]).any()


def test_models_and_loras_have_their_own_kv():
    assert len({initial_state(0, ""), initial_state(1, ""), initial_state(0, "x")}) == 3


@settings(derandomize=True, max_examples=50)
@given(tokens_lists, st.data())
def test_chunks_and_decodes_of_a_batch_write_the_same_kv_as_one_pass(tokens, data):
    runner, pool = make_runner()
    order = data.draw(st.permutations(range(20)))
    seq = make_seq(tokens, order[: -(-len(tokens) // BLOCK)])
    at = 0
    while at < len(tokens):
        step = data.draw(st.integers(1, len(tokens) - at))
        run_one(runner, seq, at, step)
        at += step
    rows = pool.reshape(-1, KV_BYTES)
    found = [rows[seq.block_table[i // BLOCK] * BLOCK + i % BLOCK].tobytes() for i in range(len(tokens))]
    expected = chain(initial_state(0, ""), 0, tokens)
    assert found == [row.tobytes() for row in expected]
    assert runner._digest(seq, len(tokens)) == digest(expected)


@settings(derandomize=True, max_examples=100)
@given(st.integers(1, 12), st.integers(0, 12 * BLOCK * KV_BYTES), st.integers(1, 255), st.integers(0, 2**31))
def test_any_wrong_byte_gives_a_wrong_token(num_blocks, place, flip, seed):
    rng = random.Random(seed)
    tokens = [rng.randrange(1000) for _ in range(num_blocks * BLOCK + 1)]
    runner, pool = make_runner()
    seq = make_seq(tokens, rng.sample(range(64), num_blocks + 1))
    run_one(runner, seq, 0, len(tokens) - 1, sampled=False)
    digest_before, token = runner._digest(seq, len(tokens) - 1), run_one(runner, seq, len(tokens) - 1, 1)
    pool[seq.block_table[place // (BLOCK * KV_BYTES) % num_blocks], place % (BLOCK * KV_BYTES)] ^= flip
    assert runner._digest(seq, len(tokens) - 1) != digest_before
    runner.run([Scheduled(seq, len(tokens) - 1, 1)])
    changed = [run_one(runner, seq, len(tokens) - 1, 1) for _ in range(2)]
    assert changed[0] == changed[1] != token


def test_swapped_blocks_give_a_wrong_token():
    runner, _ = make_runner()
    seq = make_seq(range(100, 112), [5, 9, 2, 3])
    token = run_one(runner, seq, 0, 12)
    seq.block_table[:2] = [9, 5]
    seq.token_ids.append(token)
    wrong = run_one(runner, seq, 12, 1)
    seq.block_table[:2] = [5, 9]
    assert run_one(runner, seq, 12, 1) != wrong


def test_forks_sample_from_one_context():
    runner, _ = make_runner()
    base = make_seq(range(100, 110), [0, 1, 2], n=16, temperature=1.0, seed=3)
    forks = tuple(make_seq(range(100, 110), [], choice=c, n=16, temperature=1.0, seed=3) for c in range(16))
    found = [sampled.token_id for sampled in runner.run([Scheduled(base, 0, 10, forks)])]
    assert len(found) == 16
    assert len(set(found)) > 2
    alone = make_seq(range(100, 110), [7, 8, 9], choice=5, n=16, temperature=1.0, seed=3)
    assert run_one(runner, alone, 0, 10) == found[5]


def test_logprobs_come_when_asked_for():
    runner, _ = make_runner()
    seq = make_seq(range(100, 110), [0, 1, 2], logprobs=3)
    (sampled,) = runner.run([Scheduled(seq, 0, 10, (seq,))])
    assert sampled.logprobs is not None
    assert sampled.logprobs.top_ids[0] == sampled.token_id
    assert (sampled.logprobs.handle, sampled.logprobs.index, len(sampled.logprobs.top_ids)) == (10, 0, 3)


def test_a_grammar_is_refused():
    runner, _ = make_runner()
    with pytest.raises(NotSupported):
        runner.open(make_seq([1], [0], grammar=Grammar(GrammarKind.JSON_OBJECT)))


def test_copies_and_staging_move_whole_blocks():
    runner, pool = make_runner(host_memory=False)
    seq = make_seq(range(100, 108), [3, 4])
    run_one(runner, seq, 0, 8)
    runner.copy_blocks([3, 4], [10, 11])
    assert (pool[10:12] == pool[3:5]).all()
    staging = np.zeros((4, BLOCK * KV_BYTES), dtype=np.uint8)
    runner.stage_out([3, 4], staging, [2, 0])
    assert (staging[2] == pool[3]).all()
    runner.stage_in(staging, [2, 0], [20, 21])
    assert (pool[20:22] == pool[3:5]).all()
