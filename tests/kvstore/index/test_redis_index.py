"""The shared index on a real redis-server: taking over, lagging routers, and Redis down, slow, flushed or full of
rubbish. Serving goes on in each case."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterator

import pytest
from index_model import FP, OTHER_FP, Clock, Node, chain, joined, shown, truth
from prometheus_client import CollectorRegistry
from redis_process import BINARY, RedisProcess

from kvstore.index import redis_mirror
from kvstore.index.base import NodeSnapshot, Section, Verdict
from kvstore.index.index import KVIndex
from kvstore.index.metrics import IndexCollector
from kvstore.index.redis_copy import RedisCopy, RedisOptions
from kvstore.index.redis_mirror import RedisIndex
from kvstore.index.redis_scripts import OLDER, UNKNOWN
from kvstore.types import Tier
from pdserve.metrics import render

pytestmark = pytest.mark.skipif(BINARY is None, reason="no redis-server here: `bash deploy/test-deps.sh` installs it")

LEASE_S = 10.0
TICK_S = 0.005


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[RedisProcess]:
    process = RedisProcess(tmp_path_factory.mktemp("redis"))
    process.start()
    yield process
    process.stop()


@pytest.fixture
def redis(server: RedisProcess) -> RedisProcess:
    server.client.flushall()
    return server


@pytest.fixture
async def router(redis: RedisProcess) -> AsyncIterator:
    """Makes routers' indexes; `run=False`: the test calls `flush` itself."""
    made: list[RedisIndex] = []

    async def make(*, run: bool = False, timeout_s: float = 5.0) -> RedisIndex:
        options = RedisOptions(redis.url, timeout_s=timeout_s)
        local = KVIndex(max_entries=100_000, lease_s=LEASE_S, clock=Clock())
        index = RedisIndex(local, options, tick_s=TICK_S, clock=Clock())
        made.append(index)
        if run:
            await index.start()
        return index

    yield make
    for index in made:
        await index.stop()


async def until(condition) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - what is waited for is outside of this process
            await asyncio.sleep(TICK_S)


async def newcomer(router) -> RedisIndex:
    """A router that starts now, and knows what Redis told it."""
    return await router(run=True)


async def test_a_router_that_starts_takes_over_what_others_learnt(router):
    first = await router()
    a, store = Node("a", 1_763_740_800_000_000_123), Node("store/with:odd name", 2)
    a.store(range(9000))
    for node in (a, store):
        first.load(node.snapshot())
    first.apply(store.name, 2, [store.store([1, 2], Tier.DRAM), store.store([3], Tier.DISK, OTHER_FP)])
    await first.flush()
    second = await newcomer(router)
    for fingerprint in (FP, OTHER_FP):
        assert shown(second.local, range(9000), fingerprint) == truth(a, store, fingerprint=fingerprint)
    assert second.local.position("a")[:2] == (a.incarnation, 1)
    assert not second.degraded
    assert second.counts.nodes_read == 2
    assert second.apply("a", a.incarnation, [a.store([9999])]) is Verdict.APPLIED, "events go on where the copy ends"


async def test_events_are_written_behind(router):
    first = await router()
    a = Node("a")
    joined(first, a)
    await first.flush()
    events = [a.store(range(2500), Tier.DRAM), a.drop(range(100, 1200), Tier.DRAM), a.store([7], Tier.DISK)]
    first.apply("a", 1, [*events, a.store([5], Tier.HBM), a.clear(Tier.HBM), a.store([6])])
    await first.flush()
    assert first.counts.publications == 1, "changes travel as changes"
    assert shown((await newcomer(router)).local, range(2500)) == truth(a)


async def test_a_router_that_lags_cannot_undo_what_is_newer(router):
    quick, slow = await router(), await router()
    a = Node("a")
    joined(quick, a)
    joined(slow, a)
    stored, removed = a.store([1, 2]), a.drop([1])
    quick.apply("a", 1, [stored, removed])
    await quick.flush()
    slow.apply("a", 1, [stored])
    await slow.flush()
    assert shown((await newcomer(router)).local, [1, 2]) == truth(a)
    slow.apply("a", 1, [removed, a.store([3])])
    await slow.flush()
    assert shown((await newcomer(router)).local, [1, 2, 3]) == truth(a)


async def test_a_newer_life_replaces_the_older_one(router, redis):
    first, late = await router(), await router()
    a = Node("a", 9)
    a.store([1])
    joined(first, a)
    joined(late, a)
    await first.flush()
    last_words = a.store([2])
    a.restart()
    a.store([3])
    joined(first, a)
    await first.flush()
    late.apply("a", 9, [last_words])
    late.renew("a", 9)
    await late.flush()
    assert shown((await newcomer(router)).local, range(5)) == truth(a)
    assert not redis.client.keys(f"*{9:020d}*"), "nothing of the older life is left"


async def test_keys_live_as_long_as_the_lease(router, redis):
    first = await router()
    a = Node("a")
    joined(first, a)
    first.apply("a", 1, [a.store([1])])
    await first.flush()
    keys = redis.client.keys("*")
    assert len(keys) == 3
    for key in keys:
        redis.client.pexpire(key, 3000)
    first.renew("a", 1)
    first._clock.now += LEASE_S / 3
    await first.flush()
    for key in keys:
        assert 3000 < redis.client.pttl(key) <= LEASE_S * 1000
    second = await newcomer(router)
    second.local._clock.now += LEASE_S
    assert second.local.live_nodes() == [], "the newcomer believes it no longer than Redis does"


async def test_what_is_not_renewed_is_gone_for_newcomers(router, redis):
    first = await router()
    a = Node("a")
    a.store([1])
    joined(first, a)
    await first.flush()
    for key in redis.client.keys("*"):
        redis.client.pexpire(key, 1)
    await until(lambda: not redis.client.keys("*"))
    assert (await newcomer(router)).local.live_nodes() == []


async def test_a_flushed_redis_is_filled_again(router, redis):
    first = await router()
    a, quiet = Node("a"), Node("quiet")
    quiet.store([5])
    joined(first, a)
    joined(first, quiet)
    await first.flush()
    redis.client.flushall()
    first.apply("a", 1, [a.store([1])])
    first.renew("quiet", 1)
    first._clock.now += LEASE_S
    await first.flush()
    assert shown((await newcomer(router)).local, range(9)) == truth(a, quiet)


async def test_serving_goes_on_without_redis_and_recovers(router, redis, caplog):
    first = await router(run=True)
    a = Node("a")
    joined(first, a)
    await until(lambda: first.counts.publications == 1)
    redis.stop()
    try:
        first.apply("a", 1, [a.store([1])])
        await until(lambda: first.degraded)
        first.apply("a", 1, [a.store([2])])
        assert first.local.match(chain([1, 2]), FP)["a"].hbm == 2
        registry = CollectorRegistry()
        registry.register(IndexCollector(first.local, first))
        assert b"pdserve_kvindex_redis_degraded 1.0" in render(registry)
        failures = first.counts.failures
        await until(lambda: first.counts.failures > failures)
        lonely = await newcomer(router)
        assert lonely.degraded
        assert lonely.local.live_nodes() == []
    finally:
        redis.start()
    await until(lambda: not first.degraded)
    assert shown((await newcomer(router)).local, range(5)) == truth(a)
    assert sum("goes on locally" in record.message for record in caplog.records) == 2, "once for each router"


async def test_a_frozen_redis_delays_nobody(router, redis):
    first = await router(run=True, timeout_s=0.2)
    a = Node("a")
    joined(first, a)
    await until(lambda: first.counts.publications == 1)
    redis.freeze()
    try:
        for number in range(50):
            assert first.apply("a", 1, [a.store([number])]) is Verdict.APPLIED
            await asyncio.sleep(0)
        await until(lambda: first.degraded)
        assert first.local.match(chain(range(50)), FP)["a"].hbm == 50
    finally:
        redis.thaw()
    await until(lambda: not first.degraded and not first._outboxes["a"].events)
    assert shown((await newcomer(router)).local, range(60)) == truth(a)


async def test_too_many_unwritten_events_become_a_publication(router, redis, monkeypatch):
    monkeypatch.setattr(redis_mirror, "MAX_UNWRITTEN_KEYS", 20)
    first = await router()
    a = Node("a")
    joined(first, a)
    await first.flush()
    for number in range(40):
        first.apply("a", 1, [a.store([number])])
    assert first.counts.overflows == 1
    assert first._outboxes["a"].num_keys <= 20
    await first.flush()
    assert first.counts.publications == 2
    assert shown((await newcomer(router)).local, range(60)) == truth(a)


async def test_a_router_that_missed_events_finds_them_in_redis(router):
    well, deaf = await router(), await router()
    a = Node("a")
    joined(well, a)
    joined(deaf, a)
    events = [a.store([1]), a.drop([1]), a.store([2])]
    well.apply("a", 1, events)
    await well.flush()
    assert deaf.apply("a", 1, events[2:]) is Verdict.RESYNC
    await deaf.flush()
    assert shown(deaf.local, range(5)) == truth(a)
    await deaf.flush()
    assert deaf.counts.nodes_read == 1, "it waits for nothing now"


async def test_events_that_come_while_others_are_written_follow_them(router):
    first = await router()
    a = Node("a")
    joined(first, a)
    await first.flush()
    first.apply("a", 1, [a.store([1])])
    writing = asyncio.create_task(first.flush())
    for _ in range(20):
        first.apply("a", 1, [a.store([a.sequence + 1])])
        await asyncio.sleep(0)
    await writing
    await first.flush()
    assert first.counts.publications == 1
    assert shown((await newcomer(router)).local, range(1000)) == truth(a)


async def test_what_a_copy_lacks_is_added_by_the_router_that_knows_it(router):
    well, deaf = await router(), await router()
    a = Node("a")
    joined(well, a)
    joined(deaf, a)
    well.apply("a", 1, [a.store([1])])
    await well.flush()
    assert deaf.apply("a", 1, [a.store([2])]) is Verdict.RESYNC
    await deaf.flush()
    await deaf.flush()
    assert shown(deaf.local, range(5)) == truth(a)
    assert shown((await newcomer(router)).local, range(5)) == truth(a)


async def test_a_copy_too_old_does_not_end_the_wait(router):
    well, deaf = await router(), await router()
    a = Node("a")
    joined(well, a)
    await well.flush()
    a.store([1])
    assert deaf.apply("a", 1, [a.store([2])]) is Verdict.RESYNC
    await deaf.flush()
    assert shown(deaf.local, range(5)) == set()
    assert deaf.local.awaiting() == [("a", 1)]
    assert deaf.load(a.snapshot()) is Verdict.APPLIED
    await deaf.flush()
    assert shown((await newcomer(router)).local, range(5)) == truth(a)


async def test_a_node_that_says_goodbye_is_forgotten_everywhere(router, redis):
    first = await router()
    a = Node("a")
    a.store([1])
    joined(first, a)
    await first.flush()
    first.remove("a")
    await first.flush()
    assert redis.client.keys("*") == []


async def test_a_publication_overtaken_by_a_restart_leaves_nothing(router, redis):
    first = await router()
    a = Node("a")
    a.store(range(20_000))
    joined(first, a)
    publishing = asyncio.create_task(first._copy.publish(first.local, "a", 1000))
    await until(lambda: redis.client.keys("*:stage:*"))
    a.restart()
    joined(first, a)
    assert await publishing is None
    assert redis.client.keys("*") == []


async def test_an_older_copy_never_replaces_a_newer_one(router, redis):
    first, second = await router(), await router()
    a = Node("a")
    joined(second, a)
    a.store([1])
    joined(first, a)
    await first.flush()
    await second.flush()
    assert shown((await newcomer(router)).local, range(5)) == truth(a)
    assert not redis.client.keys("*:stage:*")
    copy = RedisCopy(RedisOptions(redis.url))
    other = KVIndex(clock=Clock())
    other.load(NodeSnapshot("a", 0, 5, (Section(Tier.HBM, FP, bytes(16)),)))
    assert await copy.publish(other, "a", 1000) == OLDER
    assert await copy.renew([("a", 2, 1000), ("a", 0, 1000), ("b", 1, 1000)]) == [UNKNOWN, OLDER, UNKNOWN]
    await copy.close()


@pytest.mark.parametrize(
    ("field", "value"), [("incarnation", "x"), ("sequence", "many"), ("sections", "0.zz"), ("sections", "9.00")]
)
async def test_rubbish_in_redis_is_passed_over(router, redis, field, value):
    first = await router()
    good, bad = Node("good"), Node("bad")
    good.store([1])
    joined(first, good)
    joined(first, bad)
    await first.flush()
    if field == "sections":
        redis.client.sadd("pdserve:kv:{bad}:sections", value)
        redis.client.pexpire("pdserve:kv:{bad}:sections", 5000)
    else:
        redis.client.hset("pdserve:kv:{bad}:meta", field, value)
    second = await newcomer(router)
    assert second.local.live_nodes() == ["good"]
    assert second.counts.malformed == 1


async def test_keys_of_another_type_degrade_and_do_not_stop_serving(router, redis):
    redis.client.set("pdserve:kv:{a}:meta", "a string")
    first = await router(run=True)
    a = Node("a")
    joined(first, a)
    await until(lambda: first.counts.failures > 1)
    assert first.degraded
    assert first.apply("a", 1, [a.store([1])]) is Verdict.APPLIED
    redis.client.delete("pdserve:kv:{a}:meta")
    await until(lambda: not first.degraded)


@pytest.mark.parametrize("seed", range(6))
async def test_many_routers_and_accidents_end_in_the_truth(router, redis, seed):
    """Routers get the same events, each at its own pace, with losses; Redis is flushed now and then."""
    rng = random.Random(seed)
    routers = [await router() for _ in range(3)]
    a = Node("a")
    history = {0: truth(a)}
    wires = [[] for _ in routers]
    for index in routers:
        joined(index, a)
    for _ in range(120):
        change = rng.choice([a.store, a.store, a.drop])
        event = change(rng.sample(range(30), 4), rng.choice(list(Tier))) if rng.random() < 0.95 else a.clear(Tier.DRAM)
        history[a.sequence] = truth(a)
        for wire in wires:
            if rng.random() < 0.98:
                wire.append(event)
        which = rng.randrange(3)
        count = rng.randrange(len(wires[which]) + 1)
        batch, wires[which] = wires[which][:count], wires[which][count:]
        routers[which].apply("a", 1, batch)
        if rng.random() < 0.03:
            redis.client.flushall()
        if rng.random() < 0.4:
            routers[which]._clock.now += 2.0
            await routers[which].flush()
            if (stored := await routers[which]._copy.read("a")) is not None:
                told = {
                    ("a", s.tier, s.keys[i : i + 16], 1)
                    for s in stored.snapshot.sections
                    for i in range(0, len(s.keys), 16)
                }
                assert told == history[stored.snapshot.sequence]
    for index, wire in zip(routers, wires, strict=True):
        index.apply("a", 1, wire)
        index.load(a.snapshot())
        await index.flush()
        assert shown(index.local, range(30)) == truth(a)
    assert shown((await newcomer(router)).local, range(30)) == truth(a)
