"""The decoder: token rows in, logits out. One class for Llama, Qwen2, Qwen3 and Mistral.

It works on *tiles* of rows. For speed a step is one tile; for `deterministic` it is many of one fixed size. Within a
layer tiles run in order, each after writing its K and V, so a later tile of a sequence sees the earlier ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pdserve.engine.torch.attention import Attention
from pdserve.engine.torch.layers import LayerWeights, Linear, mlp, rms_norm
from pdserve.engine.torch.paged_kv import PagedKV
from pdserve.engine.torch.rope import RopeTable, rotate_
from pdserve.engine.torch.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Weights:
    """All of a model. `head` maps a hidden row to logits; with tied embeddings it is made of `embedding`."""

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor
    head: Linear


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows to compute: `token_ids` and `positions` [N] (int64); `write_index` says where the K and V of the first
    rows go (`PagedKV.write_index`); rows beyond are padding."""

    token_ids: Tensor
    positions: Tensor
    write_index: Tensor
    attention: Attention


class Decoder:
    def __init__(self, shape: ModelShape, weights: Weights, rope: RopeTable) -> None:
        self.shape = shape
        self.weights = weights
        self.rope = rope

    def forward(self, tiles: Sequence[Tile], kv: PagedKV) -> list[Tensor]:
        """Hidden rows of each tile after the last layer. Writes the rows' K and V to the pool."""
        hidden = [self.weights.embedding.index_select(0, tile.token_ids) for tile in tiles]
        turns = [self.rope.at(tile.positions) for tile in tiles]
        for index, weights in enumerate(self.weights.layers):
            for i, tile in enumerate(tiles):
                rows = hidden[i]
                rows = rows + self._attention(index, weights, rows, tile, turns[i], kv)
                hidden[i] = rows + mlp(rms_norm(rows, weights.mlp_norm, self.shape.rms_norm_eps), weights)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, vocab_size] float32 for hidden rows [N, hidden_size]."""
        return self.weights.head(rms_norm(hidden, self.weights.final_norm, self.shape.rms_norm_eps)).float()

    def _attention(
        self, index: int, weights: LayerWeights, rows: Tensor, tile: Tile, turn: tuple[Tensor, Tensor], kv: PagedKV
    ) -> Tensor:
        shape = self.shape
        projected = weights.qkv(rms_norm(rows, weights.attn_norm, shape.rms_norm_eps))
        heads = projected.view(len(rows), -1, shape.head_dim)
        if weights.q_norm is not None and weights.k_norm is not None:
            self._norm_heads_(heads, weights.q_norm, weights.k_norm)
        rotate_(heads[:, : shape.num_heads + shape.num_kv_heads], *turn)
        written = heads[: len(tile.write_index) // (2 * shape.num_kv_heads), shape.num_heads :]
        kv.rows(index).index_copy_(0, tile.write_index, written.reshape(-1, shape.head_dim))
        return weights.out(tile.attention.attend(kv, index, heads[:, : shape.num_heads]))

    def _norm_heads_(self, heads: Tensor, q_norm: Tensor, k_norm: Tensor) -> None:
        """Qwen3: each head of q and of k by itself."""
        first_k, first_v = self.shape.num_heads, self.shape.num_heads + self.shape.num_kv_heads
        queries, keys = heads[:, :first_k], heads[:, first_k:first_v]
        queries.copy_(rms_norm(queries, q_norm, self.shape.rms_norm_eps))
        keys.copy_(rms_norm(keys, k_norm, self.shape.rms_norm_eps))
