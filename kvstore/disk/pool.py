"""Threads that wait for the disk. The kernel call and the digest both release the interpreter lock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")


class IoPool:
    """Runs the parts of one request side by side."""

    def __init__(self, threads: int) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="kv-disk")

    def run(self, jobs: Sequence[Callable[[], T]]) -> list[T]:
        """Every job's result, in order; raises what a job raised once all have ended: they use the caller's memory."""
        if len(jobs) == 1:
            return [jobs[0]()]
        futures = [self._submit(job) for job in jobs]
        wait(futures)
        return [future.result() for future in futures]

    def _submit(self, job: Callable[[], T]) -> Future[T]:
        try:
            return self._threads.submit(job)
        except RuntimeError:  # closed under a request that had begun: it ends in its own thread
            future: Future[T] = Future()
            future.set_result(job())
            return future

    def close(self) -> None:
        self._threads.shutdown(wait=True)
