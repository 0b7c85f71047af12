"""A fleet in virtual time: it does what the engines do, loses nothing, and does it again alike."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from pdserve.engine.base import StepResult
from pdserve.engine.core.config import CoreConfig
from pdserve.engine.core.engine import LocalEngine
from pdserve.engine.timing import LinearTiming, StepWork, timing_preset
from pdserve.types import Phase, Request, SamplingParams
from router.scheduling.policies import NAMES
from simulator.engines import NullRunner, VirtualEngine, null_memory
from simulator.events import EventQueue
from simulator.fleet import FINGERPRINT, MODEL, Fleet, FleetSpec
from simulator.report import Outcome, Slo, summarise
from simulator.trace import BLOCK_TOKENS, TraceRequest, conversations, pack, read_mooncake

TIMING = timing_preset("llama-3.1-8b-fp8-h200-dynamo")
TRACE = Path(__file__).resolve().parents[3] / "shared" / "traces" / "mooncake" / "conversation_trace.jsonl"


def spec(prefill=2, decode=1, **changes):
    return FleetSpec(prefill, decode, TIMING, **changes)


def small_trace(count=120, outputs=24):
    return [replace(each, num_output_tokens=min(each.num_output_tokens, outputs)) for each in conversations(5, count)]


def run(trace, **changes):
    decisions = []
    fleet = Fleet(spec(**changes), decisions.append)
    return fleet, fleet.run(trace), decisions


def lone(num_prompt, num_outputs, keys=b""):
    keys = keys or pack(range(1, num_prompt // BLOCK_TOKENS + 1))
    return TraceRequest(0.0, num_prompt, num_outputs, keys)


@pytest.mark.parametrize("tokens", [33, 300])
@pytest.mark.parametrize("size", [1, 2])
def test_late_binding_does_not_serve_a_burst_of_short_prompts_one_by_one(tokens, size):
    """A step of an H100 costs 6 ms before its first token: one by one such a burst took 1.2 to 1.3 times as long."""
    burst = [TraceRequest(0.0, tokens, 24, b"") for _ in range(64)]
    ends, steps = {}, {}
    for policy in ("conductor", "round_robin"):
        timing = timing_preset("llama-3.1-8b-h100-tp1")
        fleet = Fleet(FleetSpec(size, size, timing, policy=policy))
        fleet.run(burst)
        ends[policy] = max(outcome.ended_s for outcome in fleet.router.outcomes)
        steps[policy] = sum(worker.engine.num_steps for worker in fleet.workers[:size])
    assert ends["conductor"] < 1.05 * ends["round_robin"]
    assert steps["conductor"] <= 32


# ---- one engine ----


def test_an_engine_in_virtual_time_does_what_the_core_does_step_by_step():
    config = CoreConfig(num_blocks=64, max_num_seqs=8, max_num_batched_tokens=256, chunk_tokens=128)
    requests = [
        Request(str(i), MODEL.name, (0,) * (50 + 97 * i), SamplingParams(max_tokens=3 + i, ignore_eos=True))
        for i in range(6)
    ]
    core = LocalEngine(NullRunner(MODEL, 16), null_memory, config)
    for handle, request in enumerate(requests, 1):
        core.submit(request, handle, Phase.FULL)
    expected, now = [], 0.0
    while core.has_work():
        batch = core.schedule()
        now += TIMING.step_ms(StepWork.of(batch.items)) / 1000
        expected.append((pytest.approx(now), core.finish(batch).output))

    queue, seen = EventQueue(), []
    engine = VirtualEngine(queue, MODEL, 16, config, TIMING, lambda result: seen.append((queue.now, result.output)))
    for handle, request in enumerate(requests, 1):
        engine.core.submit(request, handle, Phase.FULL)
    engine.wake()
    queue.run()
    assert seen == expected
    assert engine.num_steps == len(expected)
    assert engine.busy_s == pytest.approx(queue.now)


def test_work_that_comes_during_a_step_waits_for_its_end():
    queue, ends = EventQueue(), []
    timing = LinearTiming(100.0, 0, 0, 10.0, 0, 0)

    def on_step(result: StepResult) -> None:
        ends.extend((finish.handle, queue.now) for finish in result.output.finishes)

    engine = VirtualEngine(queue, MODEL, 16, CoreConfig(num_blocks=64, max_num_seqs=4), timing, on_step)

    def submit(handle):
        request = Request(str(handle), MODEL.name, (0,) * 32, SamplingParams(max_tokens=1, ignore_eos=True))
        engine.core.submit(request, handle, Phase.FULL)
        engine.wake()

    queue.at(0.0, lambda: submit(1))
    queue.at(0.05, lambda: submit(2))
    queue.run()
    assert ends == [(1, pytest.approx(0.1)), (2, pytest.approx(0.2))]


# ---- a fleet ----


def test_a_lone_request_takes_what_the_table_says():
    fleet, _, _ = run([lone(16_000, 11)], network_rate=1e15)
    (outcome,) = fleet.router.outcomes
    prefill = TIMING.step_ms(StepWork.prefill(8192)) + TIMING.step_ms(StepWork(prefill_tokens=16_000 - 8192))
    decode = sum(TIMING.step_ms(StepWork.decode(16_000 + 1 + i)) for i in range(10))
    assert outcome.ttft_s * 1000 == pytest.approx(prefill)
    assert outcome.itl_s * 1000 == pytest.approx(decode / 10, rel=1e-4)


def test_kv_takes_its_time_on_the_network_and_overlaps_the_prefill():
    free, _, _ = run([lone(16_000, 2)], network_rate=1e15)
    slow, _, _ = run([lone(16_000, 2)], network_rate=10e9)
    (fast,), (late,) = free.router.outcomes, slow.router.outcomes
    assert late.ttft_s == fast.ttft_s
    last_chunk = (16_000 - 8192) * 131_072 / 10e9
    assert late.itl_s - fast.itl_s == pytest.approx(last_chunk, rel=1e-3)


@pytest.mark.parametrize("policy", NAMES)
def test_every_policy_serves_every_request_and_leaves_nothing_behind(policy):
    trace = small_trace(60)
    fleet, summary, decisions = run(trace, policy=policy, prefill=3, decode=2)
    assert (summary.num_requests, summary.num_failed) == (60, 0)
    assert sorted(int(each.ask.request_id) for each in decisions) == list(range(60))
    assert fleet.router.num_active == fleet.router.policy.num_waiting == 0
    for station in fleet.router.policy.stations:
        assert (station.own.num_seqs, station.own.num_prefill_tokens, station.own.num_context_tokens) == (0, 0, 0)
        assert station.num_prefills == 0
    for worker in fleet.workers:
        worker.engine.core.check_integrity()
        assert not worker.engine.core.load().num_running


def test_the_index_knows_exactly_what_the_caches_hold():
    fleet, _, _ = run(small_trace(80), num_blocks=200)
    for worker in fleet.workers:
        held = worker.engine.core.cached_keys()
        assert held
        for key in held:
            found = fleet.index.match(key, FINGERPRINT)
            assert worker.info.worker_id in found


@pytest.mark.parametrize("changes", [{}, {"dram_blocks": 800}, {"policy": "prefix_only"}, {"late_release": True}])
def test_the_same_trace_gives_the_same_outcomes(changes):
    first, _, _ = run(small_trace(), **changes)
    second, _, _ = run(small_trace(), **changes)
    assert [asdict(each) for each in first.router.outcomes] == [asdict(each) for each in second.router.outcomes]


def test_a_store_brings_back_what_the_cache_lost():
    trace = small_trace(150)
    _, without, _ = run(trace, num_blocks=120)
    fleet, with_store, _ = run(trace, num_blocks=120, dram_blocks=2000)
    assert with_store.reuse > without.reuse + 0.05
    assert with_store.reuse_fetched > 0
    assert with_store.num_failed == 0
    for store in fleet.stores.values():
        store.check_integrity()


def test_late_release_holds_a_prompt_until_its_worker_is_idle():
    trace = [lone(1000, 50, pack([1])), lone(16_000, 50)]
    early, _, _ = run(trace, prefill=1, policy="round_robin")
    late, _, _ = run(trace, prefill=1, policy="round_robin", late_release=True)
    assert early.router.outcomes[0].ttft_s < 0.2
    assert late.router.outcomes[0].ttft_s == pytest.approx(early.router.outcomes[1].ttft_s, rel=0.01)


def test_binding_late_beats_binding_at_once():
    trace = small_trace(150)
    _, late, _ = run(trace)
    _, at_once, _ = run(trace, policy="least_loaded")
    assert late.ttft_mean_ms < at_once.ttft_mean_ms


def test_the_trap_of_pure_prefix_routing():
    """Block 0 is common to all: whoever has it gets everything."""
    trace = [replace(each, num_output_tokens=1) for each in small_trace(200)]
    _, trapped, _ = run(trace, prefill=5, decode=0, policy="prefix_only", cache_policy="lru")
    _, ours, _ = run(trace, prefill=5, decode=0, cache_policy="lru")
    assert trapped.load_max_over_mean > 4.5
    assert ours.load_max_over_mean < 1.35


def test_aggregated_workers_serve_whole_requests():
    fleet, summary, decisions = run(small_trace(40), prefill=0, decode=3)
    assert summary.num_failed == 0
    assert all(each.prefill is None for each in decisions)
    assert len({each.prefill_worker for each in fleet.router.outcomes}) == 3


@pytest.mark.skipif(not TRACE.exists(), reason="the Mooncake trace is not beside the repository")
def test_the_first_requests_of_the_real_trace():
    trace = [replace(each, num_output_tokens=min(each.num_output_tokens, 24)) for each in read_mooncake(TRACE, 300)]
    _, ours, _ = run(trace, late_release=True)
    _, theirs, _ = run(trace, late_release=True, policy="round_robin", cache_policy="lru")
    assert ours.num_failed == theirs.num_failed == 0
    assert ours.ttft_mean_ms < 0.7 * theirs.ttft_mean_ms
    assert ours.goodput_rps >= theirs.goodput_rps


# ---- traces and figures ----


def test_made_up_conversations_share_prefixes_and_come_in_bursts():
    trace = conversations(5, 200)
    assert trace == conversations(5, 200)
    assert all(len(each.keys) == each.num_prompt_tokens // BLOCK_TOKENS * 16 for each in trace)
    assert len({each.keys[:16] for each in trace}) == 1
    firsts = [each.keys[16:32] for each in trace if len(each.keys) > 16]
    assert len(set(firsts)) < 0.9 * len(firsts)


def test_figures_are_counted_as_they_are_defined():
    outcomes = [
        Outcome(0.0, 1000, 11, first_token_s=1.0, ended_s=1.2, num_cached_tokens=500, prefill_worker="p0"),
        Outcome(5.0, 1000, 11, first_token_s=8.0, ended_s=8.2, prefill_worker="p0"),
        Outcome(6.0, 1000, 11, first_token_s=6.5, ended_s=7.0, prefill_worker="p1"),
        Outcome(10.0, 1000, 1, first_token_s=10.5, ended_s=10.5, prefill_worker="p1"),
    ]
    summary = summarise(outcomes, Slo(), 10.0, num_computing=2)
    assert summary.goodput_rps == 0.2  # the second is late to begin, the third too slow
    assert summary.ttft_mean_ms == pytest.approx((1000 + 3000 + 500 + 500) / 4)
    assert summary.itl_mean_ms == pytest.approx((20 + 20 + 50) / 3)
    assert summary.reuse == 500 / 4000
    assert summary.load_max_over_mean == pytest.approx(2000 / 1750)
