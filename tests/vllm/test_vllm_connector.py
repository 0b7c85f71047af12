"""The connector's scheduler side against schedules that vLLM might make."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm", reason="needs the environment of `make test-vllm`")

from kvstore.vllm_connector import SchedulerSide, TransferPlan

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
