"""Output that must match a JSON schema or a regex: xgrammar's token masks over the model's own vocabulary.

One `GrammarCompiler` per engine compiles (and remembers a bounded number of) grammars; each constrained choice owns a
`ChoiceGrammar`, which reads the outputs that it has not seen yet before every mask. So it is right after a migration
or a preemption without being told.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import xgrammar
from numpy.typing import NDArray

from pdserve.errors import InvalidRequest
from pdserve.types import Grammar, GrammarKind

_MAX_COMPILED = 64
"""Grammars kept per engine. One takes up to some megabytes for a large schema; clients repeat a few."""

_SOURCE_PLACE = re.compile(r"^\[[\d:]+\] \S+:\d+: ")
"""What xgrammar puts before its messages: time, file and line of its own source."""


class GrammarCompiler:
    """`vocabulary[id]`: the bytes that token `id` adds to the text, empty for special tokens, which a grammar then
    never lets through (but EOS, at its end)."""

    def __init__(self, vocabulary: Sequence[bytes], vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        info = xgrammar.TokenizerInfo(
            [*vocabulary, *[b""] * (vocab_size - len(vocabulary))],
            xgrammar.VocabType.RAW,
            vocab_size=vocab_size,
            stop_token_ids=list(eos_token_ids),
        )
        self._vocab_size = vocab_size
        self._eos = np.array(eos_token_ids, dtype=np.int64)
        self._backend = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        self._compiled: OrderedDict[Grammar, Any] = OrderedDict()

    def matcher(self, grammar: Grammar) -> ChoiceGrammar:
        """A fresh matcher at the grammar's start. Raises `InvalidRequest` (param "response_format") when the grammar
        doesn't compile."""
        compiled = self._compiled.get(grammar)
        if compiled is None:
            compiled = self._compiled[grammar] = self._compile(grammar)
            if len(self._compiled) > _MAX_COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return ChoiceGrammar(compiled, self._vocab_size, self._eos)

    def _compile(self, grammar: Grammar) -> Any:
        try:
            if grammar.kind is GrammarKind.JSON_OBJECT:
                return self._backend.compile_json_schema('{"type": "object"}', strict_mode=False)
            if grammar.kind is GrammarKind.JSON_SCHEMA:
                return self._backend.compile_json_schema(grammar.source)
            return self._backend.compile_regex(grammar.source)
        except (RuntimeError, ValueError, TypeError) as error:
            reason = _SOURCE_PLACE.sub("", str(error).strip())
            raise InvalidRequest(f"the grammar does not compile: {reason}", param="response_format") from error


class ChoiceGrammar:
    """Where one choice stands in its grammar."""

    def __init__(self, compiled: Any, vocab_size: int, eos: NDArray[np.int64]) -> None:
        self._matcher = xgrammar.GrammarMatcher(compiled)
        self._bitmask = xgrammar.allocate_token_bitmask(1, vocab_size)
        self._vocab_size = vocab_size
        self._eos = eos
        self._num_read = 0

    def read(self, outputs: Sequence[int]) -> None:
        """Catch up with the choice's outputs so far. Raises `InvalidRequest` when they break the grammar."""
        for token_id in outputs[self._num_read :]:
            if not self._matcher.is_terminated() and not self._matcher.accept_token(token_id):
                raise InvalidRequest(
                    f"output {self._num_read} (token {token_id}) does not match the grammar", param="response_format"
                )
            self._num_read += 1

    def allowed(self) -> NDArray[np.bool_]:
        """[vocab_size]; EOS alone once the grammar is complete and nothing may follow."""
        if self._matcher.is_terminated():
            only = np.zeros(self._vocab_size, dtype=np.bool_)
            only[self._eos] = True
            return only
        self._matcher.fill_next_token_bitmask(self._bitmask)
        bits = self._bitmask.numpy().view(np.uint8)
        return np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(np.bool_)
