"""A store behind vLLM: what one engine published is loaded by another, which then answers as if it had computed it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
from vllm_pair import BUDGET, MAX_LEN, Driven, Pair, before_vllm_has_it, keys_of, make_request, renamed

from pdserve.engine.vllm.news import ELSEWHERE
from pdserve.errors import DigestMismatch, HandoverError, StaleBlock
from pdserve.types import FinishReason, Phase, Request

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

BLOCK = 16
VLLM_BLOCK = 128
"""vLLM's own on CPU: 8 of ours."""
SAMPLED = {"temperature": 0.9, "seed": 11}


@dataclass
class Store:
    """`writer` fills it; `reader` reads it and recomputes what is bad, `strict` fails then."""

    writer: Driven
    strict: Driven
    content: dict[bytes, bytes] = field(default_factory=dict)

    @property
    def reader(self) -> Driven:
        return self.writer

    def write(self, request: Request) -> list[int]:
        """Answer a request and keep what it published; its tokens."""
        self.strict.keeps = self.content
        (tokens,) = self.strict.run_alone(request)[0]
        self.strict.settle()
        self.strict.keeps = None
        return tokens


@pytest.fixture
def store(prefill: Driven, decode: Driven) -> Iterator[Store]:
    """Written by `prefill` (which fails what it cannot load), read by `decode` (which recomputes)."""
    yield Store(decode, prefill)
    prefill.settle()
    decode.settle()


def ask(engine: Driven, request: Request, store: Store, num_blocks: int, phase: Phase = Phase.FULL) -> int:
    """As a worker does: fetch the first blocks, then submit."""
    handle = engine._next_handle
    target = engine.fill(handle, keys_of(request)[:num_blocks], store.content)
    engine.engine.cache_commit(handle, len(target.blocks))
    assert engine.submit(request, phase) == handle
    return handle


def answer(engine: Driven, handle: int, num_choices: int = 1) -> list[list[int]]:
    span = range(handle, handle + num_choices)
    engine.run_until(lambda: all(choice in engine.finishes for choice in span))
    return [engine.tokens.get(choice, []) for choice in span]


def test_everything_that_was_computed_is_published_from_the_first_block_on(store: Store) -> None:
    request = make_request("published", 100, 45, ignore_eos=True)
    tokens = store.write(request)
    assert len(tokens) == 45
    computed = keys_of(request, tokens[:-1])  # the last token's KV is nobody's need
    assert [key in store.content for key in computed] == [True] * 9
    assert len({store.content[key] for key in computed}) == 9
    handle = max(store.strict.published)
    covered = {
        block
        for told in store.strict.published[handle]
        for block in range(told.first_block, told.first_block + len(told.keys))
    }
    assert covered == set(range(9))


@pytest.mark.parametrize(("length", "num_blocks"), [(20, 1), (64, 4), (150, 3), (701, 43)])
def test_a_prompt_whose_beginning_comes_from_a_store_gives_the_same_tokens(
    store: Store, length: int, num_blocks: int
) -> None:
    """Longer ones go on in chunks after what was loaded."""
    assert BUDGET < 150
    request = make_request(f"fetched {length}", length, 12, **SAMPLED)
    expected = store.write(request)
    handle = ask(store.reader, request, store, num_blocks)
    assert answer(store.reader, handle) == [expected]
    stats = store.reader.prompts[handle]
    assert stats.num_fetched_tokens == stats.num_cached_tokens == num_blocks * BLOCK


def test_a_second_turn_finds_what_the_first_one_generated(store: Store) -> None:
    first = make_request("turn", 90, 40, ignore_eos=True)
    tokens = store.write(first)
    prompt = (*first.prompt_token_ids, *tokens, 77, 78, 79)
    second = replace(make_request("turn", 1, 10, **SAMPLED), prompt_token_ids=prompt)
    expected = store.reader.run_alone(renamed(second, "turn alone"))[0]
    num_blocks = (90 + 39) // BLOCK
    handle = ask(store.reader, second, store, num_blocks)
    assert answer(store.reader, handle) == expected
    assert store.reader.prompts[handle].num_fetched_tokens == num_blocks * BLOCK


def test_every_choice_takes_what_was_fetched(store: Store) -> None:
    request = make_request("fetched choices", 100, 10, n=3, **SAMPLED)
    expected = store.strict.run_alone(renamed(request, "choices alone"))[0]
    store.write(replace(request, params=make_request("", 1, 2).params))
    handle = ask(store.reader, request, store, 6)
    assert answer(store.reader, handle, 3) == expected


def test_a_fetched_prefix_is_handed_over_with_the_rest(store: Store) -> None:
    request = make_request("fetched and moved", 200, 8, **SAMPLED)
    expected = store.write(request)
    pair = Pair(store.reader, store.strict)
    moved = ask(store.reader, request, store, 10, Phase.PREFILL)
    d = store.strict.submit(renamed(request, "moved on"), Phase.DECODE)
    store.reader.run_until(lambda: store.reader.prefilled(moved))
    assert store.reader.prompts[moved].num_fetched_tokens == 160
    pair.pull(moved, d)
    pair.resume(moved, d, request)
    assert store.reader.tokens[moved] + answer(store.strict, d)[0] == expected


def test_a_request_waits_for_the_fill_that_is_under_way(store: Store) -> None:
    request = make_request("under way", 120, 6)
    expected = store.write(request)
    engine, handle = store.reader, store.reader._next_handle
    target = engine.fill(handle, keys_of(request), store.content)
    engine.submit(request, Phase.FULL)
    engine.run_until(lambda: not engine.engine.has_work())
    assert handle not in engine.tokens
    engine.engine.cache_commit(handle, len(target.blocks))
    assert answer(engine, handle) == [expected]
    assert engine.prompts[handle].num_fetched_tokens == len(target.blocks) * BLOCK


@pytest.mark.parametrize("how", ["dropped", "cancelled"])
def test_a_fill_that_comes_to_nothing_costs_nothing(store: Store, how: str) -> None:
    request = make_request("comes to nothing " + how, 120, 6)
    expected = store.write(request)
    engine, handle = store.reader, store.reader._next_handle
    engine.fill(handle, keys_of(request), store.content)
    engine.submit(request, Phase.FULL)
    if how == "cancelled":
        engine.engine.cancel(handle)
    engine.engine.cache_drop(handle)
    engine.engine.cache_drop(handle)
    if how == "dropped":
        assert answer(engine, handle) == [expected]
        assert engine.prompts[handle].num_fetched_tokens == 0


# What goes wrong


def spoil(engine: Driven, block: int, what: str) -> None:
    if what == "bytes":
        engine.pool.blocks[block, 1000:60_000] ^= 0x3C
    else:
        engine.pool.generations[block] += 1


@pytest.mark.parametrize("index", [0, 11])
def test_a_block_that_was_spoiled_after_it_was_fetched_is_recomputed_and_forgotten(store: Store, index: int) -> None:
    request = make_request(f"spoiled fetch {index}", 200, 8)
    expected = store.write(request)
    engine, handle = store.reader, store.reader._next_handle
    keys = keys_of(request)
    target = engine.fill(handle, keys, store.content)
    engine.engine.cache_commit(handle, len(target.blocks))
    spoil(engine, target.blocks[index], "bytes")
    engine.submit(request, Phase.FULL)
    assert answer(engine, handle) == [expected]
    engine.settle()
    again = engine._next_handle
    second = engine.engine.cache_open(again, keys)
    assert second is not None
    assert target.blocks[index] not in second.blocks[: second.num_cached_blocks], "the bad block is found no more"
    engine.engine.cache_drop(again)


@pytest.mark.parametrize(("what", "error"), [("bytes", DigestMismatch), ("generation", StaleBlock)])
def test_a_bad_block_of_a_store_fails_the_request_if_so_configured(
    store: Store, what: str, error: type[HandoverError]
) -> None:
    request = make_request(f"strict {what}", 180, 6)
    (expected,) = store.reader.run_alone(request)[0]
    store.reader.keeps = None
    engine = store.strict
    content = published_by(store.reader, request)
    handle = engine._next_handle
    target = engine.fill(handle, keys_of(request), content)
    engine.engine.cache_commit(handle, len(target.blocks))
    with before_vllm_has_it(engine, lambda: spoil(engine, target.blocks[3], what)):
        engine.submit(request, Phase.FULL)
    engine.run_until(lambda: handle in engine.finishes)
    assert engine.finishes[handle].reason is FinishReason.ERROR
    assert isinstance(engine.finishes[handle].error, error)
    assert handle not in engine.tokens
    assert len(expected) == 6


def published_by(engine: Driven, request: Request) -> dict[bytes, bytes]:
    """What the engine still has staged of a prompt."""
    keys = keys_of(request)
    lent = engine.engine.cache_lend(keys)
    assert lent is not None
    content = {key: engine.pool.blocks[block].tobytes() for key, block in zip(keys, lent, strict=False)}
    engine.engine.cache_return(lent)
    return content


# Room, and vLLM's own cache


def crowd_out(engine: Driven) -> None:
    """All of staging is needed by others for a moment."""
    staging = engine.engine._staging
    everything, _ = staging.allocate(staging.num_blocks, 0)
    staging.retire_blocks(everything)
    engine.step()


def test_what_vllm_still_has_counts_as_cached_and_is_loaded_behind(store: Store) -> None:
    request = make_request("behind", 600, 6, **SAMPLED)
    expected = store.write(request)
    engine, keys = store.reader, keys_of(request)
    shorter = replace(request, prompt_token_ids=request.prompt_token_ids[:300])
    engine.run_alone(shorter)
    engine.settle()
    num_own = 300 // VLLM_BLOCK * VLLM_BLOCK // BLOCK
    crowd_out(engine)
    assert engine.cached.issuperset(keys[:num_own])
    assert engine.cached.isdisjoint(keys[num_own:])
    assert set(engine.engine.cached_keys()) == engine.cached
    handle = engine._next_handle
    target = engine.fill(handle, keys, store.content, first_block=num_own)
    engine.engine.cache_commit(handle, len(target.blocks))
    engine.submit(request, Phase.FULL)
    assert answer(engine, handle) == [expected]
    assert engine.prompts[handle].num_cached_tokens == len(keys) * BLOCK


def test_prompts_are_timed_by_vllms_own_clock(store: Store) -> None:
    """What is cached took no time, and prompts that run side by side share theirs."""
    engine = store.strict
    engine.measured.clear()
    requests = [make_request(name, 400, 4) for name in ("timed", "timed too")]
    began = time.monotonic()
    engine.run_alone(*requests)
    engine.settle()
    engine.run_alone(make_request("spacer", 40, 8))  # polls in which nothing new is told
    elapsed = time.monotonic() - began
    assert sum(tokens for tokens, _ in engine.measured) == 800
    assert 0 < sum(seconds for _, seconds in engine.measured) < elapsed
    engine.run_alone(*requests)
    engine.run_alone(make_request("spacer 2", 40, 8))
    engine.settle()
    assert sum(tokens for tokens, _ in engine.measured) < 800 + 2 * VLLM_BLOCK


def test_events_of_vllms_own_cache_are_told_without_numbers(store: Store) -> None:
    engine = store.reader
    request = make_request("own", 2 * VLLM_BLOCK + 40, 2)
    engine.run_alone(request)
    engine.settle()
    crowd_out(engine)
    told = [keys for entry in engine.published.get(ELSEWHERE, []) for keys in entry.keys]
    assert all(not entry.blocks for entry in engine.published.get(ELSEWHERE, []))
    assert engine.cached.issuperset(keys_of(request)[:16])
    assert len(told) == len(set(told)) or told


def test_a_hand_over_takes_the_room_of_what_was_fetched(store: Store) -> None:
    request = make_request("takes room", 500, 4)
    store.write(request)
    engine, handle = store.reader, store.reader._next_handle
    target = engine.fill(handle, keys_of(request), store.content)
    engine.engine.cache_commit(handle, len(target.blocks))
    staging = engine.engine._staging
    held, _ = staging.allocate(staging.num_free_blocks - 40, 0)
    assert 40 < MAX_LEN // BLOCK < 40 + len(target.blocks)
    exported = engine.submit(make_request("needs room", MAX_LEN - 2, 2), Phase.PREFILL)
    engine.run_until(lambda: engine.prefilled(exported))
    engine.engine.cancel(exported)
    engine.engine.cache_drop(handle)
    staging.retire_blocks(held)
