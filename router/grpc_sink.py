"""The sink of the gRPC faces: gathers what comes until the call takes it, within a bound.

Sinks are plain calls, gRPC handlers are coroutines; between the two lies one batch per call. A slow client makes the
batch larger, not longer: tokens of a choice are joined. Beyond the bound the request is cancelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from pdserve.errors import Overloaded, PdserveError
from pdserve.types import FinishReason, Logprobs
from router.base import Handle, Usage

BYTES_PER_LOGPROB = 200
BYTES_PER_TOKEN = 8


@dataclass(slots=True)
class Delta:
    """What one choice has got since the last batch."""

    index: int
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[tuple[int, Logprobs]] = field(default_factory=list)
    """With the token that each belongs to."""
    finish: FinishReason | None = None
    stop: str | int | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)


@dataclass(slots=True)
class Batch:
    """Deltas by choice; `usage` with the last batch."""

    deltas: dict[int, Delta] = field(default_factory=dict)
    usage: Usage | None = None


class BatchSink:
    """Implements `router.base.Sink`. Set `handle` to what `Core.submit` returned. `max_bytes` None: no bound, for
    answers that are sent whole (`max_tokens` bounds them)."""

    def __init__(self, max_bytes: int | None) -> None:
        self.handle: Handle | None = None
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._batch = Batch()
        self._error: PdserveError | None = None
        self._over = False
        self._news = asyncio.Event()

    def on_tokens(self, choice: int, text: str, token_ids: Sequence[int], logprobs: Sequence[Logprobs]) -> None:
        delta = self._delta(choice)
        delta.texts.append(text)
        delta.token_ids.extend(token_ids)
        delta.logprobs.extend(zip(token_ids, logprobs, strict=False))
        self._num_bytes += len(text) + BYTES_PER_TOKEN * len(token_ids) + BYTES_PER_LOGPROB * len(logprobs)
        if self._max_bytes is not None and self._num_bytes > self._max_bytes:
            self._cut_off()
        self._news.set()

    def on_finish(self, choice: int, reason: FinishReason, stop: str | int | None) -> None:
        delta = self._delta(choice)
        delta.finish, delta.stop = reason, stop
        self._news.set()

    def on_done(self, usage: Usage) -> None:
        self._batch.usage = usage
        self._over = True
        self._news.set()

    def on_error(self, error: PdserveError) -> None:
        self._error = error
        self._over = True
        self._news.set()

    async def next(self) -> Batch | None:
        """What has come since the last call, once there is something; None after the end. What came before an error
        is given before the error is raised."""
        while not (self._batch.deltas or self._batch.usage or self._over):
            self._news.clear()
            await self._news.wait()
        batch, self._batch = self._batch, Batch()
        self._num_bytes = 0
        if batch.deltas or batch.usage:
            return batch
        if self._error is not None:
            raise self._error
        return None

    async def rest(self) -> Batch:
        """Everything, once it is complete."""
        while not self._over:
            self._news.clear()
            await self._news.wait()
        if self._error is not None:
            raise self._error
        return self._batch

    def _delta(self, choice: int) -> Delta:
        return self._batch.deltas.setdefault(choice, Delta(choice))

    def _cut_off(self) -> None:
        self.on_error(
            Overloaded(f"the client reads too slowly: over {self._max_bytes} bytes wait for it", work_done=True)
        )
        if self.handle is not None:
            self.handle.cancel()
