"""`ModelRunner` over a real model: plan, forward, sample.

Requests that ask for `deterministic` (or all of them, if the runner is told so) are computed in tiles of fixed size,
the others of the same step in one go; see `attention.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pdserve.engine.core.runner import Sampled, Scheduled, Sequence
from pdserve.engine.torch import sampling
from pdserve.engine.torch.attention import ROW_TILE
from pdserve.engine.torch.model import Decoder
from pdserve.engine.torch.paged_kv import KVShape, PagedKV
from pdserve.engine.torch.plan import Plan, clear_fresh_blocks, fast_plan, tiled_plan
from pdserve.errors import EngineFailed, PdserveError
from pdserve.types import KVLayout, ModelInfo

if TYPE_CHECKING:
    from pdserve.engine.torch.grammar import ChoiceGrammar, GrammarCompiler

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class _Row:
    """One token to draw: `row` of the logits, for `seq`."""

    row: int
    seq: Sequence


class TorchRunner:
    """One model on one device. `vocabulary` is asked for once, when the first grammar comes."""

    def __init__(
        self,
        decoder: Decoder,
        model: ModelInfo,
        dtype: str,
        block_tokens: int,
        vocabulary: Callable[[], Seq[bytes]],
        *,
        deterministic: bool = False,
    ) -> None:
        self.decoder = decoder
        self._model = model
        self._device = decoder.weights.embedding.device
        self._kv_shape = KVShape.of(decoder.shape, block_tokens, DTYPES[dtype])
        self._layout = _layout(model, dtype, self._kv_shape, deterministic=deterministic)
        self._vocabulary = vocabulary
        self._deterministic = deterministic
        self._kv: PagedKV | None = None
        self._compiler: GrammarCompiler | None = None
        self._grammars: dict[Sequence, ChoiceGrammar] = {}

    @property
    def model(self) -> ModelInfo:
        return self._model

    @property
    def layout(self) -> KVLayout:
        return self._layout

    @property
    def pool_is_host_memory(self) -> bool:
        return bool(self._device.type == "cpu")

    @property
    def kv(self) -> PagedKV:
        if self._kv is None:
            raise RuntimeError("allocate() comes before the first step")
        return self._kv

    # --- life of the pool ---

    def allocate(self, num_blocks: int, host_blocks: NDArray[np.uint8] | None) -> None:
        self._kv = PagedKV(self._kv_shape, num_blocks, host_blocks, self._device)

    def copy_blocks(self, sources: Seq[int], targets: Seq[int]) -> None:
        self.kv.copy_blocks(sources, targets)

    def stage_out(self, pool_blocks: Seq[int], staging: NDArray[np.uint8], staging_blocks: Seq[int]) -> None:
        staging[list(staging_blocks)] = self.kv.read_blocks(pool_blocks)

    def stage_in(self, staging: NDArray[np.uint8], staging_blocks: Seq[int], pool_blocks: Seq[int]) -> None:
        self.kv.write_blocks(pool_blocks, staging[list(staging_blocks)])

    def close(self) -> None:
        self._kv = None
        self._grammars.clear()

    # --- life of a sequence ---

    def open(self, seq: Sequence) -> None:
        if seq.request.params.grammar is not None:
            self._grammar(seq).read(seq.token_ids[seq.num_prompt_tokens :])

    def drop(self, seq: Sequence) -> None:
        self._grammars.pop(seq, None)

    def _grammar(self, seq: Sequence) -> ChoiceGrammar:
        found = self._grammars.get(seq)
        if found is None:
            grammar = seq.request.params.grammar
            assert grammar is not None
            found = self._grammars[seq] = self._grammar_compiler().matcher(grammar)
        return found

    def _grammar_compiler(self) -> GrammarCompiler:
        """Made, and xgrammar imported (half a second), for the first grammar."""
        if self._compiler is None:
            from pdserve.engine.torch.grammar import GrammarCompiler

            model = self._model
            self._compiler = GrammarCompiler(self._vocabulary(), model.vocab_size, model.eos_token_ids)
        return self._compiler

    # --- a step ---

    def run(self, batch: Seq[Scheduled]) -> list[Sampled]:
        with torch.inference_mode():
            return self._run(batch)

    def _run(self, batch: Seq[Scheduled]) -> list[Sampled]:
        clear_fresh_blocks(self.kv, batch)
        tiled = [self._deterministic or item.seq.request.deterministic for item in batch]
        sampled: dict[int, list[Sampled]] = {}
        for wanted, make_plan, pick in ((True, tiled_plan, self._tiled_logits), (False, fast_plan, self._fast_logits)):
            indexes = [i for i, is_tiled in enumerate(tiled) if is_tiled is wanted]
            if indexes:
                items = [batch[i] for i in indexes]
                found = self._run_part(items, make_plan(self.kv, items), pick)
                sampled |= dict(zip(indexes, found, strict=True))
        return [token for i in range(len(batch)) for token in sampled[i]]

    def _run_part(
        self, batch: Seq[Scheduled], plan: Plan, logits_of: Callable[[list[Tensor], Seq[int]], Tensor]
    ) -> list[list[Sampled]]:
        """Tokens of each item's choices."""
        hidden = self.decoder.forward(plan.tiles, self.kv)
        ending = [i for i, item in enumerate(batch) if item.choices]
        if not ending:
            return [[] for _ in batch]
        logits = logits_of(hidden, [plan.last_rows[i] for i in ending]).cpu().numpy()
        rows = [_Row(row, seq) for row, i in enumerate(ending) for seq in batch[i].choices]
        tokens = iter(self._sample(logits, rows))
        return [[next(tokens) for _ in item.choices] for item in batch]

    def _fast_logits(self, hidden: list[Tensor], last_rows: Seq[int]) -> Tensor:
        index = torch.tensor(last_rows, dtype=torch.int64).to(self._device)
        return self.decoder.logits(hidden[0].index_select(0, index))

    def _tiled_logits(self, hidden: list[Tensor], last_rows: Seq[int]) -> Tensor:
        """Rows padded to whole tiles, so that the last product has its fixed shape too."""
        wanted = [hidden[row // ROW_TILE][row % ROW_TILE] for row in last_rows]
        wanted += [wanted[-1]] * (-len(wanted) % ROW_TILE)
        tiles = [self.decoder.logits(tile) for tile in torch.stack(wanted).split(ROW_TILE)]
        return torch.cat(tiles)[: len(last_rows)]

    # --- sampling ---

    def _sample(self, logits: NDArray[np.float32], rows: Seq[_Row]) -> list[Sampled]:
        if all(sampling.is_plain_greedy(row.seq.request.params) for row in rows):
            found = sampling.sample_plain_greedy(logits)
            return [found[row.row] for row in rows]
        return [self._sample_row(logits[row.row], row.seq) for row in rows]

    def _sample_row(self, logits: NDArray[np.float32], seq: Sequence) -> Sampled:
        params = seq.request.params
        try:
            adjusted = self._adjusted(logits, seq)
        except PdserveError as error:
            return Sampled(0, error=error)
        if not np.isfinite(adjusted.max()):
            return Sampled(0, error=EngineFailed("no token has a finite logit", leg="decode"))
        token_id = sampling.choose(adjusted, params, seq.choice, seq.num_output_tokens)
        logprobs = None if params.logprobs is None else sampling.logprobs_of(logits, token_id, seq)
        return Sampled(token_id, logprobs)

    def _adjusted(self, logits: NDArray[np.float32], seq: Sequence) -> NDArray[np.float32]:
        """A grammar outranks min_tokens: when only EOS may follow, EOS follows."""
        adjusted = logits.copy()
        sampling.adjust(adjusted, seq, self._model.eos_token_ids)
        if seq.request.params.grammar is None:
            return adjusted
        grammar = self._grammar(seq)
        grammar.read(seq.token_ids[seq.num_prompt_tokens :])
        allowed = grammar.allowed()
        if not np.isfinite(adjusted[allowed]).any():
            adjusted = logits.copy()
        adjusted[~allowed] = -np.inf
        return adjusted


def _layout(model: ModelInfo, dtype: str, shape: KVShape, *, deterministic: bool) -> KVLayout:
    return KVLayout(
        model_revision=model.revision,
        dtype=dtype,
        block_tokens=shape.block_tokens,
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        block_bytes=shape.block_bytes,
        deterministic=deterministic,
    )
