"""Many deadlines behind one timer."""

from __future__ import annotations

import asyncio

import pytest

from worker_core.deadlines import Deadlines


def set_at_once(deadlines: Deadlines, *pairs: tuple[int, float]) -> None:
    """Sets them all at one instant, however long this takes."""
    loop = asyncio.get_running_loop()
    now = loop.time()
    with pytest.MonkeyPatch.context() as change:
        change.setattr(loop, "time", lambda: now)
        for key, after_s in pairs:
            deadlines.set(key, after_s)


class Expired(list[int]):
    """Keys in the order in which they expired."""

    def __init__(self, expect: int) -> None:
        self.all = asyncio.Event()
        self._expect = expect

    def __call__(self, key: int) -> None:
        self.append(key)
        if len(self) == self._expect:
            self.all.set()


async def test_deadlines_expire_in_their_own_order() -> None:
    expired = Expired(3)
    deadlines = Deadlines(expired)
    set_at_once(deadlines, (1, 0.06), (2, 0.02), (3, 0.04))
    await asyncio.wait_for(expired.all.wait(), 60)
    assert expired == [2, 3, 1]
    assert len(deadlines) == 0


async def test_a_cleared_deadline_never_expires() -> None:
    expired = Expired(1)
    deadlines = Deadlines(expired)
    deadlines.set(1, 0.01)
    deadlines.set(2, 0.03)
    deadlines.clear(1)
    deadlines.clear(99)
    await asyncio.wait_for(expired.all.wait(), 60)
    assert expired == [2]


async def test_a_deadline_can_be_moved() -> None:
    expired = Expired(2)
    deadlines = Deadlines(expired)
    set_at_once(deadlines, (1, 0.01), (2, 0.03), (1, 0.05))
    await asyncio.wait_for(expired.all.wait(), 60)
    assert expired == [2, 1]


async def test_an_earlier_deadline_overtakes_a_running_timer() -> None:
    expired = Expired(1)
    deadlines = Deadlines(expired)
    deadlines.set(1, 60.0)
    deadlines.set(2, 0.01)
    await asyncio.wait_for(expired.all.wait(), 60)
    assert expired == [2]
    deadlines.close()


async def test_cleared_deadlines_leave_no_memory_behind() -> None:
    deadlines = Deadlines(Expired(1))
    for key in range(5000):
        deadlines.set(key, 60.0)
        deadlines.clear(key)
    assert len(deadlines._heap) < 100
    deadlines.close()
