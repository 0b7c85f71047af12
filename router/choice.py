"""One choice of a request on its way to the client: token ids in, text out.

Both workers feed it, so it puts their tokens in order and drops what came twice; it turns ids into text, finds stop
strings, and tells the sink. Hot path: `Choice.take` runs once a token of every stream.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Protocol

from msgspec import Struct

from pdserve.ends import end_of
from pdserve.tokens import Detokenizer, StopMatcher
from pdserve.types import Finish, FinishReason, Logprobs, ModelInfo, SamplingParams
from router.base import Sink


class ChoiceOwner(Protocol):
    """The request that a choice belongs to."""

    def on_choice_end(self, choice: Choice, *, by_router: bool) -> None:
        """The sink knows already. `by_router`: a stop string matched, the worker has to be told."""
        ...

    def on_finish_error(self, finish: Finish) -> None: ...


class TextOptions(Struct, frozen=True):
    """How tokens become text."""

    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    min_tokens: int
    include_stop: bool

    @classmethod
    def of(cls, params: SamplingParams, include_stop: bool) -> TextOptions:
        return cls(params.stop, params.stop_token_ids, params.min_tokens, include_stop)


class Choice:
    """Implements `router.session.Lane`."""

    __slots__ = (
        "_detokenizer",
        "_early",
        "_keep",
        "_late_finish",
        "_options",
        "_owner",
        "_plain",
        "_push",
        "_sink",
        "_stops",
        "ended",
        "index",
        "num_tokens",
        "reason",
        "token_ids",
    )

    def __init__(
        self, index: int, detokenizer: Detokenizer, options: TextOptions, sink: Sink, owner: ChoiceOwner
    ) -> None:
        self.index = index
        self.num_tokens = 0
        self.ended = False
        self.reason: FinishReason | None = None
        self.token_ids = array("I")
        """All so far: another worker goes on behind them if this one's is lost."""
        self._keep = self.token_ids.append
        self._detokenizer = detokenizer
        self._push = detokenizer.push
        self._options = options
        self._stops = StopMatcher(options.stop) if options.stop else None
        self._plain = self._stops is None
        self._sink = sink
        self._owner = owner
        self._early: dict[int, tuple[Sequence[int], Sequence[Logprobs], Finish | None]] = {}
        self._late_finish: Finish | None = None

    def take(
        self, first_index: int, token_ids: Sequence[int], logprobs: Sequence[Logprobs], finish: Finish | None
    ) -> None:
        if finish is None and self._plain and first_index == self.num_tokens and len(token_ids) == 1:
            self.num_tokens = first_index + 1
            self._keep(token_ids[0])
            self._sink.on_tokens(self.index, self._push(token_ids[0]), token_ids, logprobs)
            return
        self._take_any(first_index, token_ids, logprobs, finish)

    def end(self, finish: Finish) -> None:
        if self.ended:
            return
        if finish.reason is FinishReason.ERROR:
            self._owner.on_finish_error(finish)
        elif self._early:
            self._late_finish = finish
        else:
            self._deliver((), (), finish)

    def end_if_complete(self, params: SamplingParams, model: ModelInfo, num_prompt_tokens: int) -> None:
        """Its worker is lost, but maybe not before the last token came."""
        if self.ended or not self.token_ids:
            return
        ended = end_of(params, model, self.token_ids[-1], self.num_tokens, num_prompt_tokens + self.num_tokens)
        if ended is not None:
            self.forget_early()
            self.end(Finish(0, ended[0], self.num_tokens, ended[1]))

    def forget_early(self) -> None:
        """Its worker is lost: the next one gives anew what did not follow yet, and maybe not the same."""
        self._early.clear()
        self._late_finish = None
        self._plain = self._stops is None and not self.ended

    def _take_any(
        self, first_index: int, token_ids: Sequence[int], logprobs: Sequence[Logprobs], finish: Finish | None
    ) -> None:
        if self.ended:
            return
        if finish is not None and finish.reason is FinishReason.ERROR:
            self._owner.on_finish_error(finish)
            return
        skip = self.num_tokens - first_index
        if skip < 0:
            self._early[first_index] = (token_ids, logprobs, finish)
            self._plain = False
            return
        fresh = token_ids[skip:]
        if fresh or finish is not None:
            self._deliver(fresh, logprobs[-len(fresh) :] if fresh else (), finish)
        if self._early and not self.ended:
            self._take_early()

    def _take_early(self) -> None:
        """What came too early, as far as it follows now."""
        first_index = min(self._early)
        if first_index <= self.num_tokens:
            self._take_any(first_index, *self._early.pop(first_index))
        self._plain = self._stops is None and not self._early and not self.ended
        if not self._early and self._late_finish is not None:
            self.end(self._late_finish)

    def _deliver(self, token_ids: Sequence[int], logprobs: Sequence[Logprobs], finish: Finish | None) -> None:
        text, stopped = self._text_of(token_ids, finish)
        if token_ids or text:
            self._sink.on_tokens(self.index, text, token_ids, logprobs)
        if self.ended:
            return
        if stopped:
            assert self._stops is not None
            self._close(FinishReason.STOP, self._stops.matched, by_router=finish is None)
        elif finish is not None:
            known = finish.stop_token_id in self._options.stop_token_ids
            self._close(finish.reason, finish.stop_token_id if known else None, by_router=False)

    def _text_of(self, token_ids: Sequence[int], finish: Finish | None) -> tuple[str, bool]:
        """The text that these tokens let out, and whether a stop string ended it. A stop token is no text."""
        shown = token_ids
        if (
            finish is not None
            and token_ids
            and token_ids[-1] == finish.stop_token_id
            and not self._options.include_stop
        ):
            shown = token_ids[:-1]
        self.num_tokens += len(token_ids)
        self.token_ids.extend(token_ids)
        text = self._detokenizer.push_all(shown)
        if finish is not None:
            text += self._detokenizer.flush()
        if self._stops is None or self.num_tokens <= self._options.min_tokens:
            return text, False
        text, stopped = self._stops.push(text)
        if stopped and self._options.include_stop:
            text += self._stops.matched or ""
        if finish is not None and not stopped:
            text += self._stops.flush()
        return text, stopped

    def _close(self, reason: FinishReason, stop: str | int | None, *, by_router: bool) -> None:
        self.ended = True
        self.reason = reason
        self._plain = False
        self._early.clear()
        self._sink.on_finish(self.index, reason, stop)
        self._owner.on_choice_end(self, by_router=by_router)
