"""Threads that wait for the disk. The kernel calls and xxhash both release the interpreter lock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


class IoPool:
    """Runs the parts of one request side by side, the caller's thread among `threads`."""

    def __init__(self, threads: int) -> None:
        self._count = threads
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="kv-disk")

    def run(self, jobs: Sequence[Callable[[], T]]) -> list[T]:
        """Every job's result, in order. Raises what a job raised, once all have ended: they use the caller's memory.

        A thread takes the next job when it is done with one, so that a future a job is saved.
        """
        pending, results = deque(enumerate(jobs)), dict[int, T]()

        def work() -> None:
            while pending:
                try:
                    index, job = pending.popleft()
                except IndexError:
                    return
                results[index] = job()

        others = self._start(work, min(len(jobs), self._count) - 1)
        try:
            work()
        finally:
            wait(others)
        for other in others:
            other.result()
        return [results[index] for index in range(len(jobs))]

    def _start(self, work: Callable[[], None], count: int) -> list[Future[None]]:
        """Helpers; none when the pool was closed under a request that had begun: it ends in its own thread."""
        started: list[Future[None]] = []
        with suppress(RuntimeError):
            while len(started) < count:
                started.append(self._threads.submit(work))
        return started

    def close(self) -> None:
        self._threads.shutdown(wait=True)
