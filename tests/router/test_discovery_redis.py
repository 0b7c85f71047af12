"""The list of workers in a real Redis: written by registrations, followed by a router's discovery."""

import asyncio
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "kvstore" / "index"))

from redis_process import BINARY, RedisProcess

from pdserve.config import RegistryConfig
from pdserve.registry import Entry, WorkerList
from pdserve.tasks import end_task
from pdserve.types import Role
from router.discovery.base import Backoff
from router.discovery.redis_list import LastKnown, RedisDiscovery

pytestmark = pytest.mark.skipif(BINARY is None, reason="redis-server is not installed")


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(Backoff, "MAX_S", 0.05)
    monkeypatch.setattr(Backoff, "FIRST_S", 0.02)
    process = RedisProcess(tmp_path)
    process.start()
    yield process
    process.stop()


@pytest.fixture
def config(server):
    return RegistryConfig(url=server.url, ttl_s=60.0, timeout_s=30.0)


class Followed:
    """What a router knows now, and has ever been told. Its time stands still but for what a test adds."""

    def __init__(self, config, wait_until):
        self.sets, self.now = [], 0.0
        self.until_true = wait_until
        self.discovery = RedisDiscovery(config, clock=lambda: self.now)
        self._task = asyncio.create_task(self._run())

    async def _run(self):
        async for addresses in self.discovery.watch():
            self.sets.append(set(addresses))

    async def until(self, *addresses):
        await self.until_true(lambda: self.sets and self.sets[-1] == set(addresses))

    async def close(self):
        await end_task(self._task)


@pytest.fixture
async def follow(wait_until):
    made = []

    def start(config):
        made.append(Followed(config, wait_until))
        return made[-1]

    yield start
    for each in made:
        await each.close()


@pytest.fixture
async def workers(config):
    made = WorkerList(config)
    yield made
    await made.close()


async def test_a_worker_is_found_when_it_serves_and_left_out_when_it_drains(house, config, follow):
    followed = follow(config)
    await followed.until()
    worker = await house.worker(Role.DECODE, "d0", registry=config)
    await followed.until(worker.address)
    await worker.drain()
    await followed.until()


async def test_a_newer_incarnation_takes_the_name_and_the_older_is_told(config, workers, follow):
    followed = follow(config)
    assert await workers.write("d0", 1, "10.0.0.1:7000")
    await followed.until("10.0.0.1:7000")
    assert await workers.write("d0", 2, "10.0.0.2:7000")
    await followed.until("10.0.0.2:7000")
    assert not await workers.write("d0", 1, "10.0.0.1:7000")
    assert not await workers.write("d0", 1, ""), "the older one's leave must not take the newer one out"
    assert [(entry.incarnation, entry.address) for entry in await workers.read()] == [(2, "10.0.0.2:7000")]


async def test_incarnations_are_compared_in_full(workers):
    """They are nanoseconds: more than a Lua number holds."""
    newer = 1_763_750_000_000_000_001
    assert await workers.write("d0", newer, "10.0.0.2:7000")
    assert not await workers.write("d0", newer - 1, "10.0.0.1:7000")
    assert [entry.incarnation for entry in await workers.read()] == [newer]


async def test_a_worker_that_went_silent_runs_out_and_its_entry_goes(server, follow, wait_until):
    short = RegistryConfig(url=server.url, ttl_s=0.3)
    silent, alive = WorkerList(short), WorkerList(short)
    followed = follow(short)
    while {"10.0.0.1:7000"} not in followed.sets:  # a busy router may read it only after its time
        await silent.write("d0", 1, "10.0.0.1:7000")
        await asyncio.sleep(0.05)

    def gone():
        followed.now += short.ttl_s
        return not followed.sets[-1]

    await wait_until(gone)
    await alive.write("d1", 1, "10.0.0.2:7000")
    assert server.client.hkeys("pdserve:workers") == [b"d1"]
    await silent.close()
    await alive.close()


@pytest.mark.parametrize("how", ["killed", "frozen"])
async def test_while_redis_is_away_the_last_set_stays_and_workers_enter_again(server, house, follow, wait_until, how):
    config = RegistryConfig(url=server.url, ttl_s=0.6, timeout_s=0.5)
    followed = follow(config)
    first = await house.worker(Role.PREFILL, "p0", registry=config)
    await followed.until(first.address)
    down, up = (server.stop, server.start) if how == "killed" else (server.freeze, server.thaw)
    down()
    second = await house.worker(Role.DECODE, "d0", registry=config)
    await wait_until(lambda: not followed.discovery.answering)
    followed.now += 2 * config.ttl_s  # past every entry's time: it must not count
    assert followed.sets[-1] == {first.address}
    up()
    await followed.until(first.address, second.address)
    assert set() not in followed.sets[1:], "a fresh and empty Redis emptied the fleet"


async def test_a_flushed_list_is_no_news(server, config, workers, follow):
    followed = follow(config)
    await workers.write("d0", 1, "10.0.0.1:7000")
    await followed.until("10.0.0.1:7000")
    server.client.flushall()
    await workers.write("d1", 1, "10.0.0.2:7000")
    await followed.until("10.0.0.1:7000", "10.0.0.2:7000")


async def test_fleets_that_share_a_redis_do_not_see_each_other(server, config, workers):
    other = WorkerList(RegistryConfig(url=server.url, prefix="other"))
    await other.write("d0", 1, "10.0.0.9:7000")
    await workers.write("d0", 1, "10.0.0.1:7000")
    assert [entry.address for entry in await workers.read()] == ["10.0.0.1:7000"]
    await other.close()


def test_what_was_known_holds_for_its_time_and_a_recovery_gives_one_more():
    known = LastKnown(ttl_s=10)
    assert known.read([Entry("d0", 1, "a:1", 8.0)], now=100.0) == {"a:1"}
    assert known.read([], now=107.9) == {"a:1"}
    assert known.read([], now=108.0) == frozenset()
    known.read([Entry("d0", 1, "a:1", 8.0)], now=200.0)
    known.recovered(now=300.0)
    assert known.read([], now=309.9) == {"a:1"}
    assert known.read([], now=310.0) == frozenset()


def test_an_older_entry_read_late_changes_nothing():
    known = LastKnown(ttl_s=10)
    known.read([Entry("d0", 2, "b:1", 8.0)], now=100.0)
    assert known.read([Entry("d0", 1, "a:1", 9.0)], now=101.0) == {"b:1"}
