"""Encoding a prompt piece by piece, so that what was encoded before is not encoded again.

A tokenizer first cuts a text at its special tokens, and encodes each piece by itself. A chat prompt is cut at every
turn: system prompt and earlier turns come back with each request, to the letter. `SegmentEncoder` makes the same cuts
and remembers the pieces. It is exact or it is not used: `segment_encoder` gives None for a tokenizer whose pieces
depend on their place (a prefix space at the start, tokens that swallow neighbouring blanks).
"""

from __future__ import annotations

import json
import os
import re
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import tokenizers

from pdserve.chat_skeleton import MAX_SKELETONS, Place, Skeleton
from pdserve.words import leaves_parts, word_encoder

MAX_CHARS = 8 << 20
"""Of remembered text. With its ids about 5 bytes a character in English: 40 MB at most."""
_PLAIN_PARTS = frozenset({"Digits", "Split"})


_Program = list["array[int] | tuple[str | Place, ...]"]
"""A skeleton's steps: ids that are always the same, or parts of a text that has to be encoded."""


class SegmentEncoder:
    """Thread-confined: the router's loop owns it."""

    def __init__(self, backend: tokenizers.Tokenizer, special: dict[str, int], max_chars: int = MAX_CHARS) -> None:
        self._special = special
        self._cut = _cutter(special)
        words = word_encoder(backend)
        self._whole = _whole(backend)
        self._by_words = self._whole if words is None else words.encode
        self._normalizer = backend.normalizer
        self._may_hold_special = re.compile(f"[{re.escape(''.join(sorted({token[0] for token in special})))}]").search
        self.separate = _are_separate(special)
        """Special tokens never overlap, so what stands between two of them is cut the same by itself."""
        self._programs: dict[Skeleton, _Program] = {}
        self._known: OrderedDict[str, array[int]] = OrderedDict()
        self._max_chars = max_chars
        self.num_chars = 0

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without BOS and the like. Raises as the tokenizer does for text with no UTF-8 form."""
        ids: list[int] = []
        for position, piece in enumerate(self._cut(text)):
            if position & 1:
                ids.append(self._special[piece])
            elif piece:
                ids.extend(self._piece(piece))
        return ids

    def encode_chat(self, skeleton: Skeleton, contents: Sequence[str]) -> array[int]:
        """The same as `encode(skeleton.text(contents))`, for special tokens that are `separate`: what the template
        writes itself is encoded once, and a turn that came before costs a look-up."""
        ids = array("I")
        for step in self._programs.get(skeleton) or self._compile(skeleton):
            if isinstance(step, array):
                ids.extend(step)
            else:
                ids.extend(self._between([part if isinstance(part, str) else part.text(contents) for part in step]))
        return ids

    def _between(self, parts: list[str]) -> Sequence[int]:
        """The ids of a text that stands between two special tokens, or at an end."""
        text = "".join(parts)
        ids = self._known.get(text)
        if ids is not None:
            self._known.move_to_end(text)
            return ids
        if self._may_hold_special(text):
            return self.encode(text)
        return self._piece(text) if text else ()

    def _compile(self, skeleton: Skeleton) -> _Program:
        if len(self._programs) >= MAX_SKELETONS:
            self._programs.clear()
        program: _Program = []
        between: list[str | Place] = []
        for part in skeleton.parts:
            if isinstance(part, Place):
                between.append(part)
                continue
            for position, piece in enumerate(self._cut(part)):
                if position & 1:
                    self._close(program, between)
                    between = []
                    program.append(array("I", [self._special[piece]]))
                elif piece:
                    between.append(piece)
        self._close(program, between)
        self._programs[skeleton] = program = _joined(program)
        return program

    def _close(self, program: _Program, between: list[str | Place]) -> None:
        """What the template alone has written here is encoded now."""
        if any(isinstance(part, Place) for part in between):
            program.append(tuple(between))
        elif between:
            program.append(array("I", self._between([str(part) for part in between])))

    def _piece(self, piece: str) -> array[int]:
        ids = self._known.get(piece)
        if ids is not None:
            self._known.move_to_end(piece)
            return ids
        ids = array("I", self._by_words(piece) if self._is_normal(piece) else self._whole(piece))
        if len(piece) <= self._max_chars:
            self._known[piece] = ids
            self.num_chars += len(piece)
            while self.num_chars > self._max_chars:
                self.num_chars -= len(self._known.popitem(last=False)[0])
        return ids

    def _is_normal(self, piece: str) -> bool:
        """The tokenizer encodes the text as it is, hence any part of it as well."""
        return self._normalizer is None or piece.isascii() or self._normalizer.normalize_str(piece) == piece


def _are_separate(special: Iterable[str]) -> bool:
    """No special token lies in another, nor ends as one begins."""
    tokens = list(special)
    for a in tokens:
        for b in tokens:
            if (a != b and a in b) or any(a.endswith(b[:size]) for size in range(1, len(b))):
                return False
    return True


def _joined(program: _Program) -> _Program:
    """With runs of fixed ids as one."""
    joined: _Program = []
    for step in program:
        last = joined[-1] if joined else None
        if isinstance(step, array) and isinstance(last, array):
            last.extend(step)
        else:
            joined.append(step)
    return joined


def _cutter(special: dict[str, int]) -> Callable[[str], list[str]]:
    """Splits at special tokens, the longest that fits, and keeps them. What all begin with goes first in the pattern:
    the search then skips to it (ten times faster for a long text)."""
    shared = os.path.commonprefix(list(special))  # noqa: RUF071 - of strings, character by character
    rest = sorted((token[len(shared) :] for token in special), key=len, reverse=True)
    return re.compile(f"({re.escape(shared)}(?:{'|'.join(map(re.escape, rest))}))").split


def _whole(backend: tokenizers.Tokenizer) -> Callable[[str], list[int]]:
    return lambda text: backend.encode(text, add_special_tokens=False).ids


def segment_encoder(backend: tokenizers.Tokenizer) -> SegmentEncoder | None:
    """None when cutting at special tokens would not be exact for this tokenizer."""
    tokens = backend.get_added_tokens_decoder()
    movable = any(t.single_word or t.lstrip or t.rstrip or t.normalized for t in tokens.values())
    if not tokens or movable or not leaves_parts(backend.normalizer) or backend.pre_tokenizer is None:
        return None
    if not _is_local(json.loads(backend.pre_tokenizer.__getstate__())):
        return None
    return SegmentEncoder(backend, {token.content: token_id for token_id, token in tokens.items()})


def _is_local(pre_tokenizer: dict[str, Any]) -> bool:
    """Whether a piece is cut alike wherever it stands, by the pre-tokenizer's own description."""
    kind = pre_tokenizer["type"]
    if kind == "Sequence":
        return all(_is_local(part) for part in pre_tokenizer["pretokenizers"])
    return kind in _PLAIN_PARTS or (kind == "ByteLevel" and not pre_tokenizer["add_prefix_space"])
