"""One request at the router, from its submission to its end: it joins the legs, the choices and the client's sink.

It waits until it is placed (`router.placer`), then both legs are submitted at once, so that decode reserves room while
prefill computes. What prefill announces goes on to decode; what prefill samples goes to the client at once and to
decode when every choice has its first token. When a leg is lost, or a worker refuses it because it is going away, the
request is placed again with the tokens that the client has already; a choice drops what comes twice. Whatever ends a
request (last token, error, cancel, deadline) passes through `_end`, once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pdserve.errors import DeadlineExceeded, Draining, EngineFailed, HandoverError, NoWorker, PdserveError, WorkerLost
from pdserve.tokens import Detokenizer
from pdserve.types import Finish, Phase, PromptStats, Request
from pdserve.wire.session import Announcement, FirstOutput
from router.base import Sink, Usage
from router.catalog import Attempt, Record, attempt_of
from router.choice import Choice, TextOptions
from router.legs import DecodeLeg, FullLeg, Leg, PrefillLeg
from router.scheduling.base import Decision
from router.session import Link
from router.surroundings import Surroundings

if TYPE_CHECKING:
    from opentelemetry.trace import Span

FOREVER = float("inf")


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
        self.session = ""
        """The client's name for its conversation."""
        self.span: Span | None = None
        """Where traces are on."""
        self.choices = [Choice(index, detokenizer(), options, sink, self) for index in range(request.params.n)]
        self._sink = sink
        self._around = around
        self._limit = arrived + request.timeout_ms / 1000 if request.timeout_ms else FOREVER
        self._clock = "queue"
        self._prefill: Leg | None = None
        self._decode: Leg | None = None
        self._running: Leg | None = None
        self._num_open = request.params.n
        self._submitted = request
        """As its workers have it: behind what the client has got before."""
        self._num_announced = 0
        self._num_rebound = 0
        self._held: list[Announcement] | None = None
        """What prefill announced while another decode worker is looked for; None: there is one."""
        self._first_outputs: tuple[FirstOutput, ...] = ()
        """What this attempt's prefill has sampled, once it has: each decode worker that takes over is told."""
        self._progress = -1
        self._failure: PdserveError | None = None
        """Of its last attempt."""

    # ---- waiting, and begin ----

    @property
    def attempt(self) -> Attempt:
        """The present one; only once it was bound."""
        return self.record.attempts[-1]

    @property
    def waiting(self) -> bool:
        return self._clock == "queue"

    def wait(self) -> None:
        """It stands in the queue."""
        self._set_clock("queue")

    def bind(self, decision: Decision[Link]) -> None:
        """Submit to the decided workers. Raises `WorkerLost`, with nothing left behind."""
        request = self._submitted = self._as_it_stands()
        self._num_announced = 0
        self.record.attempts.append(attempt_of(decision, self._age(), self.num_output_tokens))
        if decision.prefill is not None and decision.decode is not None:
            self.start_pair(decision.prefill, decision.decode, request, decision.prefix_store)
        elif decision.decode is not None:
            self.start_alone(decision.decode, "decode", request, decision.prefix_store)
        elif decision.prefill is not None:
            self.start_alone(decision.prefill, "prefill", request, decision.prefix_store)

    def start_pair(self, prefill: Link, decode: Link, request: Request, prefix_store: str = "") -> None:
        """Prefill is told first: the first token waits for it."""
        first = PrefillLeg(self, prefill)
        second = DecodeLeg(self, decode)
        first.submit(request, prefix_store)
        try:
            second.submit(request)
        except BaseException:
            first.cancel()
            raise
        self._prefill, self._decode = first, second
        self._set_clock("prefill")

    def start_alone(self, link: Link, leg: str, request: Request, prefix_store: str = "") -> None:
        alone = FullLeg(self, link, leg)
        alone.submit(request, prefix_store)
        if leg == "prefill":
            self._prefill = alone
        else:
            self._decode = alone
        self._set_clock("prefill")

    def _as_it_stands(self) -> Request:
        """With what the client has already, and the time that is left."""
        if not self.record.attempts and not self.request.timeout_ms:
            return self.request
        request, now = self.request, self._around.clock()
        outputs = (tuple(self.choices[0].token_ids),) if self._num_given() else ()
        left_ms = max(1, int((self._limit - now) * 1000)) if request.timeout_ms else 0
        return replace(request, output_token_ids=outputs, timeout_ms=left_ms)

    # ---- Handle ----

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def prompt_token_ids(self) -> Sequence[int]:
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
        self.record.leg = error.leg or ""
        self._end(error.reason)
        try:
            self._sink.on_error(error)
        except Exception as fault:  # noqa: BLE001 - who failed it may have others to tell: a lost link, the deadlines
            self._around.loop.call_exception_handler({"message": "telling an error failed", "exception": fault})

    @property
    def num_output_tokens(self) -> int:
        choices = self.choices
        return choices[0].num_tokens if len(choices) == 1 else sum([choice.num_tokens for choice in choices])

    # ---- news from the legs ----

    def on_announced(self, announcement: Announcement) -> None:
        self._num_announced += 1
        if self._held is not None:
            self._held.append(announcement)
        elif self._decode is not None:
            self._decode.link.relay(self._decode.handle, ticket=announcement.ticket, manifests=announcement.manifests)

    def on_prompt(self, leg: Leg, stats: PromptStats) -> None:
        """From decode it says that all KV has come."""
        attempt = self.attempt
        if leg.phase is Phase.DECODE:
            attempt.kv_arrived_s = self._age()
            return
        attempt.num_cached_tokens, attempt.num_fetched_tokens = stats.num_cached_tokens, stats.num_fetched_tokens
        if not attempt.num_prior_tokens:  # else outputs may be among them
            self.record.num_cached_tokens = stats.num_cached_tokens
            self.record.num_fetched_tokens = stats.num_fetched_tokens
        self._around.placing.prefilled(self, stats)

    def on_first_output(self) -> None:
        attempt = self.attempt
        if attempt.first_token_s is None:
            attempt.first_token_s = self._age()
            if self.record.first_token_s is None:
                self.record.first_token_s = attempt.first_token_s

    def on_running(self, leg: Leg) -> None:
        self._running = leg
        if leg.phase is Phase.DECODE:
            self.attempt.decode_started_s = self._age()
            if self.record.decode_started_s is None:
                self.record.decode_started_s = self.attempt.decode_started_s
            self._let_prefill_go()
        elif self.attempt.num_cached_tokens is None:
            self._around.placing.prefilled(self, None)
        self._around.placing.decoding(self)
        self._set_clock("decode")

    def on_prefilled(self, outputs: tuple[FirstOutput, ...]) -> None:
        self._first_outputs = outputs
        if self.attempt.num_cached_tokens is None:
            self._around.placing.prefilled(self, None)
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
        if leg is self._decode and self._may_rebind():
            self._seek_decode(error)
        else:
            self._give_up(error)

    def on_refused(self, leg: Leg, finish: Finish) -> None:
        if leg is self._decode and isinstance(finish.error, Draining) and self._may_rebind():
            self._seek_decode(finish.error)
        else:
            self.on_finish_error(finish)

    @property
    def decode_is_full(self) -> bool:
        """Requests wait there for room, as far as its last report tells."""
        return self._decode is not None and self._decode.link.load.num_waiting > 0

    # ---- another decode worker, before anything was handed over ----

    @property
    def rebinding(self) -> bool:
        return self._held is not None

    def _may_rebind(self) -> bool:
        """Decode is bound by its first pull, and that comes after the first announcement."""
        return self._prefill is not None and not self._num_announced and self._num_rebound < self._around.max_retries

    def _seek_decode(self, error: PdserveError) -> None:
        self._failure = error
        self._num_rebound += 1
        if self._decode is not None:
            self._decode.forget()
        self._decode, self._held = None, []
        self._around.placing.decode_again(self)

    def rebind(self, decision: Decision[Link]) -> None:
        """Go on with this decode worker. Raises `WorkerLost`."""
        assert decision.decode is not None, "a decision for decode has a worker"
        leg = DecodeLeg(self, decision.decode)
        leg.submit(self._submitted)
        held, self._held, self._decode = self._held or (), None, leg
        self.attempt.rebound(decision)
        for announcement in held:
            leg.link.relay(leg.handle, ticket=announcement.ticket, manifests=announcement.manifests)
        if self._first_outputs:
            self.on_prefilled(self._first_outputs)

    # ---- a leg that failed ----

    def retry(self, error: PdserveError) -> None:
        """The workers that were decided could not take it."""
        if not self.done:
            self._give_up(error)

    def not_placed(self, error: PdserveError) -> None:
        """No worker takes it. Of one that had a worker before, what happened there tells more."""
        self.fail(self._failure if self._failure is not None and isinstance(error, NoWorker) else error)

    def _give_up(self, error: PdserveError) -> None:
        """Place it again if that can save it, else fail. One that has all its tokens needs neither."""
        self._end_if_complete()
        if self.done:
            return
        self._failure = error
        self._around.placing.failed(self, error)
        if not self._may_go_on() or len(self.record.attempts) > self._around.max_retries:
            self.fail(error)
            return
        self._close_attempt(error.reason)
        self._let_go(over=False)
        for choice in self.choices:
            choice.forget_early()
        self._set_clock("queue")
        self._around.placing.again(self)

    def _end_if_complete(self) -> None:
        leg = self._decode or self._prefill
        if leg is None:
            return
        try:
            leg.end_complete()
        except Exception as fault:  # noqa: BLE001 - others on the lost link are still to be told
            self.fail(EngineFailed(f"delivering the end failed: {type(fault).__name__}: {fault}", leg="router"))

    def _close_attempt(self, outcome: str) -> None:
        attempt = self.attempt
        attempt.outcome, attempt.ended_s = outcome, self._age()
        given = self.num_output_tokens - attempt.num_prior_tokens
        first = 2 if attempt.decode_started_s is not None else 1
        attempt.num_decoded_tokens = max(0, given // len(self.choices) - first)

    def _may_go_on(self) -> bool:
        """With one choice an engine goes on after any output; several can only start anew."""
        return self.request.params.n == 1 or not self._num_given()

    def _num_given(self) -> int:
        return self.num_output_tokens + sum(choice.ended for choice in self.choices)

    def _let_go(self, *, over: bool) -> None:
        """Free both workers. `over`: they have ended it by themselves, and are told nothing."""
        for leg in (self._prefill, self._decode):
            if leg is not None:
                leg.forget() if over else leg.cancel()
        self._prefill = self._decode = self._running = self._held = None
        self._first_outputs = ()

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
        if isinstance(error, Draining | WorkerLost | HandoverError):
            self._give_up(error)
        else:
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
        return self._around.clock() - self.arrived

    # ---- the end ----

    def _end(self, outcome: str, *, still_runs: bool = True) -> None:
        """Free both workers, once. `still_runs`: a worker may hold something of it yet (exported blocks, room that
        decode reserved, a choice under way). A request that ran to its end is only forgotten, at no message."""
        self.done = True
        self.deadline = FOREVER
        self._around.deadlines.ended()
        for choice in self.choices:
            choice.ended = True
        self._let_go(over=self._running is not None and not still_runs)
        record = self.record
        record.outcome = outcome
        record.finish_reasons = tuple([each.reason.name.lower() if each.reason else "" for each in self.choices])
        record.num_output_tokens = self.num_output_tokens
        record.ended_s = self._age()
        if record.attempts and not record.attempts[-1].outcome:
            self._close_attempt(outcome)
        self._around.placing.ended(self)
        self._around.on_end(self)
