"""Encoding text word by word, from memory: natural text repeats its words, and a look-up costs a tenth of encoding.

A word-splitting tokenizer never joins what stands before a space and the space itself, so a text may be cut before any
space that follows a letter, a digit or a printable sign, and each chunk encoded by itself. That holds for the
pre-tokenizers named in `_SPLITS`, by their patterns: none of them looks back, none takes a space but as the first
character of a token or within a run of blanks, and none looks further ahead than one character after blanks. It is
exact or it is not used: `word_encoder` gives None for any other tokenizer.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import tokenizers

MAX_WORDS = 1 << 16
"""Remembered in each of two generations: about 200 bytes each, 26 MB at most."""
MAX_CHUNK_CHARS = 64
"""Longer ones are mostly random (encoded data, links) and not worth remembering."""
CALL_CHARS = 16
"""What a call of the tokenizer costs (6 µs), as characters of text."""
_TAIL = r"|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_HEAD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_SPLITS = frozenset(
    {
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2
        _HEAD + _TAIL % "{1,3}",  # Llama 3, and many since
        _HEAD + _TAIL % "",  # Qwen 2
    }
)
_digits_apart = re.compile(r"[0-9]|[^0-9]+").findall

Ids = Sequence[int]


class WordEncoder:
    """Thread-confined, as its owner is."""

    def __init__(self, backend: tokenizers.Tokenizer, *, single_digits: bool, max_words: int = MAX_WORDS) -> None:
        self._backend = backend
        self._single_digits = single_digits
        self._max_words = max_words
        self._words: dict[str, Ids] = {}
        """Ids of " " + word, by the word: only words after which another may be cut off."""
        self._chunks: dict[str, Ids] = {}
        """Ids of any other chunk, by all of its text."""
        self._old_words: dict[str, Ids] = {}
        self._old_chunks: dict[str, Ids] = {}

    @property
    def num_words(self) -> int:
        """Remembered now, in both generations."""
        return len(self._words) + len(self._chunks) + len(self._old_words) + len(self._old_chunks)

    def encode(self, text: str) -> list[int]:
        """Hot path: 0.1 µs a word that is known. Raises as the tokenizer does for text with no UTF-8 form."""
        words = text.split(" ")
        found = list(map(self._words.get, words))
        found[0] = self._chunks.get(words[0]) if _ends_safely(words[0]) else None
        if None not in found:
            return list(chain.from_iterable(found))  # type: ignore[arg-type]
        return self._encode_partly_new(text, words, found)

    def _encode_partly_new(self, text: str, words: list[str], found: list[Ids | None]) -> list[int]:
        """What is new by itself, or if that is much of the text, all of it anew. Only where something is missing in
        `found` it is looked at word by word."""
        fresh: list[tuple[int, int, str]] = []
        num_fresh_chars = 0
        for start, end in _gaps(words, found):
            chunk = _joined(words, start, end)
            ids = self._old_words.get(words[start]) if _is_word(words, start, end) else self._known_chunk(chunk)
            if ids is None:
                fresh.append((start, end, chunk))
                num_fresh_chars += len(chunk) + CALL_CHARS
            else:
                self._remember(words, start, end, ids)
            found[start:end] = [ids or ()] + [()] * (end - start - 1)
        if 2 * num_fresh_chars > len(text) and len(fresh) > 1:
            return self._learn(text, words)
        for start, end, chunk in fresh:
            ids = found[start] = self._ids_by_digits(chunk)
            self._remember(words, start, end, ids)
        return list(chain.from_iterable(found))  # type: ignore[arg-type]

    def _learn(self, text: str, words: list[str]) -> list[int]:
        """Encode the whole, and remember what each chunk became: a token ends where its characters do."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        ids: list[int] = encoding.ids
        token_ends = [end for _, end in encoding.offsets]
        start = position = first = 0
        while start < len(words):
            end = _chunk_end(words, start)
            position += sum(map(len, words[start:end])) + end - start - (start == 0)
            last = bisect_right(token_ends, position, first)
            self._remember(words, start, end, tuple(ids[first:last]))
            start, first = end, last
        return ids

    def _remember(self, words: list[str], start: int, end: int, ids: Ids) -> None:
        if _is_word(words, start, end):
            if len(words[start]) <= MAX_CHUNK_CHARS:
                self._words[words[start]] = ids
        elif len(text := _joined(words, start, end)) <= MAX_CHUNK_CHARS:
            self._chunks[text] = ids
        if len(self._words) + len(self._chunks) > self._max_words:
            self._forget_older()

    def _forget_older(self) -> None:
        self._old_words, self._words = self._words, {}
        self._old_chunks, self._chunks = self._chunks, {}

    def _known_chunk(self, text: str) -> Ids | None:
        ids = self._chunks.get(text)
        return self._old_chunks.get(text) if ids is None else ids

    def _ids_by_digits(self, text: str) -> Ids:
        """Where every digit is a token of its own, what stands between digits is known more often than the whole."""
        if not self._single_digits or len(text) > MAX_CHUNK_CHARS:
            return self._ids_of(text)
        parts = _digits_apart(text)
        if len(parts) == 1:
            return self._ids_of(text)
        found = list(map(self._chunks.get, parts))
        if None in found:
            found = list(map(self._part, parts))
        return tuple(chain.from_iterable(found))  # type: ignore[arg-type]

    def _part(self, text: str) -> Ids:
        """A digit, or what stands between two."""
        ids = self._known_chunk(text)
        if ids is None:
            ids = self._chunks[text] = self._ids_of(text)
        return ids

    def _ids_of(self, text: str) -> Ids:
        return tuple(self._backend.encode(text, add_special_tokens=False).ids)


def _gaps(words: list[str], found: list[Ids | None]) -> Iterator[tuple[int, int]]:
    """(start, end) of each chunk that begins where nothing was found. Whoever takes one fills its gap."""
    start = 0
    while True:
        try:
            start = found.index(None, start)
        except ValueError:
            return
        end = _chunk_end(words, start)
        yield start, end
        start = end


def _chunk_end(words: list[str], start: int) -> int:
    """Behind the first word from `start` on that ends safely, or behind the last."""
    end = start + 1
    while end < len(words) and not _ends_safely(words[end - 1]):
        end += 1
    return end


def _is_word(words: list[str], start: int, end: int) -> bool:
    """Whether the chunk is a space and one word that ends safely."""
    return start > 0 and end == start + 1 and _ends_safely(words[start])


def _joined(words: list[str], start: int, end: int) -> str:
    text = " ".join(words[start:end])
    return f" {text}" if start else text


def _ends_safely(word: str) -> bool:
    """Whether a cut after it is exact: its last character is certainly no blank, in any edition of Unicode."""
    last = word[-1:]
    return "!" <= last <= "~" or last.isalnum()


def leaves_parts(normalizer: tokenizers.normalizers.Normalizer | None) -> bool:
    """Whether a text that it leaves as it is has no part that it would change: so it is with NFC (Unicode TR 15)."""
    return normalizer is None or isinstance(normalizer, tokenizers.normalizers.NFC)


def word_encoder(backend: tokenizers.Tokenizer) -> WordEncoder | None:
    """For texts that the tokenizer's normalizer leaves as they are. None when cutting before spaces would not be exact
    for this tokenizer."""
    if not leaves_parts(backend.normalizer) or backend.pre_tokenizer is None or backend.truncation or backend.padding:
        return None
    if not isinstance(backend.model, tokenizers.models.BPE) or backend.model.dropout:
        return None
    parts = _parts(json.loads(backend.pre_tokenizer.__getstate__()))
    if not all(map(_is_known, parts)) or not any(map(_cuts_at_spaces, parts)):
        return None
    # Digits must be set apart first: else the blanks before one would have been cut with it in view.
    if backend.post_processor is not None:  # it may move the ends of tokens
        backend = tokenizers.Tokenizer.from_str(backend.to_str())
        backend.post_processor = None
    return WordEncoder(backend, single_digits=bool(parts[0].get("individual_digits")))


def _parts(pre_tokenizer: dict[str, Any]) -> list[dict[str, Any]]:
    if pre_tokenizer["type"] != "Sequence":
        return [pre_tokenizer]
    return [part for each in pre_tokenizer["pretokenizers"] for part in _parts(each)]


def _is_known(part: dict[str, Any]) -> bool:
    if part["type"] == "Split":
        regex = part["pattern"].get("Regex")
        return regex in _SPLITS and part["behavior"] == "Isolated" and not part["invert"]
    return part["type"] == "Digits" or (part["type"] == "ByteLevel" and not part["add_prefix_space"])


def _cuts_at_spaces(part: dict[str, Any]) -> bool:
    return part["type"] == "Split" or (part["type"] == "ByteLevel" and bool(part["use_regex"]))
