"""The KV pool: block-major, so that all layers of a block are one contiguous piece that a hand-over moves whole.

A pool is [num_blocks, layer, K/V, kv_head, token, head_dim] over the bytes it is given (CPU: the hand-over memory
itself, no copy) or on the device. Two flat views make paging cheap: *rows* of one token's head (head_dim values) for
writing, and *slabs* of one block's head (block_tokens * head_dim values) for reading. Both start a fixed distance
further on for each layer, so indexes made once a step serve all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pdserve.engine.torch.shape import ModelShape


@dataclass(frozen=True, slots=True)
class KVShape:
    """Sizes of one pool, all but the number of blocks."""

    num_layers: int
    num_kv_heads: int
    block_tokens: int
    head_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, shape: ModelShape, block_tokens: int, dtype: torch.dtype) -> KVShape:
        return cls(shape.num_layers, shape.num_kv_heads, block_tokens, shape.head_dim, dtype)

    @property
    def block_bytes(self) -> int:
        values = self.num_layers * 2 * self.num_kv_heads * self.block_tokens * self.head_dim
        return int(values * self.dtype.itemsize)

    @property
    def k_block_bytes(self) -> int:
        """K of one block in one layer."""
        return int(self.num_kv_heads * self.block_tokens * self.head_dim * self.dtype.itemsize)

    @property
    def slabs_per_layer(self) -> int:
        return 2 * self.num_kv_heads

    @property
    def slabs_per_block(self) -> int:
        return self.num_layers * self.slabs_per_layer

    def dims(self, num_blocks: int) -> tuple[int, ...]:
        return (num_blocks, self.num_layers, 2, self.num_kv_heads, self.block_tokens, self.head_dim)


class PagedKV:
    """One pool. Every block of a live table holds finite values in all its slots (see `clear_after`), so attention
    may read past a context's end and mask afterwards."""

    def __init__(self, shape: KVShape, num_blocks: int, host: NDArray[np.uint8] | None, device: torch.device) -> None:
        self.shape = shape
        self.num_blocks = num_blocks
        self.device = device
        self.pool = _pool(shape, num_blocks, host, device)
        self._rows = self.pool.view(-1, shape.head_dim)
        self._slabs = self.pool.view(-1, shape.block_tokens * shape.head_dim)
        heads = torch.arange(2 * shape.num_kv_heads)
        self._row_heads = (heads * shape.block_tokens).to(device)
        self._slab_heads = heads.to(device)

    def rows(self, layer: int) -> Tensor:
        """[*, head_dim], from this layer's first row on."""
        return self._rows[layer * self.shape.slabs_per_layer * self.shape.block_tokens :]

    def slabs(self, layer: int) -> Tensor:
        """[*, block_tokens * head_dim], from this layer's first slab on."""
        return self._slabs[layer * self.shape.slabs_per_layer :]

    def write_index(self, blocks: Tensor, offsets: Tensor) -> Tensor:
        """Rows (of any layer) of tokens at `offsets` in `blocks` (int64, [N] each): [N * 2 * kv_heads], K first."""
        first = blocks * (self.shape.slabs_per_block * self.shape.block_tokens) + offsets
        return (first[:, None] + self._row_heads).reshape(-1)

    def slab_index(self, tables: Tensor) -> tuple[Tensor, Tensor]:
        """Slabs (of any layer) of K and of V for block tables [B, blocks]: each [B * kv_heads * blocks]."""
        heads = self.shape.num_kv_heads
        index = tables[:, None, :] * self.shape.slabs_per_block + self._slab_heads[None, :, None]
        return index[:, :heads].reshape(-1), index[:, heads:].reshape(-1)

    def value_rows(self, tables: Tensor) -> Tensor:
        """Rows (of any layer) of every token's V for block tables [B, blocks]: [B * kv_heads, tokens], int32 where
        that is wide enough."""
        heads, size = self.shape.num_kv_heads, self.shape.block_tokens
        first = tables[:, None, :] * (self.shape.slabs_per_block * size) + self._row_heads[None, heads:, None]
        rows = first[..., None] + torch.arange(size, device=self.device)
        narrow = torch.int32 if self._rows.shape[0] < 2**31 else torch.int64
        return rows.view(len(tables) * heads, -1).to(narrow)

    def clear_after(self, block: int, offset: int) -> None:
        """Zero a fresh block from `offset` on: a former owner's bytes, or a torn transfer's, may be no numbers, and
        0 * NaN would reach the sum that masking meant to protect."""
        self.pool[block, :, :, :, offset:].zero_()

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        self.pool[self._index(targets)] = self.pool[self._index(sources)]

    def read_blocks(self, blocks: Sequence[int]) -> NDArray[np.uint8]:
        """[len(blocks), block_bytes] on the host."""
        found = self.pool[self._index(blocks)].contiguous().view(torch.uint8)
        data: NDArray[np.uint8] = found.view(len(blocks), self.shape.block_bytes).cpu().numpy()
        return data

    def write_blocks(self, blocks: Sequence[int], data: NDArray[np.uint8]) -> None:
        """The other way round."""
        values = torch.from_numpy(np.ascontiguousarray(data)).view(self.shape.dtype)
        self.pool[self._index(blocks)] = values.view(self.shape.dims(len(blocks))).to(self.device)

    def _index(self, blocks: Sequence[int]) -> Tensor:
        return torch.tensor(list(blocks), dtype=torch.int64, device=self.device)


def _pool(shape: KVShape, num_blocks: int, host: NDArray[np.uint8] | None, device: torch.device) -> Tensor:
    if host is None and device.type != "cpu":
        return torch.zeros(shape.dims(num_blocks), dtype=shape.dtype, device=device)
    if host is None:  # numpy asks the kernel for huge pages, torch does not: decode is 1.1 times as fast
        host = np.zeros((num_blocks, shape.block_bytes), dtype=np.uint8)
    if host.shape != (num_blocks, shape.block_bytes) or not host.flags.c_contiguous:
        raise ValueError(f"hand-over memory is {host.shape}, the pool needs {(num_blocks, shape.block_bytes)}")
    return torch.from_numpy(host).view(-1).view(shape.dtype).view(shape.dims(num_blocks))
