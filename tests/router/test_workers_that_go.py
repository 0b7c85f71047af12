"""Workers that are lost, drain, change their role, stand still or are missing, and what a request makes of it."""

import asyncio

import pytest

from pdserve.engine.sim import SimEngineConfig, expected_tokens
from pdserve.engine.timing import LinearTiming
from pdserve.errors import DeadlineExceeded, NoWorker, WorkerLost
from pdserve.types import Role
from router.surroundings import Timeouts

SLOW_DECODE = LinearTiming(0, 0, 0, 5.0, 0, 0)
"""5 ms a step."""
STUCK = LinearTiming(400.0, 0, 0, 400.0, 0, 0)


async def drop_streams(worker):
    """What a crash looks like from outside: all connections end, nothing is said."""
    await worker._server._server.stop(0)


async def test_a_prefill_worker_lost_before_the_first_token_is_a_typed_error(house, sink, incoming):
    prefill, decode = await house.pair(STUCK)
    core, got = await house.core(), sink()
    core.submit(incoming("x" * 300, max_tokens=9), got)
    await drop_streams(prefill)
    await got.result()
    assert isinstance(got.error, WorkerLost)
    assert (got.error.leg, got.error.work_done, got.error.retryable) == ("prefill", False, True)
    await house.wait_idle(decode)


async def test_a_decode_worker_lost_mid_stream_is_an_error_that_says_work_was_done(house, sink, incoming):
    prefill, decode = await house.pair(SLOW_DECODE)
    core, got = await house.core(), sink()
    got.wanted = 6
    core.submit(incoming("x" * 100, max_tokens=1000), got)
    await asyncio.wait_for(got.some.wait(), 60)
    await drop_streams(decode)
    await got.result()
    assert isinstance(got.error, WorkerLost)
    assert (got.error.leg, got.error.work_done) == ("decode", True)
    await house.wait_idle(prefill)


async def test_a_prefill_worker_lost_after_the_hand_over_costs_nothing(house, sink, incoming):
    prefill, _ = await house.pair(SLOW_DECODE)
    core, got = await house.core(), sink()
    got.wanted = 6
    handle = core.submit(incoming("x" * 100, max_tokens=40), got)
    await asyncio.wait_for(got.some.wait(), 60)
    await drop_streams(prefill)
    await got.result()
    assert got.error is None
    assert got.token_ids[0] == expected_tokens(house.sim, handle.request)


async def test_a_worker_that_comes_back_is_used_again(house, sink, incoming, wait_until):
    _, decode = await house.pair()
    core = await house.core()
    assert core.ready() is None
    await decode.stop()
    await wait_until(lambda: core.ready() is not None)
    with pytest.raises(NoWorker, match="p0: role") as caught:
        core.submit(incoming(), sink())
    assert caught.value.leg == "decode"
    again = await house.worker(Role.DECODE, "d0", listen=decode.address)
    await wait_until(lambda: core.ready() is None)
    got = sink()
    handle = core.submit(incoming(max_tokens=6), got)
    await got.result()
    assert got.token_ids[0] == expected_tokens(house.sim, handle.request)
    assert core.catalog.find(handle.request_id).decode_incarnation == again.incarnation != decode.incarnation


async def test_a_draining_worker_finishes_what_it_has_and_gets_nothing_new(house, sink, incoming, wait_until):
    _, decode = await house.pair(SLOW_DECODE)
    core, got = await house.core(), sink()
    got.wanted = 3
    handle = core.submit(incoming(max_tokens=40), got)
    await asyncio.wait_for(got.some.wait(), 60)
    draining = asyncio.ensure_future(decode.drain())
    await wait_until(lambda: core.ready() is not None)
    with pytest.raises(NoWorker, match="d0: draining"):
        core.submit(incoming(), sink())
    await got.result()
    await draining
    assert got.token_ids[0] == expected_tokens(house.sim, handle.request)


async def test_a_role_that_flips_is_noticed(house, sink, incoming, wait_until):
    await house.pair()
    spare = await house.worker(Role.PREFILL, "x0")
    core = await house.core()
    spare.set_role(Role.DECODE)
    await wait_until(lambda: len(house.fleets[0].of_model("tiny", Role.DECODE)) == 2)
    got = sink()
    handle = core.submit(incoming(max_tokens=6), got)
    await got.result()
    assert core.catalog.find(handle.request_id).prefill_worker == "p0"


@pytest.mark.parametrize(("leg", "stuck"), [("prefill", Role.PREFILL), ("transfer", Role.DECODE)])
async def test_a_leg_without_progress_is_charged_to_its_own_clock(house, sink, incoming, leg, stuck):
    for role, name in ((Role.PREFILL, "p0"), (Role.DECODE, "d0")):
        await house.worker(role, name, timing=STUCK if role is stuck else None)
    quick = {"prefill": (0.05, 9, 9), "transfer": (9, 0.05, 9)}[leg]
    core, got = await house.core(timeouts=Timeouts(*quick)), sink()
    core.submit(incoming("x" * 100, max_tokens=9), got)
    await got.result()
    assert isinstance(got.error, DeadlineExceeded)
    assert got.error.leg == leg
    assert got.error.work_done == (leg == "transfer")
    await house.wait_idle()


async def test_models_need_a_whole_pair(house, sink, incoming):
    await house.worker(Role.PREFILL, "p0")
    core = await house.core()
    assert core.ready() == "no decode worker for tiny is ready"
    assert not core.models()
    other = SimEngineConfig(core=house.sim.core, model=house.sim.model, block_tokens=8)
    await house.worker(Role.DECODE, "d0", sim=other)
    core = await house.core()
    assert "same KV layout" in core.ready()


async def test_no_worker_at_all_is_a_typed_error(house, sink, incoming):
    core = await house.core(addresses=())
    with pytest.raises(NoWorker, match="tiny"):
        core.submit(incoming(), sink())


async def test_a_name_that_workers_do_not_serve_is_told_with_those_they_do(house, sink, incoming):
    await house.pair()
    core = await house.core(models={"large": ()})
    with pytest.raises(NoWorker, match="the connected ones serve tiny"):
        core.submit(incoming(model="large"), sink())
