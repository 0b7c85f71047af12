"""One request at the router, from its submission to its end: it joins the legs, the choices and the client's sink.

Both legs are submitted at once, so that decode reserves room while prefill computes. What prefill announces goes on to
decode; what prefill samples goes to the client at once and to decode when every choice has its first token. Whatever
ends a request (last token, error, cancel, lost worker, deadline) passes through `_end`, once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from pdserve.errors import DeadlineExceeded, EngineFailed, PdserveError, WorkerLost
from pdserve.tokens import Detokenizer
from pdserve.types import Finish, Phase, PromptStats, Request
from pdserve.wire.session import Announcement, FirstOutput
from router.base import Sink, Usage
from router.catalog import Record
from router.choice import Choice, TextOptions
from router.deadlines import Deadlines
from router.legs import DecodeLeg, FullLeg, Leg, PrefillLeg
from router.session import Link

FOREVER = float("inf")


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds without progress after which a leg has failed."""

    prefill_s: float
    transfer_s: float
    decode_s: float

    def of(self, clock: str) -> float:
        return {"prefill": self.prefill_s, "transfer": self.transfer_s, "decode": self.decode_s}[clock]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What every request of a router shares."""

    loop: asyncio.AbstractEventLoop
    deadlines: Deadlines
    timeouts: Timeouts
    on_end: Callable[[ActiveRequest], None]


class ActiveRequest:
    """Implements `router.base.Handle`, and what choices, legs and deadlines ask of their owner."""

    def __init__(
        self,
        request: Request,
        sink: Sink,
        detokenizer: Callable[[], Detokenizer],
        options: TextOptions,
        record: Record,
        around: Surroundings,
        arrived: float,
    ) -> None:
        self.request = request
        self.record = record
        self.arrived = arrived
        self.deadline = FOREVER
        self.done = False
        self.error: PdserveError | None = None
        self.choices = [Choice(index, detokenizer(), options, sink, self) for index in range(request.params.n)]
        self._sink = sink
        self._around = around
        self._limit = arrived + request.timeout_ms / 1000 if request.timeout_ms else FOREVER
        self._clock = "prefill"
        self._prefill: Leg | None = None
        self._decode: Leg | None = None
        self._running: Leg | None = None
        self._num_open = request.params.n
        self._num_announced = 0
        self._progress = -1

    # ---- begin ----

    def start_pair(self, prefill: Link, decode: Link) -> None:
        """Submit both legs. Raises `WorkerLost`, with nothing left behind."""
        first = PrefillLeg(self, prefill)
        second = DecodeLeg(self, decode)
        second.submit(self.request)
        try:
            first.submit(self.request)
        except WorkerLost:
            second.cancel()
            raise
        self._prefill, self._decode = first, second
        self._set_clock("prefill")

    def start_alone(self, link: Link, leg: str) -> None:
        """Submit the whole request to one worker. Raises `WorkerLost`."""
        alone = FullLeg(self, link, leg)
        alone.submit(self.request)
        if leg == "prefill":
            self._prefill = alone
        else:
            self._decode = alone
        self._set_clock("prefill")

    # ---- Handle ----

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        return self.request.prompt_token_ids

    def cancel(self) -> None:
        if not self.done:
            self._end("cancelled")

    def fail(self, error: PdserveError) -> None:
        """End with an error. `work_done` is set when the client has tokens already."""
        if self.done:
            return
        error.work_done = error.work_done or self.num_output_tokens > 0
        self.error = error
        self._end(error.reason)
        self._sink.on_error(error)

    @property
    def num_output_tokens(self) -> int:
        return sum(choice.num_tokens for choice in self.choices)

    # ---- news from the legs ----

    def on_announced(self, announcement: Announcement) -> None:
        self._num_announced += 1
        if self._decode is not None:
            self._decode.link.relay(self._decode.handle, ticket=announcement.ticket, manifests=announcement.manifests)

    def on_prompt(self, stats: PromptStats) -> None:
        self.record.num_cached_tokens = stats.num_cached_tokens

    def on_first_output(self) -> None:
        if self.record.first_token_s is None:
            self.record.first_token_s = self._age()

    def on_running(self, leg: Leg) -> None:
        self._running = leg
        if leg.phase is Phase.DECODE:
            self.record.decode_started_s = self._age()
            self._let_prefill_go()
        self._set_clock("decode")

    def on_prefilled(self, outputs: tuple[FirstOutput, ...]) -> None:
        if self._decode is not None:
            self._decode.link.relay(self._decode.handle, outputs=outputs)
            self._set_clock("transfer")

    def _let_prefill_go(self) -> None:
        """Decode has all the KV and has released prefill's: nothing that happens there matters any more."""
        if self._prefill is not None:
            self._prefill.forget()
            self._prefill = None

    def on_leg_lost(self, leg: Leg, error: WorkerLost) -> None:
        """A prefill worker that drains goes as soon as decode has pulled the KV, and that may be before decode's first
        token."""
        if self._clock == "transfer" and leg is self._prefill and leg.link.draining:
            return
        error.leg = leg.name
        self.fail(error)

    # ---- news from the choices ----

    def on_choice_end(self, choice: Choice, *, by_router: bool) -> None:
        self._num_open -= 1
        if self._num_open == 0:
            usage = Usage(len(self.prompt_token_ids), self.num_output_tokens, self.record.num_cached_tokens)
            self._end("ok", still_runs=by_router)
            self._sink.on_done(usage)
        elif by_router and self._running is not None:
            self._running.link.cancel_choice(self._running.handle + choice.index)

    def on_finish_error(self, finish: Finish) -> None:
        error = finish.error
        if not isinstance(error, PdserveError):
            error = EngineFailed(f"the engine failed: {error}")
        error.leg = error.leg or self._clock
        self.fail(error)

    # ---- clocks ----

    def on_deadline(self, now: float) -> None:
        if self.done:
            self.deadline = FOREVER
        elif now >= self._limit:
            self.fail(self._timed_out(f"the request's timeout of {self.request.timeout_ms} ms is over"))
        elif self._progress == (progress := self.num_output_tokens + self._num_announced):
            silence = self._around.timeouts.of(self._clock)
            self.fail(self._timed_out(f"no progress in the {self._clock} leg for {silence:g} s"))
        else:
            self._progress = progress
            self._set_deadline(now)

    def _timed_out(self, message: str) -> DeadlineExceeded:
        return DeadlineExceeded(message, leg=self._clock)

    def _set_clock(self, clock: str) -> None:
        self._clock = clock
        self._progress = self.num_output_tokens + self._num_announced
        before = self.deadline
        self._set_deadline(self._around.loop.time())
        if self.deadline < before:
            self._around.deadlines.watch(self)

    def _set_deadline(self, now: float) -> None:
        self.deadline = min(now + self._around.timeouts.of(self._clock), self._limit)

    def _age(self) -> float:
        return self._around.loop.time() - self.arrived

    # ---- the end ----

    def _end(self, outcome: str, *, still_runs: bool = True) -> None:
        """Free both workers, once. `still_runs`: a worker may hold something of it yet (exported blocks, room that
        decode reserved, a choice under way). A request that ran to its end is only forgotten, at no message."""
        self.done = True
        self.deadline = FOREVER
        self._around.deadlines.ended()
        for choice in self.choices:
            choice.ended = True
        over = self._running is not None and not still_runs
        for leg in (self._prefill, self._decode):
            if leg is not None:
                leg.forget() if over else leg.cancel()
        self.record.outcome = outcome
        self.record.finish_reasons = tuple([_name(choice) for choice in self.choices])
        self.record.num_output_tokens = self.num_output_tokens
        self.record.ended_s = self._age()
        self._around.on_end(self)


def _name(choice: Choice) -> str:
    return "" if choice.reason is None else choice.reason.name.lower()
