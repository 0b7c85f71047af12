"""Attention over paged KV, planned once a step and run once a layer.

Two plans, both `attend(kv, layer, queries)`:

- `BatchedAttention` for speed. Single-token rows (decodes) are grouped by context length, with the query heads that
  share a KV head as rows of one product, so nothing is expanded. Prompt chunks run one sequence at a time.
- `TiledAttention` for `deterministic`: tiles of fixed size, each sequence alone, so a row's bits don't depend on
  what else is in the batch or on how the prompt was cut.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pdserve.engine.torch.paged_kv import PagedKV

_GATHER_BYTES = 1 << 20
"""K gathered at a time, about: it is read again at once, from the L2 cache (1 to 2 MiB on today's server cores)."""
_PADDING = 1.25
"""Sequences share a group while the longest has at most so many times the blocks of the shortest, and 4 more."""
_MASKED = float("-inf")


@dataclass(frozen=True, slots=True)
class Span:
    """One sequence's rows in a step: rows [row, row + num_rows) hold its tokens from `start` on; `blocks` cover
    them and all before."""

    row: int
    num_rows: int
    start: int
    blocks: Sequence[int]

    @property
    def context(self) -> int:
        """Tokens that the last row sees, itself included."""
        return self.start + self.num_rows


class Attention(Protocol):
    """Writes nothing; the rows' own K and V are in the pool already."""

    def attend(self, kv: PagedKV, layer: int, queries: Tensor) -> Tensor:
        """`queries` [N, heads, head_dim] -> [N, heads * head_dim]."""
        ...


# --- fast ---


class BatchedAttention:
    """Rows of `decodes` (one each, contexts in falling order) come first, then those of `chunks`."""

    def __init__(self, kv: PagedKV, decodes: Sequence[Span], chunks: Sequence[Span]) -> None:
        make = _HostDecodes if kv.device.type == "cpu" else _DeviceDecodes
        self._parts: list[Attention] = [make(kv, group) for group in _groups(kv, decodes)]
        self._parts += [_Chunk(kv, span) for span in chunks]

    def attend(self, kv: PagedKV, layer: int, queries: Tensor) -> Tensor:
        outputs = [part.attend(kv, layer, queries) for part in self._parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _groups(kv: PagedKV, decodes: Sequence[Span]) -> list[list[Span]]:
    """Neighbours of about the same length: a group is padded to its first's, the longest."""
    groups: list[list[Span]] = []
    for span in decodes:
        longest = _num_blocks(kv, groups[-1][0]) if groups else 0
        if groups and longest <= _PADDING * _num_blocks(kv, span) + 4:
            groups[-1].append(span)
        else:
            groups.append([span])
    return groups


def _num_blocks(kv: PagedKV, span: Span) -> int:
    return -(-span.context // kv.shape.block_tokens)


def _table(kv: PagedKV, spans: Sequence[Span], num_blocks: int) -> Tensor:
    """[spans, num_blocks]; short ones are filled up with their first block, whose slots are masked but finite."""
    rows = []
    for span in spans:
        blocks = list(span.blocks[: _num_blocks(kv, span)])
        rows.append(blocks + [blocks[0]] * (num_blocks - len(blocks)))
    return torch.tensor(rows, dtype=torch.int64).to(kv.device)


def _length_bias(kv: PagedKV, spans: Sequence[Span], first: int, end: int) -> Tensor:
    """Additive mask of context positions [first, end): [spans, 1, 1, end - first]."""
    lengths = torch.tensor([span.context for span in spans])[:, None]
    hidden = torch.arange(first, end)[None, :] >= lengths
    bias = torch.zeros(hidden.shape).masked_fill_(hidden, _MASKED)
    return bias.to(kv.device, kv.shape.dtype)[:, None, None, :]


class _HostDecodes:
    """One group on the CPU, where memory is the limit. K is gathered in pieces that stay in the cache and multiplied
    at once; V is never gathered: `embedding_bag` sums its rows, weighted, right where they lie in the pool. For 16
    sequences of 1,024 tokens that takes 0.7 of the time of gathering both for SDPA."""

    def __init__(self, kv: PagedKV, spans: Sequence[Span]) -> None:
        self._first, self._count = spans[0].row, len(spans)
        num_blocks = _num_blocks(kv, spans[0])
        self._context = num_blocks * kv.shape.block_tokens
        table = _table(kv, spans, num_blocks)
        per_part = max(1, _GATHER_BYTES // (num_blocks * kv.shape.k_block_bytes))
        self._k_parts = [kv.slab_index(part)[0] for part in table.split(per_part)]
        self._v_rows = kv.value_rows(table)
        self._seen_by_all = min(span.context for span in spans)
        self._tail_bias = _length_bias(kv, spans, self._seen_by_all, self._context)
        self._work: _HostWork | None = None

    def attend(self, kv: PagedKV, layer: int, queries: Tensor) -> Tensor:
        kv_heads, head_dim = kv.shape.num_kv_heads, kv.shape.head_dim
        rows = queries[self._first : self._first + self._count] * (1.0 / math.sqrt(head_dim))
        grouped = rows.view(self._count * kv_heads, -1, head_dim)
        if self._work is None:
            keys = grouped.new_empty(len(self._k_parts[0]), kv.shape.block_tokens * head_dim)
            self._work = _HostWork(keys, self._v_rows, grouped)
        work = self._work
        self._score(kv, layer, grouped, work)
        if self._seen_by_all < self._context:
            work.scores.view(self._count, kv_heads, -1, self._context)[..., self._seen_by_all :] += self._tail_bias
        weights = torch.softmax(work.scores, -1).view(-1)
        found = F.embedding_bag(work.bags, kv.rows(layer), work.starts, mode="sum", per_sample_weights=weights)
        return found.view(self._count, -1)

    def _score(self, kv: PagedKV, layer: int, grouped: Tensor, work: _HostWork) -> None:
        """Fill `work.scores`. In bf16 the product is taken as K Q^T: with K as the left factor oneDNN need not repack
        it, which halves its time."""
        first = 0
        slabs = kv.slabs(layer)
        for index in self._k_parts:
            keys = torch.index_select(slabs, 0, index, out=work.keys[: len(index)])
            keys = keys.view(-1, self._context, kv.shape.head_dim)
            part = slice(first, first + len(keys))
            if keys.dtype == torch.bfloat16:
                torch.bmm(keys, grouped[part].transpose(1, 2), out=work.products[part])
            else:
                torch.bmm(grouped[part], keys.transpose(1, 2), out=work.scores[part])
            first = part.stop
        if grouped.dtype == torch.bfloat16:
            work.scores.copy_(work.products.transpose(1, 2))


class _HostWork:
    """Memory that all layers of a step use in turn: fresh memory for each would cost more page faults than work.

    `keys`: the gathered slabs of one part. `products` [B * kv_heads, context, group] and `scores` the other way
    round. `bags`: rows of V, one bag a query head, each starting at its entry of `starts`.
    """

    def __init__(self, keys: Tensor, v_rows: Tensor, grouped: Tensor) -> None:
        heads, context = v_rows.shape
        group = grouped.shape[1]
        self.keys = keys
        self.products = grouped.new_empty(heads, context, group)
        self.scores = grouped.new_empty(heads, group, context)
        self.bags = v_rows[:, None, :].expand(heads, group, context).reshape(-1)
        self.starts = torch.arange(0, len(self.bags), context, dtype=self.bags.dtype)


class _DeviceDecodes:
    """One group on an accelerator: K and V gathered for one call of SDPA."""

    def __init__(self, kv: PagedKV, spans: Sequence[Span]) -> None:
        num_blocks = _num_blocks(kv, spans[0])
        context = num_blocks * kv.shape.block_tokens
        self._k_index, self._v_index = kv.slab_index(_table(kv, spans, num_blocks))
        self._first, self._count = spans[0].row, len(spans)
        self._kv_dims = (self._count, kv.shape.num_kv_heads, context, kv.shape.head_dim)
        self._bias = _length_bias(kv, spans, 0, context)

    def attend(self, kv: PagedKV, layer: int, queries: Tensor) -> Tensor:
        slabs = kv.slabs(layer)
        keys = slabs.index_select(0, self._k_index).view(self._kv_dims)
        values = slabs.index_select(0, self._v_index).view(self._kv_dims)
        rows = queries[self._first : self._first + self._count]
        grouped = rows.reshape(self._count, self._kv_dims[1], -1, self._kv_dims[3])
        return F.scaled_dot_product_attention(grouped, keys, values, self._bias).flatten(1)


class _Chunk:
    """Rows of one prompt: causal among themselves, after a context that may be there already."""

    def __init__(self, kv: PagedKV, span: Span) -> None:
        num_blocks = _num_blocks(kv, span)
        self._k_index, self._v_index = kv.slab_index(_table(kv, [span], num_blocks))
        self._span = span
        self._dims = (kv.shape.num_kv_heads, 1, num_blocks * kv.shape.block_tokens, kv.shape.head_dim)
        self._bias = _causal_bias(kv, span) if span.start else None

    def attend(self, kv: PagedKV, layer: int, queries: Tensor) -> Tensor:
        span, (kv_heads, _, _, head_dim) = self._span, self._dims
        slabs = kv.slabs(layer)
        keys = slabs.index_select(0, self._k_index).view(self._dims)[:, :, : span.context]
        values = slabs.index_select(0, self._v_index).view(self._dims)[:, :, : span.context]
        rows = queries[span.row : span.row + span.num_rows].view(span.num_rows, kv_heads, -1, head_dim)
        grouped = rows.permute(1, 2, 0, 3)
        shape = (kv_heads, grouped.shape[1], span.context, head_dim)
        out = F.scaled_dot_product_attention(
            grouped, keys.expand(shape), values.expand(shape), self._bias, is_causal=self._bias is None
        )
        return out.permute(2, 0, 1, 3).reshape(span.num_rows, -1)


def _causal_bias(kv: PagedKV, span: Span) -> Tensor:
    """Additive mask [num_rows, context]."""
    positions = torch.arange(span.start, span.context, device=kv.device)
    hidden = torch.arange(span.context, device=kv.device)[None, :] > positions[:, None]
    return torch.zeros(hidden.shape, dtype=kv.shape.dtype, device=kv.device).masked_fill_(hidden, _MASKED)


# --- deterministic ---

ROW_TILE = 16
"""Rows that `deterministic` computes at a time, padded: the shape of every product is then always the same."""
_CONTEXT_TILE = 256
"""Tokens of context per tile; a tile that a row doesn't see leaves its running sums unchanged, bit for bit."""


class TiledAttention:
    """For one tile of `ROW_TILE` rows, of which the spans fill the first; rows beyond them come out as zeros."""

    def __init__(self, kv: PagedKV, spans: Sequence[Span]) -> None:
        self._parts = [_TiledSpan(kv, span) for span in spans]

    def attend(self, kv: PagedKV, layer: int, queries: Tensor) -> Tensor:
        out = queries.new_zeros(queries.shape[0], queries.shape[1] * queries.shape[2])
        for part in self._parts:
            span = part.span
            out[span.row : span.row + span.num_rows] = part.attend(kv, layer, queries)[: span.num_rows]
        return out


class _TiledSpan:
    """Softmax over context tiles in order (Milakov and Gimelshein, arXiv 1805.02867), in float32."""

    def __init__(self, kv: PagedKV, span: Span) -> None:
        self.span = span
        tile_blocks = -(-_CONTEXT_TILE // kv.shape.block_tokens)
        num_tiles = -(-_num_blocks(kv, span) // tile_blocks)
        table = _table(kv, [span], num_tiles * tile_blocks)
        positions = torch.arange(span.start, span.start + ROW_TILE, device=kv.device)
        self._tiles = [kv.slab_index(part) for part in table.split(tile_blocks, 1)]
        width = tile_blocks * kv.shape.block_tokens
        seen = torch.arange(num_tiles * width, device=kv.device)[None, :] <= positions[:, None]
        self._hidden = [~part for part in seen.split(width, 1)]
        self._tile_dims = (kv.shape.num_kv_heads, width, kv.shape.head_dim)

    def attend(self, kv: PagedKV, layer: int, queries: Tensor) -> Tensor:
        """[ROW_TILE, heads * head_dim]; the first `span.num_rows` rows count."""
        kv_heads, _, head_dim = self._tile_dims
        rows = self._padded(queries).view(ROW_TILE, kv_heads, -1, head_dim)
        group = rows.shape[2]
        # [kv_heads, group * ROW_TILE, head_dim]: one product a KV head, of a shape that never changes.
        grouped = rows.permute(1, 2, 0, 3).reshape(kv_heads, group * ROW_TILE, head_dim)
        state = _Softmax(grouped)
        for index, hidden in zip(self._tiles, self._hidden, strict=True):
            keys, values = (kv.slabs(layer).index_select(0, part).view(self._tile_dims).float() for part in index)
            state.add(keys, values, hidden.repeat(group, 1))
        out = state.result().view(kv_heads, group, ROW_TILE, head_dim)
        return out.permute(2, 0, 1, 3).reshape(ROW_TILE, -1).to(queries.dtype)

    def _padded(self, queries: Tensor) -> Tensor:
        rows = queries.new_zeros((ROW_TILE, *queries.shape[1:]))
        rows[: self.span.num_rows] = queries[self.span.row : self.span.row + self.span.num_rows]
        return rows.float()


class _Softmax:
    """Running maximum, sum and weighted sum of one tile of queries [kv_heads, rows, head_dim]."""

    def __init__(self, queries: Tensor) -> None:
        self._queries = queries * (1.0 / math.sqrt(queries.shape[-1]))
        self._top = queries.new_full((*queries.shape[:2], 1), _MASKED)
        self._sum = torch.zeros_like(self._top)
        self._weighted = torch.zeros_like(queries)

    def add(self, keys: Tensor, values: Tensor, hidden: Tensor) -> None:
        scores = torch.bmm(self._queries, keys.transpose(1, 2)).masked_fill_(hidden, _MASKED)
        top = torch.maximum(self._top, scores.amax(-1, keepdim=True))
        weights = torch.exp(scores - top)
        keep = torch.exp(self._top - top)
        self._sum = self._sum * keep + weights.sum(-1, keepdim=True)
        self._weighted = self._weighted * keep + torch.bmm(weights, values)
        self._top = top

    def result(self) -> Tensor:
        return self._weighted / self._sum
