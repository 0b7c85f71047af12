"""An engine's events over real ZMQ sockets: catching up, loss, replay, restarts in place."""

import asyncio
import itertools
from collections.abc import AsyncIterator

import pytest
from index_model import FP
from vllm_publisher import CLEARED, Publisher, removed, stored

from kvstore.index.index import KVIndex
from kvstore.index.vllm_blocks import ModelRoots, VllmBlocks
from kvstore.index.vllm_source import VllmEventOptions, VllmEventSource
from pdserve.block_keys import block_keys
from pdserve.errors import ConfigError

ROOT = b"root............"
TOKENS = list(range(500, 564))


class Follower:
    """A source, its index, and the engine that it follows."""

    def __init__(self, engine: Publisher, *, replay: bool = True) -> None:
        self.index = KVIndex(lease_s=60)
        self.lost: list[str] = []
        self.source = VllmEventSource(
            VllmEventOptions(
                engine.endpoint,
                engine.replay_endpoint if replay else None,
                topic="kv",
                replay_timeout_s=0.5,
                heartbeat_s=0.05,
            ),
            VllmBlocks(ModelRoots({"": ROOT}), block_tokens=4, fingerprint=FP),
            self.index,
            "engine",
            on_lost=self.lost.append,
            incarnations=itertools.count(10).__next__,
        )
        self.task = asyncio.create_task(self.source.run())

    async def has(self, *blocks: int) -> None:
        """Waits until the index knows exactly these blocks of the chain."""
        await until(lambda: self._known() == set(blocks))

    def _known(self) -> set[int]:
        keys = block_keys(ROOT, TOKENS, 4)
        return {n for n in range(16) if self.index.locate(keys[16 * n : 16 * n + 16], FP)}


async def until(condition) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - what is waited for comes over a socket
            await asyncio.sleep(0.005)


@pytest.fixture(params=["maps", "arrays"])
async def engine(request) -> AsyncIterator[Publisher]:
    publisher = Publisher(arrays=request.param == "arrays", topic_in_replay=request.param == "maps", buffer_steps=8)
    await publisher.start()
    yield publisher
    await publisher.stop()


@pytest.fixture
async def follow(engine) -> AsyncIterator:
    made: list[Follower] = []

    async def start(**options) -> Follower:
        made.append(Follower(engine, **options))
        await engine.subscribed()
        await until(lambda: made[-1].source.connected)
        return made[-1]

    yield start
    for follower in made:
        follower.task.cancel()
        await asyncio.gather(*(follower.task for follower in made), return_exceptions=True)


def block(number: int) -> dict:
    """Engine block `number` (hash number + 1) of the one chain."""
    return stored([number + 1], number or None, TOKENS[4 * number : 4 * number + 4])


async def test_live_events_reach_the_index(engine, follow):
    follower = await follow()
    await engine.publish(stored([1, 2], None, TOKENS[:8]), block(2))
    await follower.has(0, 1, 2)
    await engine.publish(removed([2]))
    await follower.has(0, 2)
    await engine.publish(CLEARED, block(0))
    await follower.has(0)
    assert follower.source.counts.gaps == 0


async def test_a_late_follower_catches_up_by_replay(engine, follow):
    await engine.publish(block(0))
    await engine.publish(block(1))
    follower = await follow()
    await follower.has(0, 1)
    await engine.publish(block(2))
    await follower.has(0, 1, 2)
    assert follower.lost == []


async def test_a_lost_batch_is_replayed(engine, follow):
    follower = await follow()
    await engine.publish(block(0), block(1))
    await follower.has(0, 1)
    await engine.publish(removed([2]), lose=True)
    await engine.publish(block(1), block(2), lose=True)
    await engine.publish(removed([1]))
    await follower.has(1, 2)
    assert follower.source.counts.gaps == 1
    assert follower.source.counts.restarts == 0
    assert follower.lost == []


async def test_what_cannot_be_replayed_clears_the_node(engine, follow):
    follower = await follow()
    await engine.publish(block(0))
    await follower.has(0)
    await engine.publish(removed([1]), lose=True)
    for _ in range(8):
        await engine.publish(lose=True)
    await engine.publish(stored([9], None, TOKENS[:4]), stored([10], 1, TOKENS[4:8]))
    await until(lambda: follower.lost == ["engine"])
    await follower.has(0)
    assert follower.source._blocks.counts.orphans == 1, "children of what was forgotten are left out"
    await engine.publish(removed([9]))
    await follower.has()


async def test_without_replay_each_loss_clears_the_node(engine, follow):
    follower = await follow(replay=False)
    await engine.publish(block(0))
    await follower.has(0)
    await engine.publish(removed([1]), lose=True)
    await engine.publish(stored([5], None, TOKENS[:4]))
    await until(lambda: follower.lost == ["engine"])
    await follower.has(0)
    await engine.publish(removed([5]))
    await follower.has()
    assert follower.source.counts.restarts == 0


async def test_a_history_that_starts_too_late_is_told(engine, follow):
    await engine.publish(block(0))
    await engine.publish(block(1))
    for _ in range(7):
        await engine.publish()
    follower = await follow()
    await until(lambda: follower.lost == ["engine"])
    await follower.has()
    await engine.publish(stored([20], None, TOKENS[:4]))
    await follower.has(0)
    assert follower.lost == ["engine"]


@pytest.mark.parametrize("before_reconnect", [0, 1, 2, 4])
async def test_an_engine_restarted_in_place_leaves_nothing_behind(engine, follow, before_reconnect):
    """Even idle, and even when its new numbers fit the old ones."""
    follower = await follow()
    await engine.publish(block(0), block(1))
    await engine.publish(block(2))
    await follower.has(0, 1, 2)
    await engine.stop()
    await until(lambda: not follower.source.connected)
    engine.clock += 100
    await engine.start()
    for _ in range(before_reconnect):
        await engine.publish(stored([1], None, TOKENS[:4]), lose=True)
    await follower.has(*([0] if before_reconnect else []))
    assert follower.source.counts.restarts == 1
    await engine.publish(stored([1], None, TOKENS[:4]))
    await follower.has(0)
    assert follower.index.position("engine")[0] > 10


async def test_a_broken_connection_to_the_same_engine_loses_nothing(engine, follow):
    follower = await follow()
    await engine.publish(block(0))
    await engine.publish(block(1))
    await follower.has(0, 1)
    await engine.drop_connections()
    await engine.publish(removed([2]), lose=True)
    await engine.subscribed()
    await follower.has(0)
    await engine.publish(block(2))
    await asyncio.sleep(0)
    assert (follower.source.counts.restarts, follower.lost) == (0, [])


async def test_numbers_that_step_back_mean_a_new_engine(engine, follow):
    follower = await follow()
    await engine.publish(block(0))
    await engine.publish(block(1))
    await follower.has(0, 1)
    engine.number = 0
    engine._buffer.clear()
    await engine.publish(block(0))
    await follower.has(0)
    assert follower.source.counts.restarts == 1


async def test_a_malformed_batch_counts_as_lost(engine, follow):
    follower = await follow()
    await engine.publish(block(0))
    await follower.has(0)
    await engine.publish(payload=b"\xc1 not msgpack")
    await until(lambda: follower.lost == ["engine"])
    await follower.has()
    await engine.publish(stored([30], None, TOKENS[:4]))
    await follower.has(0)
    assert follower.source.counts.malformed == 1


async def test_blocks_that_do_not_fit_end_the_source(engine, follow):
    follower = await follow()
    await engine.publish(stored([1], None, TOKENS[:6], size=6))
    with pytest.raises(ConfigError):
        async with asyncio.timeout(60):
            await follower.task


async def test_other_topics_are_not_heard(engine, follow):
    follower = await follow()
    await engine._pub.send_multipart([b"metrics", (0).to_bytes(8, "big"), b"\xc1"])
    await engine.publish(block(0))
    await follower.has(0)
    assert follower.source.counts.malformed == 0


async def test_a_silent_engine_stops_being_renewed(engine, follow):
    follower = await follow()
    await engine.publish(block(0))
    await follower.has(0)
    await engine.stop()
    await until(lambda: not follower.source.connected)
    deadline = follower.index._nodes["engine"].deadline
    await asyncio.sleep(0.15)
    assert follower.index._nodes["engine"].deadline == deadline, "its lease runs out by itself"
    await engine.start()
    await until(lambda: follower.index._nodes["engine"].deadline > deadline)
