"""The sinks: what the core says about a request becomes an answer, whole (`WholeReply`) or streamed (`StreamReply`).

One reply answers one HTTP request; it owns a sink and a handle for each prompt. The choices of prompt p are numbered
from p * n on. The first error ends the reply and cancels the prompts that still run.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from pdserve.errors import PdserveError
from pdserve.types import FinishReason, Logprobs
from router.base import Handle, Sink, Usage
from router.http.errors import error_body
from router.http.exchange import Exchange
from router.http.shapes import Piece, Shape

_encode = msgspec.json.Encoder().encode
_DONE = b"data: [DONE]\n\n"


class Reply(ABC):
    """What both kinds share: handles, the count of prompts that run, cancel and failure."""

    def __init__(self, exchange: Exchange, shape: Shape, num_prompts: int, n: int) -> None:
        self.exchange = exchange
        self.shape = shape
        self.n = n
        self.handles: list[Handle] = []
        self.ended = False
        self._num_running = num_prompts
        self._usage = Usage(0, 0, 0)

    @abstractmethod
    def sink(self, prompt: int) -> Sink: ...

    def attach(self, handle: Handle) -> None:
        self.handles.append(handle)

    def cancel(self) -> None:
        self.ended = True
        for handle in self.handles:
            handle.cancel()

    def fail(self, error: PdserveError, failed_prompt: int | None = None) -> None:
        """End with this error; the failed prompt itself needs no cancelling."""
        if self.ended:
            return
        self.ended = True
        for prompt, handle in enumerate(self.handles):
            if prompt != failed_prompt:
                handle.cancel()
        self._write_error(error)

    def prompt_done(self, usage: Usage) -> None:
        total = self._usage
        self._usage = Usage(
            total.prompt_tokens + usage.prompt_tokens,
            total.completion_tokens + usage.completion_tokens,
            total.cached_tokens + usage.cached_tokens,
        )
        self._num_running -= 1
        if self._num_running == 0 and not self.ended:
            self.ended = True
            self._write_end(self._usage)

    def _write_error(self, error: PdserveError) -> None:
        self.exchange.reply_error(error)

    @abstractmethod
    def _write_end(self, usage: Usage) -> None: ...


@dataclass(slots=True)
class _Gathered:
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[tuple[int, Logprobs]] = field(default_factory=list)
    finish: FinishReason | None = None
    stop: str | int | None = None

    def piece(self, index: int) -> Piece:
        return Piece(index, "".join(self.texts), self.logprobs, self.token_ids, self.finish, self.stop)


class WholeReply(Reply):
    """One JSON body at the end."""

    def __init__(self, exchange: Exchange, shape: Shape, num_prompts: int, n: int) -> None:
        super().__init__(exchange, shape, num_prompts, n)
        self.gathered = [_Gathered() for _ in range(num_prompts * n)]

    def sink(self, prompt: int) -> Sink:
        return _WholeSink(self, prompt)

    def _write_end(self, usage: Usage) -> None:
        pieces = [gathered.piece(index) for index, gathered in enumerate(self.gathered)]
        prompts = [handle.prompt_token_ids for handle in self.handles]
        self.exchange.reply(200, self.shape.whole(pieces, prompts, usage))


class _WholeSink:
    __slots__ = ("_choices", "_prompt", "_reply")

    def __init__(self, reply: WholeReply, prompt: int) -> None:
        self._reply = reply
        self._prompt = prompt
        self._choices = reply.gathered[prompt * reply.n : (prompt + 1) * reply.n]

    def on_tokens(self, choice: int, text: str, token_ids: Sequence[int], logprobs: Sequence[Logprobs]) -> None:
        gathered = self._choices[choice]
        gathered.texts.append(text)
        gathered.token_ids.extend(token_ids)
        if logprobs:
            gathered.logprobs.extend(zip(token_ids, logprobs, strict=False))

    def on_finish(self, choice: int, reason: FinishReason, stop: str | int | None) -> None:
        self._choices[choice].finish = reason
        self._choices[choice].stop = stop

    def on_done(self, usage: Usage) -> None:
        self._reply.prompt_done(usage)

    def on_error(self, error: PdserveError) -> None:
        self._reply.fail(error, self._prompt)


class StreamReply(Reply):
    """Server-sent events. Nothing is written before the first output, so that an error until then has its status."""

    def __init__(self, exchange: Exchange, shape: Shape, num_prompts: int, n: int) -> None:
        super().__init__(exchange, shape, num_prompts, n)
        self.write = exchange.wire.write
        self._frame = exchange.framing
        self.opened: set[int] = set()
        """Prompts whose first chunks are written or held."""
        self._held: list[bytes] = []

    def sink(self, prompt: int) -> Sink:
        return _StreamSink(self, prompt)

    def event(self, chunk: bytes) -> bytes:
        return self._frame(b"data: %b\n\n" % chunk)

    @property
    def holds(self) -> bool:
        return bool(self._held)

    def hold(self, data: bytes) -> None:
        """Write it at the end of this loop tick, together with what comes until then: an answer of one step leaves in
        one piece, and each write costs a system call."""
        if not self._held:
            asyncio.get_running_loop().call_soon(self._release)
        self._held.append(data)

    def _release(self) -> None:
        if self._held and not self.ended:
            self.write(self._take_held())

    def _take_held(self) -> bytes:
        data = b"".join(self._held)
        self._held.clear()
        return data

    def opening(self, prompt: int) -> bytes:
        """What goes before a prompt's first output: the head once, then the prompt's own first chunks."""
        head = b"" if self.exchange.streaming else self.exchange.open_stream()
        if prompt in self.opened:
            return head
        self.opened.add(prompt)
        indexes = range(prompt * self.n, (prompt + 1) * self.n)
        chunks = self.shape.opening(indexes, self.handles[prompt].prompt_token_ids)
        return head + b"".join(map(self.event, chunks))

    def _write_end(self, usage: Usage) -> None:
        events = [self._take_held()] if self.exchange.streaming else [self.exchange.open_stream()]
        if self.shape.envelope.with_usage:
            events.append(self.event(self.shape.usage_chunk(usage)))
        events.append(self._frame(_DONE))
        self.exchange.end_stream(b"".join(events))

    def _write_error(self, error: PdserveError) -> None:
        if self.exchange.streaming:
            self.exchange.break_stream(self._take_held() + self.event(error_body(error)))
        else:
            self.exchange.reply_error(error)


class _StreamSink:
    """One prompt's choices. Once opened, a chunk with nothing but text is its slot filled in, and one write."""

    __slots__ = ("_fast", "_offsets", "_prompt", "_reply", "_slots", "_write")

    def __init__(self, reply: StreamReply, prompt: int) -> None:
        self._reply = reply
        self._prompt = prompt
        self._fast = False
        self._write: Callable[[bytes], None] = reply.write
        self._slots: list[tuple[int, bytes, bytes]] = []
        self._offsets = [0] * reply.n

    def on_tokens(self, choice: int, text: str, token_ids: Sequence[int], logprobs: Sequence[Logprobs]) -> None:
        if not self._fast and not self._may_be_fast():
            self._on_tokens_in_full(choice, text, token_ids, logprobs)
        elif text:
            # hot path
            string = _encode(text)
            num_fixed, before, after = self._slots[choice]
            self._write(b"".join((b"%x" % (num_fixed + len(string)), before, string, after)))

    def _may_be_fast(self) -> bool:
        """Once the opening has left, and if nothing but text was asked for."""
        reply, envelope = self._reply, self._reply.shape.envelope
        plain = reply.exchange.persistent and not (envelope.with_logprobs or envelope.with_token_ids)
        if plain and not reply.holds and self._prompt in reply.opened:
            self._slots = [self._slot(choice) for choice in range(reply.n)]
            self._fast = True
        return self._fast

    def _on_tokens_in_full(
        self, choice: int, text: str, token_ids: Sequence[int], logprobs: Sequence[Logprobs]
    ) -> None:
        reply = self._reply
        envelope = reply.shape.envelope
        data = reply.opening(self._prompt)
        if text or logprobs or (token_ids and envelope.with_token_ids):
            piece = Piece(self._index(choice), text, list(zip(token_ids, logprobs, strict=False)), token_ids)
            piece.text_offset = self._offsets[choice]
            data += reply.event(reply.shape.chunk(piece))
        if logprobs:
            self._offsets[choice] += sum(len(envelope.token_text(token_id)[0]) for token_id in token_ids)
        if data:
            reply.hold(data)

    def _index(self, choice: int) -> int:
        return self._prompt * self._reply.n + choice

    def _slot(self, choice: int) -> tuple[int, bytes, bytes]:
        """How many bytes of the HTTP chunk are not text, and those around the text, framing included."""
        before, after = self._reply.shape.slot(self._index(choice))
        before, after = b"data: " + before, after + b"\n\n"
        return len(before) + len(after), b"\r\n" + before, after + b"\r\n"

    def on_finish(self, choice: int, reason: FinishReason, stop: str | int | None) -> None:
        opening = b"" if self._fast else self._reply.opening(self._prompt)
        piece = Piece(self._index(choice), finish=reason, stop=stop)
        self._reply.hold(opening + self._reply.event(self._reply.shape.chunk(piece)))

    def on_done(self, usage: Usage) -> None:
        self._reply.prompt_done(usage)

    def on_error(self, error: PdserveError) -> None:
        self._reply.fail(error, self._prompt)
