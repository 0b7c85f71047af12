"""How output looks on the wire: chat or plain completion, whole or in chunks; no sockets, no order of events."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec
from msgspec import UNSET, Struct, UnsetType

from pdserve.types import FinishReason, Logprobs
from router.base import Usage
from router.http.responses import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    Delta,
    PromptTokensDetails,
    TextChoice,
    TextCompletion,
    TextLogprobs,
    TokenLogprob,
    TopLogprob,
    UsageBody,
)

TokenText = Callable[[int], tuple[str, bytes]]

MIN_LOGPROB = -9999.0
"""What OpenAI sends for minus infinity, which JSON cannot hold."""

_encode = msgspec.json.Encoder().encode
_SLOT = "\x00"
_SLOT_JSON = b'"\\u0000"'


class Piece(Struct):
    """New output of one choice: what one chunk tells. For a whole answer, all of it."""

    index: int
    text: str = ""
    logprobs: Sequence[tuple[int, Logprobs]] = ()
    """(sampled token id, its logprobs)."""
    token_ids: Sequence[int] = ()
    finish: FinishReason | None = None
    stop: str | int | None = None
    text_offset: int = 0
    """Characters of the tokens before."""


class Envelope(Struct, frozen=True):
    """What every chunk of one answer repeats, and what was asked to be in it."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    token_text: TokenText
    with_logprobs: bool = False
    with_token_ids: bool = False
    with_usage: bool = False


class Shape(Protocol):
    """One endpoint's form of output."""

    envelope: Envelope

    def opening(self, indexes: Sequence[int], prompt_token_ids: Sequence[int]) -> list[bytes]:
        """Chunks that go before any output."""
        ...

    def chunk(self, piece: Piece) -> bytes: ...

    def usage_chunk(self, usage: Usage) -> bytes: ...

    def whole(self, pieces: Sequence[Piece], prompts: Sequence[Sequence[int]], usage: Usage) -> bytes:
        """The body of an answer that is not streamed; `prompts` holds each prompt's token ids."""
        ...

    def slot(self, index: int) -> tuple[bytes, bytes]:
        """A chunk of this choice that has nothing but text, cut at the text: what goes before the JSON string and
        what goes after it."""
        ...


def finish_name(reason: FinishReason) -> str:
    return reason.name.lower()


class ChatShape:
    """/v1/chat/completions."""

    def __init__(self, envelope: Envelope) -> None:
        self.envelope = envelope
        self._frame: tuple[bytes, bytes] | None = None

    def opening(self, indexes: Sequence[int], prompt_token_ids: Sequence[int]) -> list[bytes]:
        if not self.envelope.with_token_ids:
            return [self._around(b'{"index":%d,%b}' % (index, _OPENING)) for index in indexes]
        chunks = []
        for position, index in enumerate(indexes):
            choice = ChatChunkChoice(index=index, delta=Delta(role="assistant", content=""))
            body = self._chunk_body([choice])
            if self.envelope.with_token_ids and position == 0:
                body.prompt_token_ids = list(prompt_token_ids)
            chunks.append(_encode(body))
        return chunks

    def _around(self, choice: bytes) -> bytes:
        """A chunk of one choice that is JSON already. What is around it is the same in all chunks of an answer."""
        if self._frame is None:
            before, after = _encode(self._chunk_body([])).rsplit(b"[]", 1)
            self._frame = before + b"[", b"]" + after
        return self._frame[0] + choice + self._frame[1]

    def chunk(self, piece: Piece) -> bytes:
        ended = piece.finish is not None
        if not piece.logprobs and not self.envelope.with_token_ids:
            if not ended:
                return self._around(
                    b'{"index":%d,"delta":{"content":%b},%b}' % (piece.index, _encode(piece.text), _OPEN)
                )
            if piece.stop is None and piece.finish is not None:
                return self._around(b'{"index":%d,%b}' % (piece.index, _ENDS[piece.finish]))
        choice = ChatChunkChoice(
            index=piece.index,
            delta=Delta() if ended else Delta(content=piece.text),
            logprobs=self._logprobs(piece) if piece.logprobs else None,
            finish_reason=finish_name(piece.finish) if piece.finish is not None else None,
            stop_reason=piece.stop if ended else UNSET,
            token_ids=_token_ids(self.envelope, piece),
        )
        return _encode(self._chunk_body([choice]))

    def usage_chunk(self, usage: Usage) -> bytes:
        body = self._chunk_body([])
        body.usage = usage_body(usage)
        return _encode(body)

    def slot(self, index: int) -> tuple[bytes, bytes]:
        return _cut(self.chunk(Piece(index, _SLOT)))

    def whole(self, pieces: Sequence[Piece], prompts: Sequence[Sequence[int]], usage: Usage) -> bytes:
        envelope = self.envelope
        return _encode(
            ChatCompletion(
                id=envelope.id,
                created=envelope.created,
                model=envelope.model,
                system_fingerprint=envelope.system_fingerprint,
                choices=[self._choice(piece) for piece in pieces],
                usage=usage_body(usage),
                prompt_token_ids=list(prompts[0]) if envelope.with_token_ids else UNSET,
            )
        )

    def _choice(self, piece: Piece) -> ChatChoice:
        return ChatChoice(
            index=piece.index,
            message=AssistantMessage(content=piece.text),
            logprobs=self._logprobs(piece) if self.envelope.with_logprobs else None,
            finish_reason=finish_name(piece.finish) if piece.finish is not None else "",
            stop_reason=piece.stop,
            token_ids=_token_ids(self.envelope, piece),
        )

    def _logprobs(self, piece: Piece) -> ChatLogprobs:
        return ChatLogprobs(content=[_token_logprob(*one, self.envelope.token_text) for one in piece.logprobs])

    def _chunk_body(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        envelope = self.envelope
        return ChatChunk(
            id=envelope.id,
            created=envelope.created,
            model=envelope.model,
            system_fingerprint=envelope.system_fingerprint,
            choices=choices,
            usage=None if envelope.with_usage else UNSET,
        )


_OPEN = b'"logprobs":null,"finish_reason":null'
_OPENING = b'"delta":{"role":"assistant","content":""},' + _OPEN
_ENDS = {
    reason: b'"delta":{},"logprobs":null,"finish_reason":"%b","stop_reason":null' % finish_name(reason).encode()
    for reason in FinishReason
}
"""What most chunks' only choice holds, as `ChatChunkChoice` is encoded."""


class TextShape:
    """/v1/completions."""

    def __init__(self, envelope: Envelope) -> None:
        self.envelope = envelope

    def opening(self, indexes: Sequence[int], prompt_token_ids: Sequence[int]) -> list[bytes]:
        if not self.envelope.with_token_ids:
            return []
        prompt = list(prompt_token_ids)
        choices = [TextChoice(index=index, text="", token_ids=[], prompt_token_ids=prompt) for index in indexes]
        return [_encode(self._body([choice])) for choice in choices]

    def chunk(self, piece: Piece) -> bytes:
        return _encode(self._body([self._choice(piece, logprobs=bool(piece.logprobs))]))

    def usage_chunk(self, usage: Usage) -> bytes:
        body = self._body([])
        body.usage = usage_body(usage)
        return _encode(body)

    def slot(self, index: int) -> tuple[bytes, bytes]:
        return _cut(self.chunk(Piece(index, _SLOT)))

    def whole(self, pieces: Sequence[Piece], prompts: Sequence[Sequence[int]], usage: Usage) -> bytes:
        choices = [self._choice(piece, logprobs=self.envelope.with_logprobs) for piece in pieces]
        if self.envelope.with_token_ids:
            choices_each = len(choices) // len(prompts)
            for position, choice in enumerate(choices):
                choice.prompt_token_ids = list(prompts[position // choices_each])
        body = self._body(choices)
        body.usage = usage_body(usage)
        return _encode(body)

    def _choice(self, piece: Piece, *, logprobs: bool) -> TextChoice:
        return TextChoice(
            index=piece.index,
            text=piece.text,
            logprobs=_text_logprobs(piece, self.envelope.token_text) if logprobs else None,
            finish_reason=finish_name(piece.finish) if piece.finish is not None else None,
            stop_reason=piece.stop if piece.finish is not None else UNSET,
            token_ids=_token_ids(self.envelope, piece),
        )

    def _body(self, choices: list[TextChoice]) -> TextCompletion:
        envelope = self.envelope
        return TextCompletion(
            id=envelope.id,
            created=envelope.created,
            model=envelope.model,
            system_fingerprint=envelope.system_fingerprint,
            choices=choices,
            usage=None if envelope.with_usage else UNSET,
        )


def usage_body(usage: Usage) -> UsageBody:
    return UsageBody(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=usage.cached_tokens),
    )


def _cut(chunk: bytes) -> tuple[bytes, bytes]:
    """At the last slot: nothing that a client chose comes after the text."""
    before, after = chunk.rsplit(_SLOT_JSON, 1)
    return before, after


def _token_ids(envelope: Envelope, piece: Piece) -> list[int] | UnsetType:
    return list(piece.token_ids) if envelope.with_token_ids else UNSET


def token_name(text: str, raw: bytes) -> str:
    """A token's text, or for part of a character its bytes, as OpenAI's completions name them."""
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw) if "\ufffd" in text else text


def _finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)


def _token_logprob(token_id: int, one: Logprobs, token_text: TokenText) -> TokenLogprob:
    text, raw = token_text(token_id)
    return TokenLogprob(
        token=text,
        logprob=_finite(one.logprob),
        bytes=list(raw),
        top_logprobs=[
            _top_logprob(*token_text(top_id), logprob)
            for top_id, logprob in zip(one.top_ids, one.top_logprobs, strict=True)
        ],
    )


def _top_logprob(text: str, raw: bytes, logprob: float) -> TopLogprob:
    return TopLogprob(token=text, logprob=_finite(logprob), bytes=list(raw))


def _text_logprobs(piece: Piece, token_text: TokenText) -> TextLogprobs:
    body = TextLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    offset = piece.text_offset
    for token_id, one in piece.logprobs:
        text, raw = token_text(token_id)
        name = token_name(text, raw)
        body.tokens.append(name)
        body.token_logprobs.append(_finite(one.logprob))
        body.top_logprobs.append(_top_by_name(one, token_text) | {name: _finite(one.logprob)})
        body.text_offset.append(offset)
        offset += len(text)
    return body


def _top_by_name(one: Logprobs, token_text: TokenText) -> dict[str, float]:
    pairs = zip(one.top_ids, one.top_logprobs, strict=True)
    return {token_name(*token_text(top_id)): _finite(logprob) for top_id, logprob in pairs}
