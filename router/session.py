"""The router's end of a session stream: one live connection to one worker.

Everything a loop tick wants to tell the worker leaves as one message; everything an engine step produced comes back
as one. A `Link` lives from a worker's Hello to the end of its stream, so nothing learnt of one incarnation can
outlive it: `router.fleet` makes a new link at each reconnect.

Hot path: `_on_step` runs once an engine step and costs one dictionary look-up and one call a delta; together with
`router.choice` and the table of token texts 0.4 us a token (400 streams, no stop strings, sink not counted).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from pdserve.errors import EngineFailed, PdserveError, WorkerLost
from pdserve.rpc import ClientStream, guard
from pdserve.types import (
    CacheDelta,
    EngineLoad,
    Finish,
    FinishReason,
    Logprobs,
    Phase,
    PromptStats,
    Request,
    WorkerInfo,
)
from pdserve.wire.session import (
    Announcement,
    FirstOutput,
    Relay,
    RouterHello,
    RouterUpdate,
    StepColumns,
    Submission,
    WorkerUpdate,
)
from router.scheduling.base import Outstanding

MAX_MESSAGE_BYTES = 1 << 20
"""A tick's submissions are split beyond this, so that no long prompt delays another request's cancel or relay."""
MAX_HANDLE = 2**32 - 2
"""One below the largest uint32: the handle after a request's last is a uint32 as well."""

log = logging.getLogger(__name__)

SessionStream = ClientStream[RouterUpdate, WorkerUpdate]


class Lane(Protocol):
    """Where the tokens of one choice go that one worker produces."""

    def take(
        self, first_index: int, token_ids: Sequence[int], logprobs: Sequence[Logprobs], finish: Finish | None
    ) -> None:
        """Tokens of one step, the first being output number `first_index`; `finish` if the choice ended with them."""
        ...

    def end(self, finish: Finish) -> None:
        """The choice ended in a step that brought it no tokens; an ERROR ends its whole request."""
        ...


class LegEvents(Protocol):
    """What a link tells the owner of a submission. Plain calls on the loop; none may raise."""

    def lane(self, choice: int) -> Lane: ...

    def on_prompt(self, stats: PromptStats) -> None: ...

    def on_announcement(self, announcement: Announcement) -> None: ...

    def on_lost(self, error: WorkerLost) -> None:
        """The stream ended with the request on it. The leg is over, and forgotten by the link."""
        ...


class HandleSpace:
    """Names for choices on one stream: consecutive uint32 numbers, never 0.

    Numbers only go up, so a late message finds nobody until 2**32 numbers later; after the wrap those still in use
    are stepped over.
    """

    def __init__(self, first: int = 1) -> None:
        self._next = first

    def take(self, count: int, in_use: dict[int, Lane]) -> int:
        """The first of `count` consecutive numbers, none of them in use."""
        while True:
            first = self._next if self._next + count - 1 <= MAX_HANDLE else 1
            taken = next((handle for handle in range(first + count - 1, first - 1, -1) if handle in in_use), None)
            if taken is None:
                self._next = first + count
                return first
            self._next = taken + 1


class _Leg:
    """A submission under way on a link."""

    __slots__ = ("events", "num_choices")

    def __init__(self, events: LegEvents, num_choices: int) -> None:
        self.events = events
        self.num_choices = num_choices


class Link:
    """A connected worker: a `Candidate` for the scheduler, and the door to it."""

    def __init__(
        self, info: WorkerInfo, stream: SessionStream, hello: RouterHello, on_change: Callable[[], None] = lambda: None
    ) -> None:
        self.info = info
        self.draining = False
        self._lost: str | None = None
        """Why the stream ended, once it has."""
        self.own = Outstanding()
        self.foreign = Outstanding()
        self.load = EngineLoad()
        self.on_cache: Callable[[CacheDelta], None] | None = None
        """Told what changes in the worker's prefix cache; set before the stream is read."""
        self._stream = stream
        self._on_change = on_change
        self._handles = HandleSpace()
        self._lanes: dict[int, Lane] = {}
        self._legs: dict[int, _Leg] = {}
        self._pending = RouterUpdate(hello=hello)
        self._flush_due = False
        self._leaving = False
        self._drains_itself = False

    # ---- what requests ask for; nothing is sent before the tick ends ----

    def submit(self, request: Request, phase: Phase, events: LegEvents, prefix_store: str = "") -> int:
        """Queue a submission; returns its handle. Raises `WorkerLost` when the stream has ended."""
        if self._lost is not None:
            raise WorkerLost(f"worker {self.info.worker_id} is gone: {self._lost}")
        handle = self._handles.take(request.params.n, self._lanes)
        self._legs[handle] = _Leg(events, request.params.n)
        for choice in range(request.params.n):
            self._lanes[handle + choice] = events.lane(choice)
        self._pending.submissions.append(Submission(handle, phase, request, prefix_store=prefix_store))
        self._wake()
        return handle

    def cancel(self, handle: int) -> None:
        """Forget the request and have the worker free it. Unknown handles are ignored."""
        if not self.forget(handle):
            return
        unsent = [each for each in self._pending.submissions if each.handle == handle]
        if unsent:
            self._pending.submissions.remove(unsent[0])
            self._pending.relays = [each for each in self._pending.relays if each.handle != handle]
            return
        self._pending.cancels.append(handle)
        self._wake()

    def cancel_choice(self, handle: int) -> None:
        """One choice ended here (a stop string); the worker must not go on with it. Its handle stays taken until the
        request ends."""
        self._pending.choice_cancels.append(handle)
        self._wake()

    def relay(
        self,
        handle: int,
        *,
        ticket: bytes = b"",
        manifests: tuple[bytes, ...] = (),
        outputs: tuple[FirstOutput, ...] = (),
    ) -> None:
        """Pass prefill's news on to the decode request `handle`."""
        if handle in self._legs:
            self._pending.relays.append(Relay(handle, ticket, manifests, outputs))
            self._wake()

    def set_lane(self, handle: int, lane: Lane) -> None:
        """Give a choice's tokens to another lane from now on."""
        if handle in self._lanes:
            self._lanes[handle] = lane

    def forget(self, handle: int) -> bool:
        """Take nothing more of this request. False: it was not known."""
        leg = self._legs.pop(handle, None)
        if leg is None:
            return False
        for choice in range(leg.num_choices):
            self._lanes.pop(handle + choice, None)
        if self._leaving and not self._legs:
            self._stream.cancel()
        return True

    def leave(self) -> None:
        """Take nothing new; end the stream when the last request on it has ended."""
        self._drains_itself |= self.draining
        self.draining = self._leaving = True
        if not self._legs:
            self._stream.cancel()
        self._on_change()

    def stay(self) -> bool:
        """Take `leave` back. False: no request has kept the stream open, it is ending."""
        if not self._legs:
            return False
        self._leaving, self.draining = False, self._drains_itself
        self._on_change()
        return True

    @property
    def num_requests(self) -> int:
        """Of this router's, on this worker."""
        return len(self._legs)

    # ---- the stream ----

    async def run(self) -> None:
        """Serve the stream until it ends, then fail what is left on it. Raises the error that ended it."""
        reason = "this router has stopped"
        self._stream.when_room = self._wake
        self._wake()
        try:
            await self._stream.deliver(self._on_update)
            reason = "it closed its stream"
            raise WorkerLost(reason)
        except PdserveError as error:
            reason = error.message
            raise
        finally:
            self._stream.cancel()
            self._fail_all(reason)

    def _wake(self) -> None:
        if not self._flush_due:
            self._flush_due = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        """One message a tick. While the worker's window is closed everything gathers here; `when_room` wakes us."""
        self._flush_due = False
        if self._lost is not None or not self._stream.room:
            return
        update, self._pending = self._pending, RouterUpdate()
        try:
            for part in split(update):
                self._stream.send(part)
        except Exception as error:  # noqa: BLE001 - `run` raises it
            self._stream.fail(guard(error))

    def _on_update(self, update: WorkerUpdate) -> None:
        if update.step is not None:
            self._on_step(update.step)
        if update.load is not None:
            self._on_load(update.load)
        if update.cache is not None and self.on_cache is not None:
            self.on_cache(update.cache)
        if update.hello is not None:
            self._on_hello(update.hello.worker)
        if update.draining:
            self._drains_itself = True
        if update.draining and not self.draining:
            self.draining = True
            self._on_change()

    def _on_hello(self, info: WorkerInfo) -> None:
        """A worker introduces itself again when its role has changed. Raises `WorkerLost` if it is another one."""
        if info.incarnation != self.info.incarnation:
            raise WorkerLost(f"worker {self.info.worker_id} was restarted")
        self.info = info
        self._on_change()

    def _on_step(self, step: StepColumns) -> None:
        for stats in step.prompts:
            if (leg := self._legs.get(stats.handle)) is not None:
                leg.events.on_prompt(stats)
        if step.counts or step.logprobs or step.finishes:
            self._on_mixed_step(step)
        else:
            find = self._lanes.get
            for handle, index, token_id in zip(step.handles, step.first_indexes, step.token_ids, strict=True):
                lane = find(handle)
                if lane is not None:
                    try:
                        lane.take(index, (token_id,), (), None)
                    except Exception as error:  # noqa: BLE001 - one faulty sink must not cost the others
                        self._on_faulty(lane, handle, error)
        for announcement in step.announcements:
            if (leg := self._legs.get(announcement.handle)) is not None:
                leg.events.on_announcement(announcement)

    def _on_mixed_step(self, step: StepColumns) -> None:
        """A step with ends, logprobs or several tokens a choice. A worker that fell behind merges steps, so a choice
        may have several entries; its end goes with the last of them."""
        ended = {finish.handle: finish for finish in step.finishes}
        last = {handle: entry for entry, handle in enumerate(step.handles) if handle in ended} if ended else {}
        logprobs = {(each.handle, each.index): each for each in step.logprobs}
        start = 0
        counts = step.counts or (1,) * len(step.handles)
        for entry, (handle, index, count) in enumerate(zip(step.handles, step.first_indexes, counts, strict=True)):
            token_ids = tuple(step.token_ids[start : start + count])
            start += count
            known = _pick(logprobs, handle, index, count) if logprobs else ()
            finish = ended.pop(handle) if last.get(handle) == entry else None
            self._give(handle, index, token_ids, known, finish)
        for handle, finish in ended.items():
            self._give(handle, 0, (), (), finish)

    def _give(
        self, handle: int, index: int, token_ids: tuple[int, ...], logprobs: Sequence[Logprobs], finish: Finish | None
    ) -> None:
        lane = self._lanes.get(handle)
        if lane is None:
            return
        try:
            if token_ids:
                lane.take(index, token_ids, logprobs, finish)
            elif finish is not None:
                lane.end(finish)
        except Exception as error:  # noqa: BLE001 - one faulty sink must not cost the others
            self._on_faulty(lane, handle, error)

    def _on_faulty(self, lane: Lane, handle: int, error: Exception) -> None:
        log.error("delivering tokens from worker %s failed", self.info.worker_id, exc_info=error)
        failure = EngineFailed(f"delivering tokens failed: {type(error).__name__}: {error}", leg="router")
        lane.end(Finish(handle, FinishReason.ERROR, 0, error=failure))

    def _on_load(self, load: EngineLoad) -> None:
        """What the report holds beyond our own work is others'. It lags by a step or two, which only ever counts some
        of our own work twice or not at all until the next report."""
        self.load = load
        self.foreign.num_seqs = max(0, load.num_running + load.num_waiting - self.own.num_seqs)
        self.foreign.num_prefill_tokens = max(0, load.num_prefill_tokens_waiting - self.own.num_prefill_tokens)
        held = (load.num_total_blocks - load.num_free_blocks) * self.info.block_tokens
        self.foreign.num_context_tokens = max(0, held - self.own.num_context_tokens)

    def _fail_all(self, reason: str) -> None:
        self._lost = reason
        legs, self._legs = self._legs, {}
        self._lanes.clear()
        for leg in legs.values():
            leg.events.on_lost(WorkerLost(f"worker {self.info.worker_id} was lost with the request on it: {reason}"))


def _pick(logprobs: dict[tuple[int, int], Logprobs], handle: int, first_index: int, count: int) -> Sequence[Logprobs]:
    wanted = ((handle, index) for index in range(first_index, first_index + count))
    return [logprobs[key] for key in wanted if key in logprobs]


def split(update: RouterUpdate) -> list[RouterUpdate]:
    """The update as messages of about `MAX_MESSAGE_BYTES` at most (one submission or relay is never cut), in this
    order: submissions, relays, cancels."""
    sizes = [submission_bytes(each) for each in update.submissions]
    relay_sizes = [relay_bytes(each) for each in update.relays]
    if sum(sizes) + sum(relay_sizes) <= MAX_MESSAGE_BYTES:
        return [update] if update else []
    parts = _Parts(update.hello)
    for submission, size in zip(update.submissions, sizes, strict=True):
        parts.room_for(size).submissions.append(submission)
    for relay, size in zip(update.relays, relay_sizes, strict=True):
        parts.room_for(size).relays.append(relay)
    last = parts.messages[-1]
    last.cancels, last.choice_cancels = update.cancels, update.choice_cancels
    return parts.messages


class _Parts:
    """Messages that fill up one after the other."""

    def __init__(self, hello: RouterHello | None) -> None:
        self.messages = [RouterUpdate(hello=hello)]
        self._used = 0

    def room_for(self, size: int) -> RouterUpdate:
        if self._used and self._used + size > MAX_MESSAGE_BYTES:
            self.messages.append(RouterUpdate())
            self._used = 0
        self._used += size
        return self.messages[-1]


def submission_bytes(submission: Submission) -> int:
    """About what it takes on the wire."""
    request = submission.request
    assert request is not None
    return 4 * len(request.prompt_token_ids) + len(request.block_keys) + 512


def relay_bytes(relay: Relay) -> int:
    """The same of a relay."""
    return 64 + len(relay.ticket) + sum(map(len, relay.manifests)) + 16 * len(relay.outputs)
