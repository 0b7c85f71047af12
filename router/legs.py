"""The legs of a request: what one worker does for it.

A pair is one `PrefillLeg` and one `DecodeLeg`, submitted at once; `FullLeg` is a request that one worker does alone.
A leg owns its handle on a link and keeps the link's accounting straight; `router.request` decides what its news mean.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

from pdserve.errors import WorkerLost
from pdserve.types import Finish, FinishReason, Logprobs, Phase, PromptStats, Request
from pdserve.wire.session import Announcement, FirstOutput
from router.choice import Choice
from router.session import Lane, Link

EXPECTED_OUTPUT_TOKENS = 256
"""Context that a choice is counted with beside its prompt, when `max_tokens` allows that much: clients seldom say how
much they will really get, so a larger bound tells least-loaded placement nothing."""


class LegOwner(Protocol):
    """The request."""

    choices: list[Choice]

    def on_first_output(self) -> None:
        """Prefill (or a worker alone) gave the first token of some choice."""
        ...

    def on_prefilled(self, outputs: tuple[FirstOutput, ...]) -> None:
        """Prefill has given every choice its first token."""
        ...

    def on_announced(self, announcement: Announcement) -> None: ...

    def on_prompt(self, leg: Leg, stats: PromptStats) -> None:
        """The prompt is computed; from a decode leg: its KV has come."""
        ...

    def on_running(self, leg: Leg) -> None:
        """The leg that goes on to the end has made its first token: whatever KV it needed is there."""
        ...

    def on_refused(self, leg: Leg, finish: Finish) -> None:
        """The worker that was to go on ended it with an error, before its first token."""
        ...

    def on_leg_lost(self, leg: Leg, error: WorkerLost) -> None: ...


class Leg(ABC):
    """Base: implements `router.session.LegEvents` but for `lane`."""

    name = "decode"
    phase = Phase.FULL

    def __init__(self, owner: LegOwner, link: Link) -> None:
        self.owner = owner
        self.link = link
        self.handle = 0
        self._request: Request | None = None
        self._num_seqs = 0
        self._num_prefill_tokens = 0
        self._num_context_tokens = 0
        self._open = False

    def submit(self, request: Request, prefix_store: str = "") -> None:
        """Raises `WorkerLost` when the worker's stream has just ended."""
        self.handle = self.link.submit(request, self.phase, self, prefix_store)
        self._open = True
        self._request = request
        self._count(request)
        own = self.link.own
        own.num_seqs += self._num_seqs
        own.num_prefill_tokens += self._num_prefill_tokens
        own.num_context_tokens += self._num_context_tokens

    def _count(self, request: Request) -> None:
        prompt, params = len(request.prompt_token_ids), request.params
        self._num_seqs = 1 if self.phase is Phase.PREFILL else params.n
        if self.phase is not Phase.DECODE:
            self._num_prefill_tokens = prompt
        if self.phase is not Phase.PREFILL:
            self._num_context_tokens = prompt + params.n * min(params.max_tokens or 0, EXPECTED_OUTPUT_TOKENS)

    def computed(self) -> None:
        """The prompt is through: it no longer counts as prefill work."""
        self.link.own.num_prefill_tokens -= self._num_prefill_tokens
        self._num_prefill_tokens = 0
        if self.phase is Phase.PREFILL:
            self._leave_batch()

    def end_complete(self) -> None:
        """Its worker is lost. A choice that has its last token has ended all the same: placed again, it might get one
        more."""
        if (request := self._request) is not None:
            for choice in self.owner.choices:
                choice.end_if_complete(request.params, self.link.info.model, len(request.prompt_token_ids))

    def _leave_batch(self) -> None:
        self.link.own.num_seqs -= self._num_seqs
        self._num_seqs = 0

    def cancel(self) -> None:
        """Have the worker free everything. Idempotent."""
        if self._open:
            self.link.cancel(self.handle)
            self._close()

    def forget(self) -> None:
        """The worker has ended it by itself. Idempotent."""
        if self._open:
            self.link.forget(self.handle)
            self._close()

    def _close(self) -> None:
        self._open = False
        self.computed()
        self._leave_batch()
        self.link.own.num_context_tokens -= self._num_context_tokens

    @abstractmethod
    def lane(self, choice: int) -> Lane: ...

    def on_prompt(self, stats: PromptStats) -> None:
        self.owner.on_prompt(self, stats)

    def on_announcement(self, announcement: Announcement) -> None:
        self.owner.on_announced(announcement)

    def on_lost(self, error: WorkerLost) -> None:
        if self._open:
            self._close()
            self.owner.on_leg_lost(self, error)


class PrefillLeg(Leg):
    name = "prefill"
    phase = Phase.PREFILL

    def __init__(self, owner: LegOwner, link: Link) -> None:
        super().__init__(owner, link)
        self._outputs: dict[int, FirstOutput] = {}

    def lane(self, choice: int) -> Lane:
        return _FirstLane(self, self.owner.choices[choice])

    def gave(self, choice: Choice, token_ids: Sequence[int]) -> None:
        """A choice has its first token (or has ended without one)."""
        if choice.index in self._outputs or not self._open:
            return
        self._outputs[choice.index] = FirstOutput(tuple(token_ids), choice.ended)
        if len(self._outputs) == len(self.owner.choices):
            self.computed()
            self.owner.on_prefilled(tuple(self._outputs[index] for index in range(len(self._outputs))))


class _FirstLane:
    """Gives prefill's token to the client and keeps it for decode."""

    __slots__ = ("_choice", "_leg")

    def __init__(self, leg: PrefillLeg, choice: Choice) -> None:
        self._leg = leg
        self._choice = choice

    def take(
        self, first_index: int, token_ids: Sequence[int], logprobs: Sequence[Logprobs], finish: Finish | None
    ) -> None:
        self._leg.owner.on_first_output()
        self._choice.take(first_index, token_ids, logprobs, finish)
        self._leg.gave(self._choice, token_ids)

    def end(self, finish: Finish) -> None:
        self._choice.end(finish)
        self._leg.gave(self._choice, ())


class FullLeg(Leg):
    """Everything on one worker. `name` is the leg that errors are charged to."""

    def __init__(self, owner: LegOwner, link: Link, name: str) -> None:
        super().__init__(owner, link)
        self.name = name

    def lane(self, choice: int) -> Lane:
        return _StartLane(self, choice)

    def started(self) -> None:
        """From now on tokens go straight to the choices."""
        for choice in self.owner.choices:
            self.link.set_lane(self.handle + choice.index, choice)
        self.computed()
        self.owner.on_first_output()
        self.owner.on_running(self)


class DecodeLeg(FullLeg):
    phase = Phase.DECODE

    def __init__(self, owner: LegOwner, link: Link) -> None:
        super().__init__(owner, link, "decode")


class _StartLane:
    """Sees the first token of a leg, then steps aside: all others cost one call less."""

    __slots__ = ("_choice", "_leg")

    def __init__(self, leg: FullLeg, choice: int) -> None:
        self._leg = leg
        self._choice = leg.owner.choices[choice]

    def take(
        self, first_index: int, token_ids: Sequence[int], logprobs: Sequence[Logprobs], finish: Finish | None
    ) -> None:
        self._leg.started()
        self._choice.take(first_index, token_ids, logprobs, finish)

    def end(self, finish: Finish) -> None:
        if finish.reason is FinishReason.ERROR:
            self._leg.owner.on_refused(self._leg, finish)
        else:
            self._choice.end(finish)
