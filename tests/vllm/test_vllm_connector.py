"""The connector's scheduler side against schedules that vLLM might make, and pages as vLLM's own kernels write them."""

from __future__ import annotations

import math
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm", reason="needs the environment of `make test-vllm`")

from vllm import _custom_ops as custom_ops

from kvstore.transports.shm import SharedMemoryPool
from kvstore.vllm_connector.plan import Copies, Load, LoadCopy, Save, SaveCopy
from kvstore.vllm_connector.scheduler_side import SchedulerSide
from kvstore.vllm_connector.worker_side import LOAD_TOKENS, WorkerSide
from pdserve.engine.vllm.board import Ending, TransferBoard
from pdserve.engine.vllm.pages import HalvesOrder, LatentOrder, PagedKV, paged_kv
from pdserve.engine.vllm.requests import PARAMS_KEY

pytestmark = pytest.mark.vllm

BLOCK = 16


def request(
    num_tokens: int,
    *,
    loads: int = 0,
    loads_from: int = 0,
    exports: bool = False,
    saves_from: int | None = None,
    name: str = "r",
) -> SimpleNamespace:
    """Of so many prompt tokens: it loads the first `loads` (slot 2), and is exported or saved (slot 3)."""
    count = -(-loads // BLOCK)
    load = {
        "slot": 2,
        "first_block": loads_from,
        "blocks": list(range(100, 100 + count - loads_from)),
        "generations": [1] * (count - loads_from),
        "num_tokens": loads,
        "digests": [],
    }
    save = {"slot": 3, "first_block": saves_from or 0, "blocks": [7, 8], "num_tokens": num_tokens if exports else 0}
    ours = {"load": load if loads else None, "save": save if exports or saves_from is not None else None}
    params = {PARAMS_KEY: ours, "do_remote_decode": False}
    return SimpleNamespace(
        request_id=name, kv_transfer_params=params, num_prompt_tokens=num_tokens, num_tokens=num_tokens
    )


def schedule(
    name: str, computed: int, scheduled: int, blocks: list[int], *, new: bool, resumed: bool = False
) -> SimpleNamespace:
    entry = SimpleNamespace(req_id=name, block_ids=(blocks,), num_computed_tokens=computed)
    cached = SimpleNamespace(
        req_ids=[] if new else [name],
        resumed_req_ids={name} if resumed else set(),
        new_block_ids=[] if new else [(blocks,)],
        num_computed_tokens=[] if new else [computed],
    )
    return SimpleNamespace(
        scheduled_new_reqs=[entry] if new else [],
        scheduled_cached_reqs=cached,
        num_scheduled_tokens={name: scheduled} if scheduled else {},
    )


def idle() -> SimpleNamespace:
    cached = SimpleNamespace(req_ids=[], resumed_req_ids=set(), new_block_ids=[], num_computed_tokens=[])
    return SimpleNamespace(scheduled_new_reqs=[], scheduled_cached_reqs=cached, num_scheduled_tokens={})


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_every_block_is_saved_once_and_every_transfer_ends_once(data: st.DataObject) -> None:
    total = data.draw(st.integers(1, 200))
    side, wanted = SchedulerSide(BLOCK), request(total, exports=True)
    computed = data.draw(st.integers(0, (total - 1) // BLOCK)) * BLOCK  # found in vLLM's prefix cache
    side.allocated(wanted, [], 0)
    plans, new, resumed, blocks = [], True, False, list(range(40))
    for _ in range(data.draw(st.integers(0, 12))):
        if computed < total:
            step = data.draw(st.integers(1, total - computed))
            plans.append(side.plan(schedule("r", computed, step, blocks, new=new, resumed=resumed)))
            computed, new, resumed = computed + step, False, False
            blocks = []
        if data.draw(st.booleans()):  # preempted: all starts anew, elsewhere
            computed, resumed = 0, not new
            blocks = list(range(50, 90))
    side.finished(wanted)
    plans.append(side.plan(idle()))
    check_saves(plans, total)


def check_saves(plans: list[Copies], total: int) -> None:
    saves = [save for plan in plans for save in plan.saves]
    position = 0
    for save in saves:
        assert save.last > position
        assert save.last == total if save.final else save.last % BLOCK == 0
        position = save.last
    ends = [save.save.slot for save in saves if save.final] + [slot for plan in plans for slot in plan.dropped]
    assert ends == [3]


def test_a_resumed_request_is_read_from_its_new_blocks() -> None:
    side, wanted = SchedulerSide(BLOCK), request(64, exports=True)
    side.allocated(wanted, [], 0)
    side.plan(schedule("r", 0, 20, [7, 8], new=True))
    plan = side.plan(schedule("r", 0, 64, [1, 2, 3, 4], new=False, resumed=True))
    (save,) = plan.saves
    assert (save.last, save.final, save.vllm_blocks) == (64, True, (1, 2, 3, 4))


def test_a_load_happens_once_even_if_vllm_asks_again() -> None:
    side, wanted = SchedulerSide(BLOCK), request(50, loads=50)
    assert side.num_loadable(wanted, 32) == 18
    assert side.num_loadable(wanted, 32) == 18
    side.allocated(wanted, [1, 2, 3, 4], 18)
    (load,) = side.plan(idle()).loads
    assert (load.first, load.last, load.load.slot) == (32, 50, 2)
    assert side.num_loadable(wanted, 0) == 0, "after a failed load or a preemption vLLM must compute"
    side.allocated(wanted, [1, 2, 3, 4], 0)
    side.finished(wanted)
    assert side.plan(idle()) == Copies()


def test_what_is_loaded_behind_vllms_own_cache_needs_it_to_be_there() -> None:
    side, wanted = SchedulerSide(BLOCK), request(100, loads=96, loads_from=4)
    assert side.num_loadable(wanted, 48) == 0, "it has lost a block of what it had"
    assert side.num_loadable(wanted, 64) == 32
    side.allocated(wanted, [1, 2, 3], 32)
    (load,) = side.plan(idle()).loads
    assert (load.first, load.last, load.load.blocks) == (64, 96, (100, 101))


def test_a_load_that_is_not_needed_or_never_starts_is_dropped() -> None:
    side = SchedulerSide(BLOCK)
    cached, waiting = request(50, loads=50, name="a"), request(50, loads=32, saves_from=2, name="b")
    foreign = {"do_remote_prefill": True, "remote_engine_id": "x"}
    plain = SimpleNamespace(request_id="c", kv_transfer_params=None, num_prompt_tokens=5)
    others = SimpleNamespace(request_id="d", kv_transfer_params=foreign, num_prompt_tokens=5)
    side.allocated(cached, [1, 2], 0)
    assert side.plan(idle()).dropped == [2]
    for ended in (cached, waiting, plain, others):
        side.finished(ended)
    assert side.plan(idle()).dropped == [2, 3]


def test_what_is_generated_is_saved_as_its_tokens_become_known() -> None:
    side, wanted = SchedulerSide(BLOCK), request(40, loads=32, saves_from=2)
    side.allocated(wanted, [1, 2, 3], 32)
    assert not side.plan(schedule("r", 32, 8, [1, 2, 3], new=True)).saves, "its third block is not whole yet"
    wanted.num_tokens = 47
    assert not side.plan(schedule("r", 46, 2, [], new=False)).saves, "scheduled before it was sampled"
    wanted.num_tokens = 49
    (save,) = side.plan(schedule("r", 48, 1, [4], new=False)).saves
    assert (save.last, save.final, save.vllm_blocks) == (48, False, (1, 2, 3, 4))
    side.finished(wanted)
    assert side.plan(idle()).dropped == [3]


LAYERS, HEADS, DIM, PAGE = 2, 3, 64, 64


class VllmKernel:
    """vLLM's CPU cache kernel, as its attention layers call it."""

    def __init__(self, isa: str) -> None:
        self.isa = isa

    def do_kv_cache_update(self, layer: object, key: object, value: object, cache: object, slots: object) -> None:
        pages, heads, tokens, _ = cache.size()
        keys, values = cache.view(pages, heads, tokens * 2, -1).chunk(2, dim=2)
        custom_ops.cpu_attn_reshape_and_cache(key, value, keys, values, slots, self.isa)


def instruction_sets() -> list[tuple[torch.dtype, str]]:
    found = [(torch.float32, "vec"), (torch.float32, "vec16"), (torch.bfloat16, "vec"), (torch.bfloat16, "vec16")]
    return [*found, (torch.bfloat16, "amx")] if torch.cpu._is_amx_tile_supported() else found


@pytest.mark.parametrize(("dtype", "isa"), instruction_sets())
def test_pages_of_vllms_kernels_are_read_and_written_to_the_bit(dtype: torch.dtype, isa: str) -> None:
    torch.manual_seed(3)
    kernel, num_tokens, vllm_blocks = VllmKernel(isa), 150, [4, 1, 6]
    content = torch.randn(LAYERS, 2, num_tokens, HEADS, DIM).to(dtype)
    caches = {f"layer{n}": torch.zeros(8, HEADS, PAGE, 2 * DIM, dtype=dtype) for n in range(LAYERS)}
    slots = torch.tensor([vllm_blocks[t // PAGE] * PAGE + t % PAGE for t in range(num_tokens)])
    for number, cache in enumerate(caches.values()):
        kernel.do_kv_cache_update(None, content[number, 0], content[number, 1], cache, slots)
    pages = paged_kv(caches, {name: SimpleNamespace(impl=kernel) for name in caches}, BLOCK, PAGE)
    blocks = pages.read(vllm_blocks, 0, num_tokens)
    tokens = blocks.permute(1, 2, 0, 4, 3, 5).reshape(LAYERS, 2, -1, HEADS, DIM)
    assert torch.equal(tokens[:, :, :num_tokens], content)
    before = [cache.clone() for cache in caches.values()]
    pages.write([2, 3, 5], 0, num_tokens, blocks)
    for cache, old in zip(caches.values(), before, strict=True):
        assert torch.equal(cache[[2, 3, 5]], old[vllm_blocks])


SHAPE = (LAYERS, 2, HEADS, BLOCK, DIM)
NUM_TOKENS = 2 * LOAD_TOKENS + 300


def side_of(pool: SharedMemoryPool, board: TransferBoard, shape: tuple[int, ...], rank: int = 0) -> WorkerSide:
    extra = {
        "staging": pool.name,
        "board": board.path,
        "num_ranks": board.num_ranks,
        "num_slots": board.num_slots,
        "block_shape": shape,
        "dtype": "fp32",
    }
    return WorkerSide(extra, rank)


@pytest.mark.parametrize(
    ("bad_token", "spoil", "ending"),
    [
        (None, None, Ending.DONE),
        (0, "bytes", Ending.CORRUPT),
        (LOAD_TOKENS + 100, "bytes", Ending.CORRUPT),
        (LOAD_TOKENS + 100, "generation", Ending.STALE),
        (NUM_TOKENS - 1, "bytes", Ending.CORRUPT),
    ],
)
def test_a_long_load_goes_up_to_the_first_bad_block(bad_token: int | None, spoil: str | None, ending: Ending) -> None:
    count = -(-NUM_TOKENS // BLOCK)
    pool, board = SharedMemoryPool(count, 4 * math.prod(SHAPE)), TransferBoard.create(1, 1)
    torch.manual_seed(9)
    content = torch.randn(count, *SHAPE)
    content[-1, :, :, :, NUM_TOKENS % BLOCK :] = 0
    pool.blocks[:] = content.numpy().view(np.uint8).reshape(count, -1)
    digests = tuple(xxhash.xxh3_128_hexdigest(block) for block in pool.blocks)
    vllm_blocks = tuple(reversed(range(-(-NUM_TOKENS // PAGE))))
    layers = tuple(torch.zeros(len(vllm_blocks), HEADS, PAGE, 2 * DIM) for _ in range(LAYERS))
    pages = PagedKV(layers, HalvesOrder(), BLOCK, PAGE)
    load = Load(0, 0, tuple(range(count)), (0,) * count, NUM_TOKENS, digests)
    copy = LoadCopy("r", load, 0, NUM_TOKENS, vllm_blocks)
    if bad_token is not None and spoil == "bytes":
        pool.blocks[bad_token // BLOCK, 7] ^= 1
    elif bad_token is not None:
        pool.generations[bad_token // BLOCK] += 1
    worker = side_of(pool, board, SHAPE)
    worker.register(pages)
    worker.start_loads(Copies(loads=[copy]))
    worker.close()  # waits for the load
    good = NUM_TOKENS if bad_token is None else bad_token // PAGE * PAGE
    assert worker.take_loaded() == {"r"}
    assert worker.take_bad_blocks() == set(vllm_blocks[good // PAGE :] if bad_token is not None else ())
    assert board.ending(0) is ending
    if good:
        found = pages.read(list(vllm_blocks), 0, good)
        assert torch.equal(found, content[: len(found)])
    board.close()
    pool.close()


def test_a_load_comes_after_the_step_under_way_and_ends_when_the_device_has_it() -> None:
    """vLLM computes on a stream of its own, the loader's thread on another: nothing else orders them."""
    log: list[str] = []
    pool, board = SharedMemoryPool(1, 4 * math.prod(SHAPE)), TransferBoard.create(1, 1)

    class Watched(PagedKV):
        def mark(self) -> None:
            log.append(f"mark by {threading.current_thread().name}")

        def follow(self, mark: object) -> None:
            log.append("follow")

        def write(self, *arguments: object) -> None:
            log.append("write")

        def settle(self) -> None:
            log.append("ended" if board.ended(0) else "settle")

    worker = side_of(pool, board, SHAPE)
    layers = tuple(torch.zeros(1, HEADS, PAGE, 2 * DIM) for _ in range(LAYERS))
    worker.register(Watched(layers, HalvesOrder(), BLOCK, PAGE))
    worker.start_loads(Copies(loads=[LoadCopy("r", Load(0, 0, (0,), (0,), BLOCK), 0, BLOCK, (0,))]))
    worker.close()
    assert log == [f"mark by {threading.current_thread().name}", "follow", "write", "settle"]
    assert board.ending(0) is Ending.DONE
    board.close()
    pool.close()


# Ranks: staging holds all heads, so a pair need not be split alike


def rank_slices(num_heads: int, num_ranks: int) -> list[slice]:
    """vLLM's own rule: heads divide among ranks, or are repeated on neighbouring ones."""
    each = max(1, num_heads // num_ranks)
    return [slice(first := rank * num_heads // num_ranks, first + each) for rank in range(num_ranks)]


@pytest.mark.parametrize(
    ("heads", "savers", "loaders"), [(4, 2, 1), (4, 1, 2), (4, 4, 2), (2, 1, 4), (2, 4, 1), (6, 3, 2)]
)
def test_blocks_of_so_many_ranks_are_read_by_any_other_number_of_them(heads: int, savers: int, loaders: int) -> None:
    torch.manual_seed(heads + 10 * savers + 100 * loaders)
    num_tokens, vllm_blocks = 150, (4, 1, 6)
    content = torch.randn(10, LAYERS, 2, heads, BLOCK, DIM)
    content[-1, :, :, :, num_tokens % BLOCK :] = 0
    pool = SharedMemoryPool(10, content[0].numel() * 4)
    board = TransferBoard.create(max(savers, loaders), 2)
    shape = (LAYERS, 2, heads, BLOCK, DIM)
    write_ranks(pool, savers, shape, content, num_tokens, vllm_blocks)
    digests = tuple(xxhash.xxh3_128_hexdigest(block) for block in pool.blocks)
    load = LoadCopy("r", Load(1, 0, tuple(range(10)), (0,) * 10, num_tokens, digests), 0, num_tokens, (0, 3, 5))
    for rank, part in enumerate(rank_slices(heads, loaders)):
        pages = empty_pages(part.stop - part.start)
        side = side_of(pool, loaders_board := TransferBoard.create(loaders, 2), shape, rank)
        side.register(pages)
        side.start_loads(Copies(loads=[load]))
        side.close()
        assert torch.equal(pages.read([0, 3, 5], 0, num_tokens), content[:, :, :, part])
        loaders_board.close()
    board.close()
    pool.close()


def empty_pages(num_heads: int) -> PagedKV:
    layers = tuple(torch.zeros(8, num_heads, PAGE, 2 * DIM) for _ in range(LAYERS))
    return PagedKV(layers, HalvesOrder(), BLOCK, PAGE)


def write_ranks(
    pool: SharedMemoryPool,
    num_ranks: int,
    shape: tuple[int, ...],
    content: torch.Tensor,
    num_tokens: int,
    vllm_blocks: tuple[int, ...],
) -> None:
    """Every rank saves its heads in two steps, the second with blocks that were granted meanwhile."""
    board = TransferBoard.create(num_ranks, 2)
    save = Save(0, 0, (0, 1, 2, 3), num_tokens)
    for rank, part in enumerate(rank_slices(shape[2], num_ranks)):
        pages = empty_pages(part.stop - part.start)
        pages.write(list(vllm_blocks), 0, num_tokens, content[:, :, :, part])
        side = side_of(pool, board, shape, rank)
        side.register(pages)
        side.save(Copies(saves=[SaveCopy(save, 96, False, vllm_blocks)]))
        if num_ranks == 1:
            assert board.num_tokens(0) == 64, "no further than there are blocks"
        for block in range(4, 10) if rank == 0 else ():
            board.grant(0, block)
        side.save(Copies(saves=[SaveCopy(save, num_tokens, True, vllm_blocks)]))
        side.close()
    assert (board.num_tokens(0), board.ending(0)) == (num_tokens, Ending.DONE)
    board.close()


def test_a_latent_is_the_same_on_every_rank() -> None:
    shape, num_tokens = (LAYERS, 1, 1, BLOCK, 96), 40
    torch.manual_seed(1)
    caches = {f"layer{n}": torch.randn(8, PAGE, 96) for n in range(LAYERS)}
    pages = paged_kv(caches, {}, BLOCK, PAGE, latent=True)
    assert isinstance(pages.order, LatentOrder)
    pool, board = SharedMemoryPool(3, 4 * math.prod(shape)), TransferBoard.create(2, 1)
    for rank in range(2):
        side = side_of(pool, board, shape, rank)
        side.register(pages)
        side.save(Copies(saves=[SaveCopy(Save(0, 0, (0, 1, 2), num_tokens), num_tokens, True, (3,))]))
        side.close()
    saved = torch.from_numpy(pool.blocks).view(torch.float32).view(3, *shape)
    for number, cache in enumerate(caches.values()):
        assert torch.equal(saved[:, number].reshape(-1, 96)[:num_tokens], cache[3, :num_tokens])
    board.close()
    pool.close()
