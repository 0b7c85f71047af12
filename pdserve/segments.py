"""Encoding a prompt piece by piece, so that what was encoded before is not encoded again.

A tokenizer first cuts a text at its special tokens, and encodes each piece by itself. A chat prompt is cut at every
turn: system prompt and earlier turns come back with each request, to the letter. `SegmentEncoder` makes the same cuts
and remembers the pieces. It is exact or it is not used: `segment_encoder` gives None for a tokenizer whose pieces
depend on their place (a prefix space at the start, tokens that swallow neighbouring blanks).
"""

from __future__ import annotations

import json
import re
from array import array
from collections import OrderedDict
from typing import Any

import tokenizers

MAX_CHARS = 8 << 20
"""Of remembered text. With its ids about 5 bytes a character in English: 40 MB at most."""
_PLAIN_PARTS = frozenset({"Digits", "Split"})


class SegmentEncoder:
    """Thread-confined: the router's loop owns it."""

    def __init__(self, backend: tokenizers.Tokenizer, special: dict[str, int], max_chars: int = MAX_CHARS) -> None:
        self._backend = backend
        self._special = special
        longest_first = sorted(special, key=len, reverse=True)
        self._cut = re.compile("(" + "|".join(re.escape(token) for token in longest_first) + ")").split
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

    def _piece(self, piece: str) -> array[int]:
        ids = self._known.get(piece)
        if ids is not None:
            self._known.move_to_end(piece)
            return ids
        ids = array("I", self._backend.encode(piece, add_special_tokens=False).ids)
        if len(piece) <= self._max_chars:
            self._known[piece] = ids
            self.num_chars += len(piece)
            while self.num_chars > self._max_chars:
                self.num_chars -= len(self._known.popitem(last=False)[0])
        return ids


def segment_encoder(backend: tokenizers.Tokenizer) -> SegmentEncoder | None:
    """None when cutting at special tokens would not be exact for this tokenizer."""
    tokens = backend.get_added_tokens_decoder()
    movable = any(t.single_word or t.lstrip or t.rstrip or t.normalized for t in tokens.values())
    if not tokens or movable or backend.normalizer is not None or backend.pre_tokenizer is None:
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
