"""Ending a task that does not want to."""

import asyncio

import pytest

from pdserve import tasks
from pdserve.tasks import end_task


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(tasks, "AGAIN_S", 0.001)


async def test_a_task_that_swallows_a_cancellation_is_cancelled_again():
    swallowed = 0

    async def stubborn():
        nonlocal swallowed
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                swallowed += 1
                if swallowed == 3:
                    raise

    task = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    async with asyncio.timeout(60):
        await end_task(task)
    assert task.cancelled()
    assert swallowed == 3


async def test_a_task_that_has_ended_or_failed_is_no_trouble():
    async def fails():
        raise ValueError

    task = asyncio.create_task(fails())
    await asyncio.wait([task])
    await end_task(task)
    assert isinstance(task.exception(), ValueError)
