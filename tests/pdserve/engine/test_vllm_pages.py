"""How vLLM's kernels lay out pages, read and written as tokens, without vLLM."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pdserve.engine.vllm.pages import HalvesOrder, PagedKV, paged_kv, probe_order
from pdserve.errors import ConfigError

LAYERS, HEADS, DIM = 3, 2, 8


class PermutingKernel:
    """Writes a page as some CPU kernels do: K transposed, V in pairs of tokens."""

    def do_kv_cache_update(self, layer: object, key: object, value: object, cache: object, slots: object) -> None:
        _, heads, tokens, width = cache.shape
        halves = cache.view(-1, heads, 2, tokens, width // 2)
        for token, slot in enumerate(slots.tolist()):
            page, offset = divmod(slot, tokens)
            halves[page, :, 0].view(heads, width // 2, tokens)[:, :, offset] = key[token]
            pairs = halves[page, :, 1].view(heads, tokens // 2, width // 2, 2)
            pairs[:, offset // 2, :, offset % 2] = value[token]


def tokens_of(num_tokens: int) -> torch.Tensor:
    """[layer, K/V, token, head, dim]"""
    torch.manual_seed(5)
    return torch.randn(LAYERS, 2, num_tokens, HEADS, DIM)


def cpu_pages(page: int, vllm_block: int, num_blocks: int = 9) -> tuple[PagedKV, PermutingKernel]:
    kernel = PermutingKernel()
    pages = num_blocks * vllm_block // page
    caches = {f"layer{n}": torch.zeros(pages, HEADS, page, 2 * DIM) for n in range(LAYERS)}
    attention = {name: SimpleNamespace(impl=kernel) for name in caches}
    return paged_kv(caches, attention, 16, vllm_block), kernel


def fill(kv: PagedKV, kernel: PermutingKernel, blocks: list[int], content: torch.Tensor) -> None:
    slots = torch.tensor(
        [blocks[t // kv.vllm_block] * kv.vllm_block + t % kv.vllm_block for t in range(content.shape[2])]
    )
    for number, layer in enumerate(kv.layers):
        kernel.do_kv_cache_update(None, content[number, 0], content[number, 1], layer, slots)


@pytest.mark.parametrize(("page", "vllm_block"), [(32, 32), (32, 64), (64, 64)])
@pytest.mark.parametrize(("first", "last"), [(0, 16), (0, 100), (16, 100), (48, 64), (64, 100), (96, 97)])
def test_a_cpu_kernels_pages_are_read_as_tokens(page: int, vllm_block: int, first: int, last: int) -> None:
    kv, kernel = cpu_pages(page, vllm_block)
    content = tokens_of(100)
    fill(kv, kernel, [4, 2, 7, 5], content)
    blocks = kv.read([4, 2, 7, 5], first, last)
    assert blocks.shape == (-(-(last - first) // 16), LAYERS, 2, HEADS, 16, DIM)
    flat = blocks.permute(1, 2, 0, 4, 3, 5).reshape(LAYERS, 2, -1, HEADS, DIM)
    assert torch.equal(flat[:, :, : last - first], content[:, :, first:last])
    assert not flat[:, :, last - first :].any()


@pytest.mark.parametrize(("page", "vllm_block"), [(32, 64), (64, 64)])
def test_many_requests_are_read_at_once_as_one_by_one(page: int, vllm_block: int) -> None:
    kv, kernel = cpu_pages(page, vllm_block)
    fill(kv, kernel, [4, 2, 7, 5], tokens_of(200))
    spans = [([4, 2, 7, 5], 16, 32), ([4, 2, 7, 5], 48, 130), ([2], 0, 7), ([7, 5, 4], 96, 176), ([5], 0, 16)]
    together = kv.read_spans(spans)
    assert torch.equal(together, torch.cat([kv.read(*span) for span in spans]))
    assert not together[6, ..., 2:, :].any(), "the tail of a span is empty, not its neighbour's"


@pytest.mark.parametrize("first", [0, 64])
def test_what_was_read_from_one_layout_can_be_written_into_another(first: int) -> None:
    source, kernel = cpu_pages(32, 64)
    content = tokens_of(100)
    fill(source, kernel, [3, 1], content)
    blocks = source.read([3, 1], first, 100)
    layers = tuple(torch.full((9, HEADS, 32, 2 * DIM), torch.nan) for _ in range(LAYERS))
    target = PagedKV(layers, HalvesOrder(), block_tokens=16, vllm_block=32)
    target.write([8, 0, 5, 2], first, 100, blocks)
    assert torch.equal(target.read([8, 0, 5, 2], first, 100), blocks)
    written = torch.stack([layer[2] for layer in layers])
    assert not written.isnan().any(), "a page is written whole"
    assert layers[0][1].isnan().all(), "other pages are left alone"
    if first:
        assert layers[0][8].isnan().all()


def test_a_kernel_that_loses_numbers_is_refused() -> None:
    lossy = SimpleNamespace(impl=SimpleNamespace(do_kv_cache_update=lambda *arguments: None))
    with pytest.raises(ConfigError):
        probe_order(lossy, torch.Size((1, 1, 16, 8)), torch.float32)


def test_pages_that_hold_no_whole_blocks_are_refused() -> None:
    caches = {"layer": torch.zeros(4, HEADS, 8, 2 * DIM)}
    with pytest.raises(ConfigError) as caught:
        paged_kv(caches, {}, 16, 8)
    assert caught.value.key == "block_tokens"
