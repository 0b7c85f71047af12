"""vLLM's paged KV as tokens: the one place that knows how a page lies in memory.

vLLM shows every layer as [page, kv_head, token, 2 * head_dim], but on CPU that shape is only nominal: a page holds K,
then V, each in the order its kernel likes (K transposed, or packed in pairs for AMX). Rather than repeat those orders
here, `probe_order` lets vLLM's own kernel write known numbers into a scratch page and reads where they went. On GPUs
the nominal shape is the real one: K in the first half of the last axis, V in the second (FlashAttention, FlashInfer).
With MLA a token has one latent and no V, written as it is everywhere.

What leaves and enters is a hand-over block: [layer, K/V, kv_head, token, head_dim].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from pdserve.errors import ConfigError

_CODE_BASE = 128
"""Numbers below it are exact in every dtype, bf16 with its 8 bits included."""


Span = tuple[Sequence[int], int, int]
"""(vLLM's blocks of a request from token 0, first token, one past the last)."""


class PageOrder(Protocol):
    """Reads and writes whole pages of one layer as [page, K/V, kv_head, token, head_dim]."""

    def read(self, layer: torch.Tensor, pages: torch.Tensor) -> torch.Tensor: ...

    def write(self, layer: torch.Tensor, pages: torch.Tensor, content: torch.Tensor) -> None: ...


class HalvesOrder:
    """The last axis holds K, then V: GPU backends, whatever the strides behind the view."""

    def read(self, layer: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
        chosen = layer[pages]
        return torch.stack(chosen.chunk(2, dim=-1), dim=1)

    def write(self, layer: torch.Tensor, pages: torch.Tensor, content: torch.Tensor) -> None:
        layer[pages] = torch.cat((content[:, 0], content[:, 1]), dim=-1)


class LatentOrder:
    """MLA: the last axis is a token's latent; neither sides nor heads."""

    def read(self, layer: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
        return layer[pages].unsqueeze(1)

    def write(self, layer: torch.Tensor, pages: torch.Tensor, content: torch.Tensor) -> None:
        layer[pages] = content[:, 0]


@dataclass(frozen=True, slots=True)
class PermutedOrder:
    """A page of a head is all of K, then all of V, each permuted: `index[h][token * head_dim + dim]` is the place."""

    key_index: torch.Tensor
    value_index: torch.Tensor

    def read(self, layer: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
        _, heads, tokens, width = layer.shape
        halves = layer[pages].reshape(len(pages), heads, 2, tokens * width // 2)
        both = torch.stack((halves[:, :, 0, self.key_index], halves[:, :, 1, self.value_index]), dim=1)
        return both.reshape(len(pages), 2, heads, tokens, width // 2)

    def write(self, layer: torch.Tensor, pages: torch.Tensor, content: torch.Tensor) -> None:
        _, heads, tokens, width = layer.shape
        flat = content.reshape(len(pages), 2, heads, tokens * width // 2)
        halves = torch.empty(len(pages), heads, 2, tokens * width // 2, dtype=layer.dtype, device=layer.device)
        halves[:, :, 0, self.key_index] = flat[:, 0]
        halves[:, :, 1, self.value_index] = flat[:, 1]
        layer[pages] = halves.reshape(len(pages), heads, tokens, width)


def probe_order(layer: Any, shape: torch.Size, dtype: torch.dtype) -> PermutedOrder:
    """The order that an attention layer's own cache kernel writes a page in; `shape` is that of its cache.

    Raises `ConfigError` if the kernel does not place every number exactly once (a quantised cache, for one).
    """
    _, heads, tokens, width = shape
    dim = width // 2
    size = tokens * dim
    key = torch.zeros(size, dtype=torch.long)
    value = torch.zeros(size, dtype=torch.long)
    place = torch.arange(size).view(tokens, dim)
    weight = 1
    while weight < size:
        code = (place // weight) % _CODE_BASE
        content = code.unsqueeze(1).expand(tokens, heads, dim).to(dtype).contiguous()
        scratch = torch.zeros(1, heads, tokens, width, dtype=dtype)
        layer.impl.do_kv_cache_update(layer, content, content, scratch, torch.arange(tokens))
        halves = scratch.view(heads, 2, size)[0].float().long()
        key += halves[0] * weight
        value += halves[1] * weight
        weight *= _CODE_BASE
    return PermutedOrder(_inverse(key), _inverse(value))


def _inverse(written: torch.Tensor) -> torch.Tensor:
    places = torch.argsort(written)
    if not torch.equal(written[places], torch.arange(len(written))):
        raise ConfigError("vLLM's KV cache has a layout that pdserve cannot read", key="vllm.attention_backend")
    return places


@dataclass(frozen=True, slots=True)
class PagedKV:
    """All layers of one rank's cache, in model order. `block_tokens` is the hand-over's, `vllm_block` the scheduler's
    (which a kernel may split into several pages)."""

    layers: tuple[torch.Tensor, ...]
    order: PageOrder
    block_tokens: int
    vllm_block: int

    @property
    def page_tokens(self) -> int:
        return int(self.layers[0].shape[2])

    @property
    def num_heads(self) -> int:
        return int(self.layers[0].shape[1])

    def read(self, vllm_blocks: Sequence[int], first: int, last: int) -> torch.Tensor:
        """Tokens [first, last) as host blocks [block, layer, K/V, kv_head, token, head_dim]; `first` is a multiple of
        `block_tokens`, `vllm_blocks` are the request's from token 0. Past `last` the tail block holds zeros, so that
        a block's bytes depend on its tokens alone."""
        return self.read_spans([(vllm_blocks, first, last)])

    def read_spans(self, spans: Sequence[Span]) -> torch.Tensor:
        """As `read`, the blocks of several requests after each other: one gather a layer, however many they are."""
        pages: list[int] = []
        wanted: list[int] = []
        tails: list[tuple[int, int]] = []
        for vllm_blocks, first, last in spans:
            own, skipped = self._pages(vllm_blocks, first, last)
            start = len(pages) * (self.page_tokens // self.block_tokens) + skipped
            pages += own
            wanted += range(start, start - (first - last) // self.block_tokens)
            if last % self.block_tokens:
                tails.append((len(wanted) - 1, last % self.block_tokens))
        index, chosen = self._tensor(pages), self._tensor(wanted)
        per_layer = [self._blocks(self.order.read(layer, index))[chosen] for layer in self.layers]
        blocks = torch.stack(per_layer, dim=1).cpu()
        for block, num_tokens in tails:
            blocks[block, :, :, :, num_tokens:] = 0
        return blocks

    def write(self, vllm_blocks: Sequence[int], first: int, last: int, blocks: torch.Tensor) -> None:
        """The other way. `first` is a multiple of a page: the pages are the request's own and get written whole, with
        zeros past the given blocks (never what a former owner left there, which might be no number at all)."""
        pages = self._tensor(self._pages(vllm_blocks, first, last)[0])
        per_page = self.page_tokens // self.block_tokens
        shape = (len(pages) * per_page, *blocks.shape[1:])
        whole = torch.zeros(shape, dtype=blocks.dtype)
        whole[: len(blocks)] = blocks
        whole = whole.to(self.layers[0].device)
        for number, layer in enumerate(self.layers):
            self.order.write(layer, pages, self._whole_pages(whole[:, number], len(pages)))

    # Threads have streams of their own on a device (vLLM's is not the default one): their order must be said

    def mark(self) -> torch.cuda.Event | None:
        """What this thread has given the device to do so far."""
        device = self.layers[0].device
        return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    def follow(self, mark: torch.cuda.Event | None) -> None:
        """What this thread gives the device from now on is done after that."""
        if mark is not None:
            torch.cuda.current_stream(self.layers[0].device).wait_event(mark)

    def settle(self) -> None:
        """Wait until the device has done what this thread gave it."""
        if self.layers[0].device.type == "cuda":
            torch.cuda.current_stream(self.layers[0].device).synchronize()

    def _tensor(self, numbers: list[int]) -> torch.Tensor:
        return torch.tensor(numbers, device=self.layers[0].device)

    def _pages(self, vllm_blocks: Sequence[int], first: int, last: int) -> tuple[list[int], int]:
        """Pages that hold the tokens, and how many hand-over blocks of the first page come before `first`."""
        split = self.vllm_block // self.page_tokens
        start, stop = first // self.page_tokens, -(-last // self.page_tokens)
        pages = [vllm_blocks[page // split] * split + page % split for page in range(start, stop)]
        return pages, (first - start * self.page_tokens) // self.block_tokens

    def _blocks(self, content: torch.Tensor) -> torch.Tensor:
        """[page, K/V, head, token, dim] -> [block, K/V, head, token, dim]."""
        pages, two, heads, tokens, dim = content.shape
        split = content.view(pages, two, heads, tokens // self.block_tokens, self.block_tokens, dim)
        return split.permute(0, 3, 1, 2, 4, 5).reshape(-1, two, heads, self.block_tokens, dim)

    def _whole_pages(self, blocks: torch.Tensor, num_pages: int) -> torch.Tensor:
        _, two, heads, _, dim = blocks.shape
        split = blocks.view(num_pages, -1, two, heads, self.block_tokens, dim).permute(0, 2, 3, 1, 4, 5)
        return split.reshape(num_pages, two, heads, self.page_tokens, dim)


def paged_kv(
    caches: Mapping[str, torch.Tensor],
    attention: Mapping[str, Any],
    block_tokens: int,
    vllm_block: int,
    *,
    latent: bool = False,
) -> PagedKV:
    """The caches that vLLM registers, checked. `attention` are its attention layers by the same names.

    Raises `ConfigError` for what cannot be handed over: unequal layers, or pages smaller than a hand-over block.
    """
    layers = tuple(cache.unsqueeze(1) if latent and cache.ndim == 3 else cache for cache in caches.values())
    first = layers[0]
    if any(layer.ndim != 4 or layer.shape[1:] != first.shape[1:] or layer.dtype != first.dtype for layer in layers):
        raise ConfigError("KV that is not equal in all layers is not supported", key="model")
    page = first.shape[2]
    if page % block_tokens or vllm_block % page:
        raise ConfigError(f"block_tokens {block_tokens} must divide vLLM's page of {page} tokens", key="block_tokens")
    order: PageOrder = LatentOrder() if latent else HalvesOrder()
    if first.device.type == "cpu" and not latent:
        order = probe_order(attention[next(iter(caches))], first.shape, first.dtype)
    return PagedKV(layers, order, block_tokens, vllm_block)
