"""The sim engine's model runner: writes made-up KV, and draws each token from all the KV it finds.

Nothing is remembered between steps but what lies in the blocks. A step reads the KV of every token of every sequence
anew through its block table, so a wrong, stale, missing or swapped block gives a wrong token at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pdserve.engine.core.runner import Sampled, Scheduled, Sequence
from pdserve.engine.sim_kv import KV_BYTES, WORDS, Words, chain, digest, initial_state, kv_terms, kv_words
from pdserve.engine.sim_sampling import Vocabulary, logprobs, sample
from pdserve.errors import NotSupported
from pdserve.types import KVLayout, ModelInfo


def sim_layout(model: ModelInfo, block_tokens: int) -> KVLayout:
    """16 bytes a token: one layer, one head, K and V of one 64-bit word each."""
    return KVLayout(
        model_revision=model.revision,
        dtype="sim",
        block_tokens=block_tokens,
        num_layers=1,
        num_kv_heads=1,
        head_dim=1,
        block_bytes=block_tokens * KV_BYTES,
        order="token,kv",
    )


class SimRunner:
    """A `pdserve.engine.core.runner.ModelRunner`. With `host_memory` off it behaves like a device engine: the pool is
    its own, and hand-over goes through staging."""

    def __init__(
        self, model: ModelInfo, vocabulary: Vocabulary, block_tokens: int, model_seed: int, host_memory: bool
    ) -> None:
        self._model = model
        self._layout = sim_layout(model, block_tokens)
        self._vocabulary = vocabulary
        self._block_tokens = block_tokens
        self._host_memory = host_memory
        self._initial_state = lru_cache(maxsize=256)(lambda lora: initial_state(model_seed, lora))
        self._blocks: NDArray[np.uint8] = np.zeros((0, self._layout.block_bytes), dtype=np.uint8)
        self._slots: Words = self._blocks.view(np.uint64).reshape(-1, WORDS)
        """The same memory, one row a token."""

    @property
    def model(self) -> ModelInfo:
        return self._model

    @property
    def layout(self) -> KVLayout:
        return self._layout

    @property
    def pool_is_host_memory(self) -> bool:
        return self._host_memory

    def allocate(self, num_blocks: int, host_blocks: NDArray[np.uint8] | None) -> None:
        shape = (num_blocks, self._layout.block_bytes)
        self._blocks = np.zeros(shape, dtype=np.uint8) if host_blocks is None else host_blocks
        self._slots = self._blocks.view(np.uint64).reshape(-1, WORDS)

    def open(self, seq: Sequence) -> None:
        """Raises `NotSupported` for a grammar: made-up logits know no text to constrain."""
        if seq.request.params.grammar is not None:
            raise NotSupported("the sim engine does not support response_format or guided output", param="grammar")

    def drop(self, seq: Sequence) -> None:
        """Sequences leave no state here."""

    def run(self, batch: Seq[Scheduled]) -> list[Sampled]:
        """Hot path: 256 decodes at 1,000 tokens of context cost about 4 ms."""
        decodes = [item for item in batch if item.num_tokens == 1 and item.start]
        if decodes:
            self._write_decodes(decodes)
        for item in batch:
            if item.num_tokens > 1 or not item.start:
                self._write_chunk(item)
        return [sampled for item in batch if item.choices for sampled in self._sample(item)]

    def copy_blocks(self, sources: Seq[int], targets: Seq[int]) -> None:
        self._blocks[list(targets)] = self._blocks[list(sources)]

    def stage_out(self, pool_blocks: Seq[int], staging: NDArray[np.uint8], staging_blocks: Seq[int]) -> None:
        staging[list(staging_blocks)] = self._blocks[list(pool_blocks)]

    def stage_in(self, staging: NDArray[np.uint8], staging_blocks: Seq[int], pool_blocks: Seq[int]) -> None:
        self._blocks[list(pool_blocks)] = staging[list(staging_blocks)]

    def close(self) -> None:
        self.allocate(0, None)

    def _slot(self, seq: Sequence, position: int) -> int:
        return seq.block_table[position // self._block_tokens] * self._block_tokens + position % self._block_tokens

    def _write_chunk(self, item: Scheduled) -> None:
        seq, start, end = item.seq, item.start, item.start + item.num_tokens
        state = int(self._slots[self._slot(seq, start - 1), 0]) if start else self._initial_state(seq.request.lora)
        positions = np.arange(start, end)
        table = np.array(seq.block_table)
        slots = table[positions // self._block_tokens] * self._block_tokens + positions % self._block_tokens
        self._slots[slots] = chain(state, start, seq.token_ids[start:end])

    def _write_decodes(self, items: Seq[Scheduled]) -> None:
        """One token each, all at once."""
        before = np.array([self._slot(item.seq, item.start - 1) for item in items])
        slots = np.array([self._slot(item.seq, item.start) for item in items])
        token_ids = np.array([item.seq.token_ids[item.start] for item in items], dtype=np.uint64)
        positions = np.array([item.start for item in items], dtype=np.uint64)
        states = self._slots[before, 0] + kv_terms(token_ids, positions)
        self._slots[slots] = kv_words(states, positions)

    def _sample(self, item: Scheduled) -> Iterator[Sampled]:
        found = self._digest(item.seq, item.start + item.num_tokens)
        for choice in item.choices:
            params = choice.request.params
            token = sample(self._vocabulary, found, params, choice.choice, choice.token_ids, choice.num_prompt_tokens)
            if params.logprobs is None:
                yield Sampled(token)
            else:
                index = choice.num_output_tokens
                yield Sampled(token, logprobs(self._vocabulary, found, token, params.logprobs, choice.handle, index))

    def _digest(self, seq: Sequence, num_tokens: int) -> int:
        """Over the KV of the first `num_tokens` tokens, as it lies in the blocks now."""
        num_blocks = -(-num_tokens // self._block_tokens)
        blocks = self._blocks[seq.block_table[:num_blocks]]
        return digest(blocks.reshape(-1)[: num_tokens * KV_BYTES])
