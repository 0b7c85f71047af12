"""Ending asyncio tasks for sure."""

from __future__ import annotations

import asyncio

AGAIN_S = 0.5


async def end_task(task: asyncio.Task[None]) -> None:
    """Cancel a task until it has ended. Once is not enough where a library (redis-py was seen to) swallows a
    cancellation that meets the end of one of its own time-outs. What the task raised is dropped."""
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=AGAIN_S)
    if not task.cancelled():
        task.exception()
