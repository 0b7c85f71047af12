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
from pdserve.engine.base import KVCache, StepResult
from pdserve.engine.memory import LocalMemory
from pdserve.engine.vllm.board import Ending, TransferBoard
from pdserve.engine.vllm.engine import VllmEngine
from pdserve.engine.vllm.fills import Fills
from pdserve.engine.vllm.layouts import check_groups, fits_window, kv_shape
from pdserve.engine.vllm.news import ELSEWHERE, CacheChange, CacheNews
from pdserve.engine.vllm.pages import HalvesOrder, PagedKV, paged_kv, probe_order
from pdserve.engine.vllm.settings import OWNED_ARGUMENTS, VllmSettings, settings_from_config
from pdserve.engine.vllm.staging import StagingPool
from pdserve.engine.vllm.start import start_error
from pdserve.errors import ConfigError, EngineFailed

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
        pool.check_integrity([blocks for blocks, _ in held])
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


KEYS = [bytes([number]) * 16 for number in range(8)]


def staging(num_blocks: int, num_slots: int = 4) -> StagingPool:
    return StagingPool(LocalMemory(num_blocks, 8), TransferBoard.create(1, num_slots))


def take(pool: StagingPool, num_blocks: int, num_slots: int = 0) -> tuple[list[int], list[int]]:
    room = pool.allocate(num_blocks, num_slots)
    assert room is not None
    return room


def test_a_published_block_is_found_until_its_room_is_needed() -> None:
    pool = staging(4)
    blocks, _ = take(pool, 3)
    for block, key in zip(blocks, KEYS, strict=False):
        assert pool.publish(block, key) == block
    assert len(set(pool.digests(blocks))) == 1
    assert all(pool.digests(blocks))
    pool.retire_blocks(blocks)
    assert pool.num_free_blocks == 4
    assert pool.hold(KEYS) == blocks
    pool.retire_blocks(blocks[:1])
    take(pool, 2)
    assert pool.books.take_evicted() == [KEYS[0]]
    assert pool.hold(KEYS) == []
    assert pool.hold(KEYS[1:]) == blocks[1:], "what is held is not given away"


def test_the_first_block_under_a_key_stays_it_with_the_digest_it_had() -> None:
    pool = staging(2)
    (first, second), _ = take(pool, 2)
    pool.memory.blocks[first] = 3
    pool.publish(first, KEYS[0])
    before = pool.digests([first])
    pool.memory.blocks[first] = 4
    assert pool.publish(second, KEYS[0]) == first
    assert pool.digests([first]) == before


@pytest.mark.parametrize("ending", [Ending.CORRUPT, Ending.STALE])
def test_blocks_that_a_load_found_bad_are_found_no_more(ending: Ending) -> None:
    pool = staging(4)
    blocks, (slot,) = take(pool, 3, 1)
    for block, key in zip(blocks, KEYS, strict=False):
        pool.publish(block, key)
    pool.retire_blocks(blocks, [slot])
    pool.board.advance(0, slot, 20)
    pool.board.end(0, slot, ending)
    pool.collect()
    assert pool.books.lookup(KEYS) == blocks[:1]
    assert set(pool.books.take_evicted()) == set(KEYS[1:3])
    pool.check_integrity()


def test_grants_come_in_order_and_a_new_transfer_has_none() -> None:
    board = TransferBoard.create(1, 2)
    other = TransferBoard.attach(board.path, 1, 2)
    for block in range(20):
        board.grant(1, block)
        assert other.granted(1, block) == [block]
    board.start(1)
    assert other.granted(1, 0) == []
    other.refuse("key\nwhy " + "x" * 600)
    assert board.refusal.startswith("key\nwhy x")
    board.close()
    other.close()


# Fills


def filler(num_blocks: int) -> tuple[StagingPool, CacheNews, Fills]:
    pool = staging(num_blocks)
    news = CacheNews(pool, None)
    return pool, news, Fills(pool, news)


def test_a_fill_is_found_once_it_is_committed_and_told_of() -> None:
    pool, news, fills = filler(6)
    target = fills.open(5, KEYS[:4], 0)
    assert target is not None
    assert (len(target.blocks), target.num_cached_blocks) == (4, 0)
    assert pool.books.lookup(KEYS) == []
    assert fills.is_open(5)
    fills.commit(5, 3)
    assert pool.books.lookup(KEYS) == list(target.blocks[:3])
    news.flush(result := StepResult())
    (told,) = result.published
    assert (told.handle, told.first_block, told.keys, told.blocks) == (5, 0, tuple(KEYS[:3]), target.blocks[:3])
    assert fills.close(5) == 3
    assert pool.num_free_blocks == 6
    pool.check_integrity()


def test_a_fill_takes_what_is_staged_and_asks_only_for_the_rest() -> None:
    pool, _, fills = filler(4)
    fills.open(1, KEYS[:2], 0)
    fills.commit(1, 2)
    fills.close(1)
    target = fills.open(2, KEYS[:4], 0)
    assert target is not None
    assert target.num_cached_blocks == 2
    assert fills.open(3, KEYS[4:6], 0) is None, "no room"
    fills.commit(2, 0)
    assert pool.books.lookup(KEYS) == list(target.blocks[:2]), "what was cached stays so"
    assert fills.close(2) == 0
    pool.check_integrity()


def test_a_fill_that_is_open_stays_for_its_writer() -> None:
    pool, _, fills = filler(2)
    fills.open(1, KEYS[:2], 0)
    with pytest.raises(ValueError, match="under way"):
        fills.open(1, KEYS[:2], 0)
    with pytest.raises(ValueError, match="no blocks"):
        fills.open(2, KEYS[:2], 2)
    assert not fills.give_way()
    fills.close(1)
    assert pool.num_free_blocks == 0, "its writer may be at it"
    fills.close(1, open_too=True)
    fills.close(1, open_too=True)
    assert pool.num_free_blocks == 2
    fills.commit(1, 2)
    fills.open(3, KEYS[:2], 0)
    fills.commit(3, 2)
    assert fills.give_way()
    assert pool.books.lookup(KEYS) != []
    pool.check_integrity()


# News


class Events:
    """What vLLM would tell."""

    def __init__(self, *changes: CacheChange) -> None:
        self.changes = list(changes)
        self.vllm_config: dict[str, object] = {}

    async def run(self) -> None: ...

    def take(self) -> list[CacheChange]:
        taken, self.changes = self.changes, []
        return taken

    def close(self) -> None: ...


def test_a_key_is_lost_when_neither_cache_has_it() -> None:
    pool = staging(2)
    events = Events(CacheChange(stored=(KEYS[0], KEYS[1])))
    news = CacheNews(pool, events)
    (block,), _ = take(pool, 1)
    pool.publish(block, KEYS[0])
    news.took(9, 0, KEYS[:1], [block])
    news.follow()
    news.flush(result := StepResult())
    assert [(told.handle, told.keys) for told in result.published] == [(9, (KEYS[0],)), (ELSEWHERE, (KEYS[1],))]
    assert not result.evicted
    assert not news
    pool.retire_blocks([block])
    take(pool, 2)
    assert news
    news.flush(result := StepResult())
    assert not result.evicted, "vLLM has it"
    events.changes = [CacheChange(removed=(KEYS[0],)), CacheChange(cleared=True)]
    news.follow()
    news.flush(result := StepResult())
    assert set(result.evicted) == {KEYS[0], KEYS[1]}
    assert news.keys() == []


def test_what_is_lost_within_the_step_is_not_told_as_there() -> None:
    pool = staging(2)
    news = CacheNews(pool, Events(CacheChange(stored=(KEYS[0], KEYS[1])), CacheChange(removed=(KEYS[1],))))
    news.follow()
    news.flush(result := StepResult())
    assert [told.keys for told in result.published] == [(KEYS[0],)]
    assert result.evicted == [KEYS[1]]


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


# Settings


@pytest.mark.parametrize("key", sorted(OWNED_ARGUMENTS))
def test_an_argument_that_pdserve_owns_is_refused_by_name(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        VllmSettings(model="m", engine_args={key: 1})
    assert caught.value.key == f"vllm.{key}"


@pytest.mark.parametrize("beside", ["NixlConnector", {"kv_role": "kv_both"}, 7])
def test_a_connector_beside_ours_must_be_a_mapping_that_names_one(beside: object) -> None:
    with pytest.raises(ConfigError) as caught:
        VllmSettings(model="m", engine_args={"kv_transfer_config": beside})
    assert caught.value.key == "vllm.kv_transfer_config"


def model_of(**traits: object) -> SimpleNamespace:
    """As vLLM describes a model; a plain one but for these traits."""
    config = SimpleNamespace(layer_types=traits.pop("layer_types", None), index_topk=traits.pop("index_topk", None))
    window = traits.pop("window", None)
    plain: dict[str, object] = {
        "hf_text_config": config,
        "is_encoder_decoder": False,
        "is_attention_free": False,
        "is_hybrid": False,
        "attention_chunk_size": None,
        "use_mla": False,
        "max_model_len": 4096,
        "get_sliding_window": lambda: window,
        "get_total_num_kv_heads": lambda: 2,
        "get_head_size": lambda: 64,
    }
    return SimpleNamespace(**{**plain, **traits})


@pytest.mark.parametrize(
    ("traits", "layout"),
    [
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"is_attention_free": True}, "state space (mamba)"),
        ({"is_hybrid": True}, "hybrid"),
        ({"index_topk": 2048, "use_mla": True}, "sparse MLA"),
        ({"attention_chunk_size": 8192}, "chunked local attention"),
        ({"window": 1024}, "sliding window in all layers"),
        ({"window": 1024, "layer_types": ["sliding_attention"] * 2}, "sliding window in all layers"),
    ],
)
def test_a_layout_that_is_not_supported_is_refused_by_its_name(traits: dict[str, object], layout: str) -> None:
    with pytest.raises(ConfigError) as caught:
        kv_shape(model_of(**traits))
    assert caught.value.key == "model"
    assert repr(layout) in caught.value.message


@pytest.mark.parametrize(
    ("traits", "layout", "fits"),
    [
        ({}, "full attention", False),
        ({"use_mla": True}, "MLA", False),
        (
            {"window": 1024, "layer_types": ["sliding_attention", "full_attention"]},
            "sliding window in some layers",
            False,
        ),
        ({"window": 4096}, "", True),
    ],
)
def test_a_supported_layout_has_a_name(traits: dict[str, object], layout: str, fits: bool) -> None:
    model = model_of(**traits)
    assert fits_window(model) is fits
    if layout:
        assert kv_shape(model).layout == layout


class FullAttentionSpec: ...


class SlidingWindowSpec: ...


def group_of(*kinds: type, layers: int) -> SimpleNamespace:
    names = [f"layer{number}" for number in range(layers)]
    spec = (
        kinds[0]()
        if len(kinds) == 1
        else SimpleNamespace(kv_cache_specs={name: kind() for name, kind in zip(names, kinds, strict=False)})
    )
    return SimpleNamespace(layer_names=names, kv_cache_spec=spec)


@pytest.mark.parametrize(
    ("groups", "named"),
    [
        ([group_of(SlidingWindowSpec, layers=4)], "SlidingWindowSpec"),
        ([group_of(FullAttentionSpec, layers=2), group_of(SlidingWindowSpec, layers=2)], "2 cache groups"),
        ([group_of(FullAttentionSpec, SlidingWindowSpec, layers=2)], "FullAttentionSpec and SlidingWindowSpec"),
        ([group_of(FullAttentionSpec, layers=3)], "layers that share KV"),
        ([], "no cache"),
    ],
)
def test_caches_that_vllm_made_otherwise_are_refused(groups: list[SimpleNamespace], named: str) -> None:
    check_groups([group_of(FullAttentionSpec, layers=4)], (4, 2, 2, 16, 64))
    with pytest.raises(ConfigError) as caught:
        check_groups(groups, (4, 2, 2, 16, 64))
    assert named in caught.value.message


def test_the_reason_of_vllms_side_reaches_whoever_starts_it() -> None:
    refused = start_error(RuntimeError("core failed"), "model\nKV layout 'x' is not supported")
    assert isinstance(refused, ConfigError)
    assert (refused.key, refused.message) == ("model", "KV layout 'x' is not supported")
    assert isinstance(start_error(RuntimeError("core failed"), ""), EngineFailed)


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


def test_the_engine_is_a_cache_that_a_store_can_fill() -> None:
    assert issubclass(VllmEngine, KVCache)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_the_engine_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(ConfigError) as caught:
        VllmEngine(VllmSettings(model="embedded"), LocalMemory)
    assert caught.value.key == "engine"
    assert "pip install" in caught.value.message
