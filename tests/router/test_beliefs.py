"""What the router believes and tells: prefixes and their audit, links that rest, records and metrics. Real workers."""

import asyncio

import pytest
from prometheus_client import CollectorRegistry

from kvstore.index.base import NodeSnapshot
from kvstore.index.index import KVIndex
from pdserve.engine.core.config import CoreConfig
from pdserve.engine.sim import SimEngineConfig, expected_tokens
from pdserve.engine.timing import LinearTiming
from pdserve.errors import PeerLost
from pdserve.metrics import RouterMetrics
from pdserve.types import CacheDelta, PromptStats, Role
from router.breakers import BreakerRules
from router.guesses import Guess
from router.prefixes import PrefixIndex

SLOW_DECODE = LinearTiming(0, 0, 0, 5.0, 0, 0)
CONDUCTOR = {"policy": "conductor"}


async def ask(core, sink, incoming, text, **given):
    got = sink()
    handle = core.submit(incoming(text, **given), got)
    await got.result()
    assert got.error is None
    return core.catalog.find(handle.request_id)


async def test_a_prompt_goes_where_its_prefix_is(house, sink, incoming):
    for name in ("p0", "p1", "p2"):
        await house.worker(Role.PREFILL, name)
    await house.worker(Role.DECODE, "d0")
    core = await house.core(placement={**CONDUCTOR, "disaggregate": "always"})
    records = [await ask(core, sink, incoming, "s" * 1600 + f" turn {turn}", max_tokens=2) for turn in range(6)]
    believed = [record.last.forecast.num_cached_tokens for record in records]
    assert believed == [record.num_cached_tokens for record in records]
    assert sum(tokens == 0 for tokens in believed) <= 3  # the bound on load may have each worker compute it once
    assert all(tokens >= 1584 for tokens in believed[3:])


async def test_what_a_worker_tells_replaces_what_was_guessed(house, wait_until):
    await house.pair()
    core = await house.core()
    link = house.fleets[0].links[0]
    keys = bytes(range(32))
    fingerprint = link.info.fingerprint
    link.on_cache(CacheDelta(stored=(keys[:16],), reset=True))
    assert core.prefixes.match(keys, fingerprint)[link.info.worker_id].hbm == 1
    link.on_cache(CacheDelta(stored=(keys[16:],)))
    assert core.prefixes.match(keys, fingerprint)[link.info.worker_id].hbm == 2
    link.on_cache(CacheDelta(removed=(keys[:16],)))
    assert link.info.worker_id not in core.prefixes.match(keys, fingerprint)
    assert core.prefixes.source(link.info) == "events"
    link.on_cache(CacheDelta(stored=(keys[:16],), reset=True))
    house.fleets[0].links.remove(link)
    house.fleets[0].changed()
    assert not core.prefixes.match(keys, fingerprint)
    house.fleets[0].links.append(link)


async def test_a_worker_that_lies_of_its_cache_is_found_and_ignored(house, sink, incoming):
    """It forgets everything and says nothing."""
    forgetful = SimEngineConfig(
        core=CoreConfig(num_blocks=1024, max_num_seqs=64, chunk_tokens=64, prefix_cache=False), model=house.sim.model
    )
    liar = await house.worker(Role.PREFILL, "liar", sim=forgetful)
    await house.worker(Role.PREFILL, "p1")
    await house.worker(Role.DECODE, "d0")
    core = await house.core(placement={**CONDUCTOR, "disaggregate": "always"})
    link = next(link for link in house.fleets[0].links if link.info.worker_id == "liar")
    records = []
    for i in range(12):
        text = f"prompt number {i} " * 20
        handle_keys = core.served[0].prompts.request(incoming(text), core.served[0].bounds()).block_keys
        keys = tuple(handle_keys[at : at + 16] for at in range(0, len(handle_keys), 16))
        link.on_cache(CacheDelta(stored=keys, reset=i == 0))
        records.append(await ask(core, sink, incoming, text, max_tokens=2))
    to_liar = [record for record in records if record.prefill_worker == "liar"]
    assert len(to_liar) >= 8
    assert all(record.num_cached_tokens == 0 for record in to_liar)
    assert core.prefixes.source(link.info) == "distrusted"
    assert records[-1].last.forecast.num_cached_tokens == 0
    found = house.registry.get_sample_value("pdserve_prefix_distrusted_total", {"worker_id": "liar"})
    assert found == 1
    assert liar.info.worker_id == "liar"


async def test_a_worker_that_tells_nothing_is_guessed_at(house, sink, incoming):
    for name in ("p0", "p1"):
        await house.worker(Role.PREFILL, name)
    await house.worker(Role.DECODE, "d0")
    core = await house.core(placement={**CONDUCTOR, "disaggregate": "always"})
    for link in house.fleets[0].links:
        cache = core.prefixes._links[link]
        link.on_cache = lambda delta: None
        core.prefixes._caches.remove(link.info)
        core.prefixes._caches.add(link.info)
        assert cache is not None
    records = [await ask(core, sink, incoming, "g" * 800, max_tokens=2) for _ in range(5)]
    assert core.prefixes.source(house.fleets[0].links[0].info) == "guess"
    believed = [record.last.forecast.num_cached_tokens for record in records]
    assert believed[0] == 0
    assert all(tokens >= 784 for tokens in believed[2:])


def test_a_guess_that_fails_makes_the_next_ones_smaller():
    guess = Guess(num_blocks=400)
    keys = [bytes([i, j] * 8) for i in range(4) for j in range(50)]
    new, gone = guess.add(keys, now=0.0)
    assert (len(new), gone) == (200, [])
    gone = guess.judge(False)
    assert len(gone) == 40
    assert keys[0] not in gone  # a chain goes from its end
    for _ in range(100):
        guess.judge(False)
    assert len(guess) == 16
    for _ in range(300):
        guess.judge(True)
    assert len(guess.add(keys, now=1.0)[0]) == 184
    assert len(guess.age(now=121.0)) == 200


@pytest.mark.parametrize("policy", ["conductor", "least_loaded"])
async def test_a_link_that_fails_is_left_alone_and_tried_again(house, sink, incoming, policy):
    await house.pair()
    rules = BreakerRules(failures=2, slow_s=1000.0, rest_s=60.0)
    core = await house.core(placement={"policy": policy, "breaker": rules})
    breakers = core.served[0].placer.breakers
    assert (await ask(core, sink, incoming, "a" * 100)).prefill_worker == "p0"
    for _ in range(2):
        breakers.failed("p0", "d0")
    record = await ask(core, sink, incoming, "b" * 100)
    assert (record.prefill_worker, record.decode_worker) == (None, "d0")
    assert record.last.alone == "no_link"
    count = house.registry.get_sample_value(
        "pdserve_placements_alone_total", {"model_name": "tiny", "reason": "no_link"}
    )
    assert count == 1
    breakers._clock = lambda: asyncio.get_running_loop().time() + 100.0
    breakers.tick()
    assert (await ask(core, sink, incoming, "c" * 100)).prefill_worker == "p0"
    assert breakers.num_open() == 0


async def test_a_hand_over_that_fails_is_done_by_one_worker(house, sink, incoming, monkeypatch):
    _, decode = await house.pair()

    async def lose(*_):
        raise PeerLost("the peer hung up")

    core, got = await house.core(max_retries=2), sink()
    monkeypatch.setattr(decode.puller._peers, "connect", lose)
    handle = core.submit(incoming("x" * 100, max_tokens=12, temperature=0.9, seed=4), got)
    await got.result()
    assert got.error is None
    assert got.token_ids[0] == expected_tokens(house.sim, handle.request)
    record = core.catalog.find(handle.request_id)
    assert [attempt.outcome for attempt in record.attempts] == ["peer_lost", "ok"]
    assert (record.prefill_worker, record.decode_worker) == (None, "d0")
    await house.wait_idle()


async def test_the_record_tells_why_and_what_came_of_it(house, sink, incoming):
    await house.pair()
    core = await house.core(placement={**CONDUCTOR, "disaggregate": "always"})
    secret = "a secret prompt " * 30
    record = await ask(core, sink, incoming, secret, max_tokens=8)
    plain = core.record(record.request_id)
    attempt = plain["attempts"][0]
    assert attempt["picks"][0]["candidates"]
    assert attempt["forecast"]["ttft_s"] > 0
    assert attempt["observed"]["ttft_s"] > 0
    assert attempt["observed"]["queue_decode_s"] is not None
    assert 0 <= attempt["first_token_s"] <= attempt["kv_arrived_s"] <= attempt["decode_started_s"] <= plain["ended_s"]
    assert "secret" not in str(plain)
    legs = ("tokenise", "queue_prefill", "prefill", "transfer", "queue_decode", "decode")
    counts = [
        house.registry.get_sample_value("pdserve_leg_seconds_count", {"model_name": "tiny", "leg": leg}) for leg in legs
    ]
    assert counts == [1] * 6
    model = {"model_name": "tiny"}
    assert house.registry.get_sample_value("pdserve_disaggregation_spent_seconds_total", model) > 0
    assert house.registry.get_sample_value("pdserve_disaggregation_gain_seconds", model) is not None
    assert house.registry.get_sample_value("pdserve_forecast_ttft_ratio_count", model) == 1


async def test_histograms_have_a_bucket_that_ends_at_the_slo():
    registry = CollectorRegistry()
    metrics = RouterMetrics(registry, slo_ttft_s=0.333, slo_itl_s=0.0123)
    for histogram in (metrics.ttft, metrics.itl):
        histogram.labels("m").observe(0.01)
    names = {"vllm:time_to_first_token_seconds": "0.333", "vllm:inter_token_latency_seconds": "0.0123"}
    for name, limit in names.items():
        assert registry.get_sample_value(f"{name}_bucket", {"model_name": "m", "le": limit}) == 1


async def test_streams_of_running_requests_are_counted_as_spared(house, sink, incoming):
    await house.worker(Role.PREFILL, "p0")
    await house.worker(Role.DECODE, "d0", timing=SLOW_DECODE)
    core, running = await house.core(placement={**CONDUCTOR, "disaggregate": "always"}), sink()
    running.wanted = 3
    handle = core.submit(incoming("r" * 100, max_tokens=2000), running)
    await asyncio.wait_for(running.some.wait(), 60)
    record = await ask(core, sink, incoming, "s" * 400, max_tokens=4)
    assert record.last.spared_s == pytest.approx(record.last.forecast.prefill_s)
    handle.cancel()


class NoStores:
    def follow(self, addresses): ...

    def __bool__(self):
        return False


def test_the_audits_gauge_is_set_at_the_next_tick():
    registry, index = CollectorRegistry(), KVIndex(clock=lambda: 0.0)
    prefixes = PrefixIndex(index, NoStores(), RouterMetrics(registry), lambda: 0.0, lambda *_: None)
    index.load(NodeSnapshot("w", 1, 0, ()))
    prefixes.check("w", 1, 100, PromptStats(1, 200, 50))
    prefixes.tick()
    assert registry.get_sample_value("pdserve_prefix_audit_ratio", {"worker_id": "w"}) == 0.5
