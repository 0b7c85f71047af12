"""Tokens to text as they arrive, and stop strings in that text.

The router does this for every token of every stream, so the usual token costs one look-up in a table; only tokens
that are part of a character (or bytes that are no UTF-8 at all) take the longer way. What comes out, joined, is
exactly `tokenizer.decode(all tokens)`.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Protocol

import tokenizers
from tokenizers import decoders


def _byte_of_char() -> dict[str, int]:
    """GPT-2's map of bytes to printable characters (`bytes_to_unicode` in its encoder.py), turned round."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()


def _bytes_of_token(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF_CHAR[char] for char in token])
    except KeyError:
        return token.encode()


def _text_or_none(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


class TokenTable:
    """Every token's bytes and text. `byte_level` says whether a text is its tokens' bytes, joined: true for GPT-2-like
    tokenizers (SmolLM2, Llama 3, Qwen); others (SentencePiece) are decoded by the tokenizer itself.

    `texts[id]` is what the token adds to the output when no bytes are pending, None where its bytes are no text by
    themselves; special tokens add nothing, unless `skip_special_tokens` is off.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self.tokenizer = tokenizer
        self.skip_special_tokens = skip_special_tokens
        self.byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
        added = tokenizer.get_added_tokens_decoder()
        size = tokenizer.get_vocab_size(with_added_tokens=True)
        tokens = [token or "" for token in map(tokenizer.id_to_token, range(max(size, max(added, default=-1) + 1)))]
        self.bytes = self._all_bytes(tokens)
        self.shown_bytes = list(self.bytes)
        for token_id, token in added.items():
            if token.special and skip_special_tokens:
                self.shown_bytes[token_id] = b""
        self.texts = [_text_or_none(data) for data in self.shown_bytes]

    def _all_bytes(self, tokens: list[str]) -> list[bytes]:
        if self.byte_level:
            return [_bytes_of_token(token) for token in tokens]
        return [_byte_fallback(token) for token in tokens]

    def token_bytes(self, token_id: int) -> bytes:
        """The token's bytes, special tokens' names included; empty for an id outside the vocabulary."""
        return self.bytes[token_id] if token_id < len(self.bytes) else b""

    def token_text(self, token_id: int) -> str:
        """The same as text; U+FFFD where the bytes are no text by themselves. For logprobs."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def detokenizer(self) -> Detokenizer:
        """A fresh one, for one choice."""
        return (
            ByteLevelDetokenizer(self)
            if self.byte_level
            else WindowDetokenizer(self.tokenizer, self.skip_special_tokens)
        )


def _byte_fallback(token: str) -> bytes:
    """SentencePiece: "▁" is a space, "<0x0A>" a byte."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


class Detokenizer(Protocol):
    """Turns one choice's tokens into text as they come."""

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        ...

    def push_all(self, token_ids: Iterable[int]) -> str:
        """The same for several."""
        ...

    def flush(self) -> str:
        """What is left at the end: U+FFFD for bytes that never became a character."""
        ...


class ByteLevelDetokenizer:
    """For byte-level vocabularies. Hot path: 0.1 µs a token while no bytes are pending."""

    __slots__ = ("_bytes", "_pending", "_texts")

    def __init__(self, table: TokenTable) -> None:
        self._texts = table.texts
        self._bytes = table.shown_bytes
        self._pending = b""

    def push(self, token_id: int) -> str:
        if not self._pending and token_id < len(self._texts):
            text = self._texts[token_id]
            if text is not None:
                return text
        return self._push_bytes(token_id)

    def push_all(self, token_ids: Iterable[int]) -> str:
        return "".join(map(self.push, token_ids))

    def _push_bytes(self, token_id: int) -> str:
        if token_id >= len(self._bytes):
            return ""
        data = self._pending + self._bytes[token_id]
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._pending = data[used:]
        return text

    def flush(self) -> str:
        text = self._pending.decode("utf-8", "replace")
        self._pending = b""
        return text


_MAX_UNSHOWN = 16
"""A character is at most 4 byte tokens. More that make no text are shown as they are, so the window stays small."""


class WindowDetokenizer:
    """For all other vocabularies: decodes the last few tokens again with each new one, and shows what it adds.

    The window starts with tokens shown already, so that rules about a text's start (a space that is stripped) don't
    apply in its middle. About 3 µs a token. (The library's own `DecodeStream` raises on bytes that are no UTF-8.)
    Where such bytes follow a character in one run of byte tokens, `decode` replaces that character too; here it
    has been shown and stays.
    """

    __slots__ = ("_num_shown", "_shown", "_skip_special_tokens", "_token_ids", "_tokenizer")

    def __init__(self, tokenizer: tokenizers.Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._token_ids: list[int] = []
        self._num_shown = 0
        """Tokens at the window's start that are shown."""
        self._shown = ""
        """The window's text as far as it is shown."""

    def push(self, token_id: int) -> str:
        self._token_ids.append(token_id)
        text = self._decode()
        incomplete = text.endswith("\ufffd") and len(self._token_ids) - self._num_shown < _MAX_UNSHOWN
        return "" if incomplete or len(text) <= len(self._shown) else self._show(text)

    def push_all(self, token_ids: Iterable[int]) -> str:
        return "".join(map(self.push, token_ids))

    def flush(self) -> str:
        return self._show(self._decode())

    def _show(self, text: str) -> str:
        added = text[len(self._shown) :]
        if added:
            del self._token_ids[: self._num_shown]
            self._num_shown = len(self._token_ids)
            self._shown = self._decode()
        return added

    def _decode(self) -> str:
        text: str = self._tokenizer.decode(self._token_ids, skip_special_tokens=self._skip_special_tokens)
        return text


class StopMatcher:
    """Finds the first stop string in a stream of text, and holds back only text that may be the start of one.

    The first is the one that is complete first; of several that end at one place, the longest. So the result does not
    depend on how the text was cut. Only streams with stop strings pay for it.
    """

    __slots__ = ("_firsts", "_held", "_stops", "matched")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._firsts = frozenset(stop[0] for stop in stops)
        self._held = ""
        self.matched: str | None = None
        """The stop string that was found."""

    def push(self, text: str) -> tuple[str, bool]:
        """(text to emit, whether a stop string was found). After a stop nothing more is emitted.

        Hot path: 0.3 µs for text that holds no stop string's first character.
        """
        if self.matched is not None:
            return "", True
        if not self._held and self._firsts.isdisjoint(text):
            return text, False
        return self._match(self._held + text)

    def _match(self, text: str) -> tuple[str, bool]:
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            end, start = min(found)
            self.matched, self._held = text[start:end], ""
            return text[:start], True
        cut = min(_held_from(text, stop) for stop in self._stops)
        self._held = text[cut:]
        return text[:cut], False

    def flush(self) -> str:
        """The held-back text, when the stream ends without a stop."""
        text, self._held = self._held, ""
        return text


def _held_from(text: str, stop: str) -> int:
    """The earliest place from which `text` is a proper start of `stop`; the text's length if there is none."""
    start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while start >= 0:
        if stop.startswith(text[start:]):
            return start
        start = text.find(stop[0], start + 1)
    return len(text)
