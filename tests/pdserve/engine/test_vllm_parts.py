"""The parts of the vLLM engine that need no vLLM: staging, board, pages, settings."""

from __future__ import annotations

import importlib.util
import os
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.config import WorkerConfig, load
from pdserve.engine.memory import LocalMemory
from pdserve.engine.vllm.board import Ending, TransferBoard
from pdserve.engine.vllm.engine import VllmEngine
from pdserve.engine.vllm.pages import HalvesOrder, PagedKV, paged_kv, probe_order
from pdserve.engine.vllm.settings import OWNED_ARGUMENTS, VllmSettings, settings_from_config
from pdserve.engine.vllm.staging import StagingPool
from pdserve.errors import ConfigError

# Board


def test_a_transfer_is_as_far_as_its_slowest_rank_and_ends_with_its_last() -> None:
    board = TransferBoard.create(num_ranks=2, num_slots=4)
    other = TransferBoard.attach(board.path, 2, 4)
    other.advance(0, 3, 64)
    assert board.num_tokens(3) == 0
    other.advance(1, 3, 32)
    assert board.num_tokens(3) == 32
    other.end(0, 3, Ending.DONE)
    assert not board.ended(3)
    other.end(1, 3, Ending.STALE)
    assert board.ended(3)
    assert board.ending(3) is Ending.STALE
    assert not board.ended(2)
    board.start(3)
    assert not other.ended(3)
    assert other.num_tokens(3) == 0
    board.close()
    board.close()
    other.close()


def test_a_board_whose_owner_is_gone_cannot_be_attached() -> None:
    board = TransferBoard.create(1, 1)
    path = board.path
    board.close()
    with pytest.raises(OSError, match="No such file"):
        TransferBoard.attach(path, 1, 1)


# Staging

STEP = st.tuples(st.sampled_from(["take", "retire", "end"]), st.integers(1, 6), st.integers(0, 3))
"""What happens, to how many blocks, to which of the candidates."""


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.sampled_from(["take", "retire", "end"]), st.integers(1, 6), st.integers(0, 3)), max_size=60)
)
def test_nothing_is_owned_twice_or_lost_whatever_the_order_of_ends(steps: list[tuple[str, int, int]]) -> None:
    board = TransferBoard.create(1, 4)
    pool = StagingPool(LocalMemory(12, 8), board)
    held: list[tuple[list[int], list[int]]] = []
    running: set[int] = set()
    for what, count, pick in steps:
        if what == "take" and (room := pool.allocate(count, pick)) is not None:
            assert not {block for blocks, _ in held for block in blocks} & set(room[0])
            assert not running & set(room[1]), "a slot was given away while its transfer ran"
            held.append(room)
            running.update(room[1])
        elif what == "retire" and held:
            blocks, slots = held.pop(pick % len(held))
            pool.retire_blocks(blocks, slots)
            for slot in slots:
                pool.retire_slot(slot)
        elif what == "end" and running:
            slot = sorted(running)[pick % len(running)]
            running.discard(slot)
            board.end(0, slot, Ending.DONE)
            pool.collect()
        pool.check_integrity()
    for blocks, slots in held:
        pool.retire_blocks(blocks, slots)
        for slot in slots:
            pool.retire_slot(slot)
    for slot in running:
        board.end_all(slot)
    pool.collect()
    assert (pool.num_free_blocks, pool.num_free_slots, pool.retiring) == (12, 4, False)
    board.close()


def test_blocks_stay_until_vllm_has_let_go_of_them() -> None:
    board = TransferBoard.create(1, 2)
    pool = StagingPool(LocalMemory(4, 8), board)
    room = pool.allocate(4, 1)
    assert room is not None
    blocks, (slot,) = room
    pool.retire_blocks(blocks, [slot])
    assert pool.retiring
    assert pool.allocate(1, 0) is None
    board.end(0, slot, Ending.DROPPED)
    pool.collect()
    again = pool.allocate(4, 0)
    assert again is not None
    assert pool.memory.generations.tolist() == [2, 2, 2, 2]
    board.close()


# Pages

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


# Settings


@pytest.mark.parametrize("key", sorted(OWNED_ARGUMENTS))
def test_an_argument_that_pdserve_owns_is_refused_by_name(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        VllmSettings(model="m", engine_args={key: 1})
    assert caught.value.key == f"vllm.{key}"


def test_a_block_size_that_is_no_multiple_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        VllmSettings(model="m", block_tokens=16, engine_args={"block_size": 40})
    assert caught.value.key == "vllm.block_size"


def test_a_workers_config_gives_sizes_and_vllms_own_arguments_win() -> None:
    overrides = {"max_num_seqs": 7, "vllm.max_num_seqs": 9, "vllm.enforce_eager": True, "max_model_len": 100}
    made = settings_from_config(
        load(WorkerConfig, None, {"engine": "vllm", "kv_load_failure": "recompute", **overrides})
    )
    assert made.engine_args["max_num_seqs"] == 9
    assert made.engine_args["enforce_eager"] is True
    assert made.engine_args["max_model_len"] == 100
    assert made.load_failure == "recompute"


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_the_engine_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(ConfigError) as caught:
        VllmEngine(VllmSettings(model="embedded"), LocalMemory)
    assert caught.value.key == "engine"
    assert "pip install" in caught.value.message
