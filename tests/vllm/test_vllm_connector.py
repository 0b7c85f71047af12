"""The connector's scheduler side against schedules that vLLM might make, and pages as vLLM's own kernels write them."""

from __future__ import annotations

import math
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
from kvstore.vllm_connector import LOAD_TOKENS, Copy, SchedulerSide, TransferPlan, WorkerSide
from pdserve.engine.vllm.board import Ending, TransferBoard
from pdserve.engine.vllm.pages import HalvesOrder, PagedKV, paged_kv

pytestmark = pytest.mark.vllm

BLOCK = 16


def request(num_tokens: int, *, loads: bool, slot: int = 3, name: str = "r") -> SimpleNamespace:
    count = -(-num_tokens // BLOCK)
    params = {
        "slot": slot,
        "blocks": list(range(100, 100 + count)),
        "generations": [1] * count,
        "num_tokens": num_tokens,
        "loads": loads,
        "digests": [],
    }
    return SimpleNamespace(request_id=name, kv_transfer_params=params, num_prompt_tokens=num_tokens)


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
    side, wanted = SchedulerSide(BLOCK), request(total, loads=False)
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


def check_saves(plans: list[TransferPlan], total: int) -> None:
    saves = [save for plan in plans for save in plan.saves]
    position = 0
    for save in saves:
        assert save.first == position
        assert save.last == total if save.final else save.last % BLOCK == 0
        position = save.last
    ends = [save.slot for save in saves if save.final] + [slot for plan in plans for slot in plan.dropped]
    assert ends == [3]


def test_a_resumed_request_is_read_from_its_new_blocks() -> None:
    side, wanted = SchedulerSide(BLOCK), request(64, loads=False)
    side.allocated(wanted, [], 0)
    side.plan(schedule("r", 0, 20, [7, 8], new=True))
    plan = side.plan(schedule("r", 0, 64, [1, 2, 3, 4], new=False, resumed=True))
    (save,) = plan.saves
    assert (save.first, save.last, save.vllm_blocks) == (16, 64, (1, 2, 3, 4))


def test_a_load_happens_once_even_if_vllm_asks_again() -> None:
    side, wanted = SchedulerSide(BLOCK), request(50, loads=True)
    assert side.num_loadable(wanted, 32) == 18
    assert side.num_loadable(wanted, 32) == 18
    side.allocated(wanted, [1, 2, 3, 4], 18)
    (load,) = side.plan(idle()).loads
    assert (load.first, load.last, load.final) == (32, 50, True)
    assert side.num_loadable(wanted, 0) == 0, "after a failed load or a preemption vLLM must compute"
    side.allocated(wanted, [1, 2, 3, 4], 0)
    side.finished(wanted)
    assert side.plan(idle()) == TransferPlan()


def test_a_load_that_is_not_needed_or_never_starts_is_dropped() -> None:
    side = SchedulerSide(BLOCK)
    cached, waiting, plain = (
        request(50, loads=True, slot=1, name="a"),
        request(50, loads=True, slot=2, name="b"),
        SimpleNamespace(request_id="c", kv_transfer_params=None, num_prompt_tokens=5),
    )
    side.allocated(cached, [1, 2], 0)
    side.finished(waiting)
    side.finished(plain)
    assert side.plan(idle()).dropped == [1, 2]


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
    copy = Copy("r", 0, 0, NUM_TOKENS, True, vllm_blocks, tuple(range(count)), (0,) * count, digests)
    if bad_token is not None and spoil == "bytes":
        pool.blocks[bad_token // BLOCK, 7] ^= 1
    elif bad_token is not None:
        pool.generations[bad_token // BLOCK] += 1
    worker = WorkerSide(
        {
            "staging": pool.name,
            "board": board.path,
            "num_ranks": 1,
            "num_slots": 1,
            "block_shape": SHAPE,
            "dtype": "fp32",
        },
        rank=0,
    )
    worker.register(pages)
    worker.start_loads(TransferPlan(loads=[copy]))
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
