"""From what the scheduler chose to rows of a tile: tokens, positions, where K and V go, who attends to what.

Two plans: `fast_plan` puts the whole step into one tile, decodes first; `tiled_plan` cuts it into tiles of
`ROW_TILE` rows, padded, for `deterministic` requests.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from pdserve.engine.core.runner import Scheduled
from pdserve.engine.torch.attention import ROW_TILE, Attention, BatchedAttention, Span, TiledAttention
from pdserve.engine.torch.model import Tile
from pdserve.engine.torch.paged_kv import PagedKV


@dataclass(frozen=True, slots=True)
class Plan:
    """`last_rows[i]`: the row of the i-th scheduled item's last token, counted over all tiles."""

    tiles: tuple[Tile, ...]
    last_rows: tuple[int, ...]


def fast_plan(kv: PagedKV, batch: Seq[Scheduled]) -> Plan:
    """One tile: single-token items in falling order of context, then the others."""
    order = sorted(range(len(batch)), key=lambda i: (batch[i].num_tokens > 1, -batch[i].start))
    spans = _spans([batch[i] for i in order])
    decodes = [span for span in spans if span.num_rows == 1]
    attention = BatchedAttention(kv, decodes, spans[len(decodes) :])
    tile = _tile(kv, [batch[i] for i in order], spans, attention)
    last_rows = {i: span.row + span.num_rows - 1 for i, span in zip(order, spans, strict=True)}
    return Plan((tile,), tuple(last_rows[i] for i in range(len(batch))))


def tiled_plan(kv: PagedKV, batch: Seq[Scheduled]) -> Plan:
    """Tiles of `ROW_TILE` rows; an item that crosses tiles continues in the next."""
    tiles: list[list[Scheduled]] = [[]]
    last_rows = []
    for item in batch:
        start, left = item.start, item.num_tokens
        while left:
            room = ROW_TILE - sum(part.num_tokens for part in tiles[-1])
            if not room:
                tiles.append([])
                continue
            taken = min(room, left)
            tiles[-1].append(Scheduled(item.seq, start, taken))
            start, left = start + taken, left - taken
        last_rows.append((len(tiles) - 1) * ROW_TILE + sum(part.num_tokens for part in tiles[-1]) - 1)
    return Plan(tuple(_padded_tile(kv, tile) for tile in tiles), tuple(last_rows))


def _padded_tile(kv: PagedKV, batch: Seq[Scheduled]) -> Tile:
    spans = _spans(batch)
    tile = _tile(kv, batch, spans, TiledAttention(kv, spans))
    padding = (0, ROW_TILE - len(tile.token_ids))
    pad = torch.nn.functional.pad
    return Tile(pad(tile.token_ids, padding), pad(tile.positions, padding), tile.write_index, tile.attention)


def _spans(batch: Seq[Scheduled]) -> list[Span]:
    spans, row = [], 0
    for item in batch:
        spans.append(Span(row, item.num_tokens, item.start, item.seq.block_table))
        row += item.num_tokens
    return spans


def _tile(kv: PagedKV, batch: Seq[Scheduled], spans: Seq[Span], attention: Attention) -> Tile:
    token_ids: list[int] = []
    positions: list[int] = []
    blocks: list[int] = []
    size = kv.shape.block_tokens
    for item, span in zip(batch, spans, strict=True):
        token_ids += item.seq.token_ids[item.start : span.context]
        positions += range(item.start, span.context)
        blocks += [span.blocks[position // size] for position in range(item.start, span.context)]
    where = _ints(kv, positions)
    write_index = kv.write_index(_ints(kv, blocks), where % size)
    return Tile(_ints(kv, token_ids), where, write_index, attention)


def _ints(kv: PagedKV, values: Seq[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64).to(kv.device)


def clear_fresh_blocks(kv: PagedKV, batch: Seq[Scheduled]) -> None:
    """Zero what lies behind the last token in each block that this step begins to write and doesn't fill."""
    size = kv.shape.block_tokens
    for item in batch:
        end = item.start + item.num_tokens
        last_block = (end - 1) // size
        if end % size and item.start <= last_block * size:
            kv.clear_after(item.seq.block_table[last_block], end % size)
