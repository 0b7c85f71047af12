"""One router's stream: what it asks goes to the job table, what the engine gives goes back, one message a step.

A router's handle becomes the worker's own by putting the session's number above it, so that several routers share
one engine and n consecutive handles stay consecutive. Output that the router has not taken yet is merged into few
messages and bounded: a router that reads too slowly loses its stream, never the worker's memory.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pdserve.errors import InvalidRequest, Overloaded, PdserveError
from pdserve.rpc import ServerStream
from pdserve.types import CacheDelta, EngineLoad, Finish, FinishReason, Logprobs, PromptStats, StepOutput
from pdserve.wire import common_version
from pdserve.wire.session import (
    Announcement,
    Relay,
    RouterUpdate,
    Submission,
    WorkerHello,
    WorkerUpdate,
    step_columns,
)
from worker_core.cache_view import CacheFeed

HANDLE_BITS = 32
HANDLE_MASK = (1 << HANDLE_BITS) - 1
MAX_MESSAGE_BYTES = 512 << 10
"""Merged output is cut here: messages stay under 1 MiB."""
MAX_UNSENT_BYTES = 8 << 20
"""Bounds what many-token steps or logprobs may pile up before `max_steps_behind` does."""
MIN_BEHIND_S = 1.0
"""A small engine's steps take under a millisecond: a router's short pause may span hundreds of them and is no
slowness. `max_steps_behind` counts only after so many seconds."""
HELLO_TIMEOUT_S = 10.0
_TOKEN_BYTES = 16
_FINISH_BYTES = 64
_LOGPROB_BYTES = 200


class Jobs(Protocol):
    """What a session asks of the worker (`worker_core.jobs.JobTable`)."""

    def submit(self, session: Session, submission: Submission) -> None: ...
    def cancel(self, session: Session, handle: int) -> None: ...
    def cancel_choice(self, session: Session, handle: int) -> None: ...
    def relay(self, session: Session, relay: Relay) -> None: ...
    def drop_session(self, session: Session) -> None: ...


@dataclass(slots=True)
class _Unsent:
    """Output on its way into one message."""

    output: StepOutput = field(default_factory=StepOutput)
    announcements: list[Announcement] = field(default_factory=list)
    nbytes: int = 0


class Session:
    """Serves one stream. Handles in its `add_*` methods are the router's."""

    def __init__(
        self, number: int, stream: ServerStream[RouterUpdate, WorkerUpdate], jobs: Jobs, max_steps_behind: int
    ) -> None:
        self.number = number
        self.router_id = ""
        self._stream = stream
        self._jobs = jobs
        self._max_steps_behind = max_steps_behind
        self._steps_behind = 0
        self._behind_since = 0.0
        self._unsent: deque[_Unsent] = deque()
        self._unsent_bytes = 0
        self._load: EngineLoad | None = None
        self._cache: CacheFeed | None = None
        self._hello: WorkerHello | None = None
        self._draining = False
        self._draining_told = False
        self._dirty = asyncio.Event()
        self._closing = False
        self._error: PdserveError | None = None
        self._cut = asyncio.Event()

    def key(self, handle: int) -> int:
        """The worker's own handle for a router's."""
        return self.number << HANDLE_BITS | handle

    async def run(self, hello: WorkerHello) -> None:
        """Serve until either side ends. Raises the typed error that ended it, if one did."""
        await self._greet(hello)
        tasks = [asyncio.ensure_future(step) for step in (self._read(), self._write(), self._wait_cut())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            self._jobs.drop_session(self)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _greet(self, hello: WorkerHello) -> None:
        await self._stream.write(WorkerUpdate(hello=hello))
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                update = await self._stream.read()
        except TimeoutError:
            update = None
        if update is None or update.hello is None:
            raise InvalidRequest("a session's first message must be the router's hello", param="hello")
        common_version(update.hello.protocol_min, update.hello.protocol_max)
        self.router_id = update.hello.router_id
        self._receive(update)

    async def _read(self) -> None:
        while (update := await self._stream.read()) is not None:
            self._receive(update)

    def _receive(self, update: RouterUpdate) -> None:
        for submission in update.submissions:
            self._jobs.submit(self, submission)
        for relay in update.relays:
            self._jobs.relay(self, relay)
        for handle in update.choice_cancels:
            self._jobs.cancel_choice(self, handle)
        for handle in update.cancels:
            self._jobs.cancel(self, handle)

    # ---- towards the router ----

    async def _write(self) -> None:
        """Raises the error that the session was closed with."""
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            while (update := self._next_update()) is not None:
                await self._stream.write(update)
            if self._error is not None:
                raise self._error
            if self._closing:
                return

    async def _wait_cut(self) -> None:
        """Ends the stream though its writer is stuck."""
        await self._cut.wait()
        if self._error is not None:
            raise self._error

    def _next_update(self) -> WorkerUpdate | None:
        tell_draining = self._draining and not self._draining_told
        if not (self._unsent or self._load or self._hello or self._cache or tell_draining):
            return None
        update = WorkerUpdate(hello=self._hello, load=self._load, draining=self._draining)
        update.cache = self._cache.take() if self._cache is not None else None
        self._hello = self._load = None
        self._draining_told = self._draining
        if self._unsent:
            unsent = self._unsent.popleft()
            self._unsent_bytes -= unsent.nbytes
            if not self._unsent:
                self._steps_behind = 0
            update.step = step_columns(unsent.output, unsent.announcements)
        return update

    def _open(self, nbytes: int) -> _Unsent:
        """Where to add output of that size."""
        self._dirty.set()
        self._unsent_bytes += nbytes
        if self._unsent_bytes > MAX_UNSENT_BYTES:
            self._cut_off()
        if not self._unsent or self._unsent[-1].nbytes + nbytes > MAX_MESSAGE_BYTES:
            self._unsent.append(_Unsent())
        self._unsent[-1].nbytes += nbytes
        return self._unsent[-1]

    def end_step(self) -> None:
        """Everything of one engine step was added."""
        if not self._unsent:
            return
        now = time.monotonic()
        if not self._steps_behind:
            self._behind_since = now
        self._steps_behind += 1
        if self._steps_behind > self._max_steps_behind and now > self._behind_since + MIN_BEHIND_S:
            self._cut_off()

    def _cut_off(self) -> None:
        if not self._cut.is_set():
            self._error = Overloaded(
                f"the router reads too slowly: {self._steps_behind} steps, {self._unsent_bytes} bytes wait for it"
            )
            self._cut.set()

    def add_tokens(self, handles: list[int], first_indexes: list[int], counts: list[int], token_ids: list[int]) -> None:
        """Hot path: this router's columns of one engine step; it takes over the lists."""
        output = self._open(_TOKEN_BYTES * len(token_ids)).output
        if not output.handles:
            output.handles, output.first_indexes = handles, first_indexes
            output.counts, output.token_ids = counts, token_ids
            return
        output.handles += handles
        output.first_indexes += first_indexes
        output.counts += counts
        output.token_ids += token_ids

    def add_finish(self, finish: Finish) -> None:
        self._open(_FINISH_BYTES).output.finishes.append(finish)

    def add_error(self, handles: Sequence[int], error: PdserveError) -> None:
        """End choices with an error."""
        for handle in handles:
            self.add_finish(Finish(handle, FinishReason.ERROR, 0, error=error))

    def add_logprobs(self, entry: Logprobs) -> None:
        self._open(_LOGPROB_BYTES).output.logprobs.append(entry)

    def add_prompt(self, stats: PromptStats) -> None:
        self._open(_TOKEN_BYTES).output.prompts.append(stats)

    def add_announcement(self, announcement: Announcement) -> None:
        nbytes = len(announcement.ticket) + sum(map(len, announcement.manifests))
        self._open(nbytes).announcements.append(announcement)

    def set_load(self, load: EngineLoad) -> None:
        self._load = load
        self._dirty.set()

    def follow_cache(self, feed: CacheFeed) -> None:
        """From now on tell the router what the engine's prefix cache holds."""
        self._cache = feed
        self._dirty.set()

    def add_cache(self, delta: CacheDelta) -> None:
        if self._cache is not None:
            self._cache.add(delta)
            self._dirty.set()

    def set_hello(self, hello: WorkerHello) -> None:
        """Tell the router again who this is: the role has changed."""
        self._hello = hello
        self._dirty.set()

    def set_draining(self) -> None:
        self._draining = True
        self._dirty.set()

    def close(self, error: PdserveError | None = None) -> None:
        """End the stream once everything unsent is written; with an error, as its status."""
        self._closing = True
        self._error = self._error or error
        self._dirty.set()
