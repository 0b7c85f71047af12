import heapq
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.engine.core.config import CoreConfig
from pdserve.engine.memory import LocalMemory
from pdserve.engine.sim import SimEngine, SimEngineConfig, expected_tokens
from pdserve.engine.timing import LinearTiming
from pdserve.errors import ConfigError, NotSupported
from pdserve.types import FinishReason, Grammar, GrammarKind, Phase, Request, SamplingParams

CONFIG = SimEngineConfig(core=CoreConfig(num_blocks=256, max_num_seqs=16, chunk_tokens=48), eos_period=40)


def make_engine(config=CONFIG, **options):
    return SimEngine(config, LocalMemory, **options)


def make_request(prompt, name="r", **params):
    params.setdefault("seed", 1)
    return Request(name, "m", tuple(prompt), SamplingParams(**params))


def a_prompt(seed, length):
    rng = random.Random(seed)
    return [rng.randrange(17, 49_152) for _ in range(length)]


def run_all(engine):
    """Tokens by handle, and how each ended."""
    tokens, ends, exports = {}, {}, []
    while engine.has_work():
        result = engine.step()
        collect(result, tokens, ends)
        exports += result.exports
    return tokens, ends, exports


def collect(result, tokens, ends):
    output = result.output
    for handle, index, token in zip(output.handles, output.first_indexes, output.token_ids, strict=True):
        assert index == len(tokens.setdefault(handle, []))
        tokens[handle].append(token)
    ends.update({finish.handle: finish for finish in output.finishes})


sampling = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.8]),
        "max_tokens": st.integers(3, 40),
        "min_tokens": st.integers(0, 3),
        "ignore_eos": st.booleans(),
        "n": st.integers(1, 3),
        "seed": st.integers(0, 9),
        "presence_penalty": st.sampled_from([0.0, 1.5]),
    }
)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 200), sampling), min_size=1, max_size=6), st.integers(0, 99))
def test_one_engine_gives_the_expected_tokens(requests, seed):
    engine = make_engine()
    made = [make_request(a_prompt(seed + i % 2, length), **params) for i, (length, params) in enumerate(requests)]
    for i, request in enumerate(made):
        engine.submit(request, 10 * i, Phase.FULL)
    tokens, ends, _ = run_all(engine)
    for i, request in enumerate(made):
        for choice in range(request.params.n):
            found = tokens[10 * i + choice]
            assert found == expected_tokens(CONFIG, request, choice)
            stopped = found[-1] == 2 and not request.params.ignore_eos and len(found) >= request.params.min_tokens
            assert ends[10 * i + choice].reason is (FinishReason.STOP if stopped else FinishReason.LENGTH)


def prefill(engine, request, handle=0):
    engine.submit(request, handle, Phase.PREFILL)
    tokens, ends, exports = run_all(engine)
    n = request.params.n
    return [tokens[handle + i] for i in range(n)], [handle + i in ends for i in range(n)], exports


def pull(source, target, handle, exports):
    """Copy the blocks as a transport would."""
    for chunk in exports:
        where = target.import_blocks(handle, chunk.first_token, chunk.num_tokens)
        for i, (theirs, ours) in enumerate(zip(chunk.blocks, where.blocks, strict=True)):
            if i >= where.num_cached_blocks:
                target.memory.blocks[ours] = source.memory.blocks[theirs]
        target.import_commit(handle, chunk.first_token, chunk.num_tokens)


def decoded(source, target, request, spoil=None):
    """Every choice's tokens, prefilled by `source` and decoded by `target`; `spoil` may touch what lies between."""
    first, finished, exports = prefill(source, request)
    if spoil:
        spoil(source, exports)
    target.submit(request, 100, Phase.DECODE)
    pull(source, target, 100, exports)
    source.export_release(0)
    target.resume(100, first, finished)
    tokens = {100 + i: list(outputs) for i, outputs in enumerate(first)}
    ends = {}
    while target.has_work():
        collect(target.step(), tokens, ends)
    load = source.load()
    assert load.num_free_blocks == load.num_total_blocks
    assert target.load().num_free_blocks == target.load().num_total_blocks
    return [tokens[100 + i] for i in range(request.params.n)]


@settings(derandomize=True, max_examples=40, deadline=None)
@given(st.integers(1, 300), sampling, st.integers(0, 99), st.booleans())
def test_tokens_are_the_expected_ones_after_a_hand_over(length, params, seed, host_memory):
    config = replace(CONFIG, host_memory=host_memory)
    request = make_request(a_prompt(seed, length), **params)
    found = decoded(make_engine(config), make_engine(config), request)
    assert found == [expected_tokens(config, request, choice) for choice in range(params["n"])]


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.integers(1, 200), st.data())
def test_any_wrong_byte_in_a_hand_over_gives_wrong_tokens(length, data):
    request = make_request(a_prompt(7, length), temperature=0, max_tokens=6, ignore_eos=True)
    place = data.draw(st.integers(0, length * 16 - 1))
    flip = data.draw(st.integers(1, 255))

    def spoil(engine, exports):
        blocks = [block for chunk in exports for block in chunk.blocks]
        engine.memory.blocks[blocks[place // 256], place % 256] ^= flip

    found = decoded(make_engine(), make_engine(), request, spoil)
    expected = expected_tokens(CONFIG, request)
    assert found[0][0] == expected[0]
    assert found[0][1] != expected[1]


def test_a_missing_block_gives_wrong_tokens():
    request = make_request(a_prompt(7, 100), temperature=0, max_tokens=6, ignore_eos=True)

    def spoil(engine, exports):
        engine.memory.blocks[exports[0].blocks[1]] = 0

    assert decoded(make_engine(), make_engine(), request, spoil) != [expected_tokens(CONFIG, request)]


def test_a_prefix_hit_gives_the_same_tokens():
    engine = make_engine()
    shared = a_prompt(3, 100)
    for handle, tail in ((0, [50]), (1, [60, 61])):
        request = make_request([*shared, *tail], max_tokens=8)
        engine.submit(request, handle, Phase.FULL)
        tokens, _, _ = run_all(engine)
        assert tokens[handle] == expected_tokens(CONFIG, request)
    assert engine.load().prefix_cache_hits == 96


def test_preemption_changes_no_token():
    config = replace(CONFIG, core=CoreConfig(num_blocks=24, max_num_seqs=16, chunk_tokens=48))
    engine = make_engine(config)
    requests = [make_request(a_prompt(i, 60), max_tokens=60, ignore_eos=True, seed=i) for i in range(6)]
    for handle, request in enumerate(requests):
        engine.submit(request, handle, Phase.FULL)
    tokens, _, _ = run_all(engine)
    assert engine.load().num_preemptions > 0
    assert [tokens[i] for i in range(6)] == [expected_tokens(config, request) for request in requests]


def test_a_migrated_request_goes_on_where_it_was():
    request = make_request(a_prompt(5, 70), max_tokens=20, ignore_eos=True)
    whole = expected_tokens(CONFIG, request)
    migrated = replace(request, output_token_ids=(tuple(whole[:7]),))
    assert expected_tokens(CONFIG, migrated) == whole
    engine = make_engine()
    engine.submit(migrated, 0, Phase.FULL)
    tokens, ends = {0: whole[:7]}, {}
    while engine.has_work():
        collect(engine.step(), tokens, ends)
    assert tokens[0] == whole


def test_a_grammar_is_refused_and_leaves_nothing():
    engine = make_engine()
    with pytest.raises(NotSupported):
        engine.submit(make_request([20], grammar=Grammar(GrammarKind.JSON_OBJECT)), 0, Phase.FULL)
    assert not engine.has_work()
    assert engine.load().num_free_blocks == 256


@pytest.mark.parametrize(
    ("key", "value"),
    [("block_tokens", 0), ("speedup", 0), ("first_token", -1), ("eos_period", -1), ("first_token", 49_150)],
)
def test_a_wrong_setting_is_named(key, value):
    with pytest.raises(ConfigError) as error:
        replace(CONFIG, **{key: value})
    assert error.value.key in (f"sim.{key}", "sim.vocab_size")


# --- time ---

TIMING = LinearTiming(10, 0.1, 0, 20, 0, 0)


class FakeTime:
    def __init__(self):
        self.now = 0.0
        self.slept = []

    def clock(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


def test_a_step_lasts_as_long_as_the_model_says():
    fake = FakeTime()
    engine = make_engine(replace(CONFIG, speedup=2.0), timing=TIMING, clock=fake.clock, sleep=fake.sleep)
    engine.submit(make_request(a_prompt(1, 40), max_tokens=3, ignore_eos=True), 0, Phase.FULL)
    run_all(engine)
    assert fake.slept == pytest.approx([0.007, 0.010, 0.010])


def test_time_spent_computing_is_part_of_the_step():
    times = iter([0.0, 0.004])
    slept = []
    engine = make_engine(timing=TIMING, clock=lambda: next(times), sleep=slept.append)
    engine.submit(make_request(a_prompt(1, 40), max_tokens=1), 0, Phase.FULL)
    engine.step()
    assert slept == pytest.approx([0.010])


def test_no_sleep_when_time_costs_nothing():
    engine = make_engine(sleep=lambda seconds: pytest.fail("slept"))
    engine.submit(make_request(a_prompt(1, 40), max_tokens=3), 0, Phase.FULL)
    run_all(engine)


def test_two_hundred_workers_run_in_virtual_time_in_one_process():
    config = replace(CONFIG, core=CoreConfig(num_blocks=64, max_num_seqs=8), eos_period=0)
    engines = [make_engine(config, timing=TIMING) for _ in range(200)]
    request = make_request(a_prompt(1, 30), max_tokens=10)
    expected = expected_tokens(config, request)
    events = []
    for worker, engine in enumerate(engines):
        for handle in range(2):
            engine.submit(request, handle, Phase.FULL)
        heapq.heappush(events, (0.0, worker, None))
    tokens = [{} for _ in engines]
    now = 0.0
    while events:
        now, worker, batch = heapq.heappop(events)
        engine = engines[worker]
        if batch is not None:
            collect(engine.finish(batch), tokens[worker], {})
        if engine.has_work():
            batch = engine.schedule()
            heapq.heappush(events, (now + engine.duration_s(batch), worker, batch))
    assert all(found == {0: expected, 1: expected} for found in tokens)
    assert now == pytest.approx((10 + 6 + 9 * 20) / 1000)
