"""Requests that find no worker: those for which one may come wait a while, and one's misfortune is not another's."""

import asyncio

import pytest

from pdserve.engine.sim import expected_tokens
from pdserve.engine.timing import LinearTiming
from pdserve.errors import DeadlineExceeded, EngineFailed, NoWorker, WorkerLost
from pdserve.tasks import end_task
from pdserve.types import Role
from router.grace import Grace
from router.scheduling.base import Ask

CONDUCTOR = {"policy": "conductor"}
FOREVER_S = 1000.0
STUCK = LinearTiming(400.0, 0, 0, 400.0, 0, 0)


async def follow(house, *workers):
    """As if discovery had just named them."""
    await end_task(house.fleets[0]._watcher)
    house.fleets[0]._follow(frozenset(worker.address for worker in workers))


def ended(house, outcome):
    labels = {"model_name": "tiny", "outcome": outcome}
    return house.registry.get_sample_value("pdserve_worker_grace_total", labels) or 0


async def house_without_decode(house, wait_until, **options):
    """A pair whose decode worker has gone; its address is known."""
    _, decode = await house.pair()
    core = await house.core(**{"grace_s": FOREVER_S, **options})
    await decode.stop()
    await wait_until(lambda: not house.fleets[0].of_model("tiny", Role.DECODE))
    return core, decode


@pytest.mark.parametrize("policy", ["least_loaded", "conductor"])
async def test_a_request_waits_for_a_worker_that_restarts(house, sink, incoming, wait_until, policy):
    core, decode = await house_without_decode(house, wait_until, placement={"policy": policy})
    sinks = [sink() for _ in range(3)]
    handles = [core.submit(incoming(str(i), max_tokens=6), got) for i, got in enumerate(sinks)]
    assert core.served[0].placer.num_waiting == 3
    assert all(handle.waiting for handle in handles)
    await house.worker(Role.DECODE, "d0", listen=decode.address)
    for handle, got in zip(handles, sinks, strict=True):
        await got.result()
        assert got.token_ids[0] == expected_tokens(house.sim, handle.request)
    assert (ended(house, "found"), ended(house, "not_found")) == (3, 0)
    assert core.served[0].placer.num_waiting == 0


async def test_it_waits_no_longer_than_the_grace(house, sink, incoming, wait_until):
    core, _ = await house_without_decode(house, wait_until, grace_s=0.05)
    got = sink()
    core.submit(incoming(), got)
    assert not got.over.is_set()
    await got.result()
    assert isinstance(got.error, NoWorker)
    assert got.error.leg == "decode"
    assert ended(house, "not_found") == 1
    assert core.admission.num_inflight == core.served[0].placer.num_waiting == 0


async def test_where_no_such_worker_is_known_it_is_refused_at_once(house, sink, incoming):
    await house.worker(Role.PREFILL, "p0")
    core = await house.core(grace_s=FOREVER_S)
    with pytest.raises(NoWorker):
        core.submit(incoming(), sink())
    assert core.admission.num_inflight == core.served[0].placer.num_waiting == 0


async def test_a_worker_that_was_of_the_other_role_is_not_waited_for(house, sink, incoming, wait_until):
    prefill, decode = await house.pair()
    core = await house.core(grace_s=FOREVER_S, addresses=[prefill.address, decode.address])
    decode.set_role(Role.PREFILL)
    await wait_until(lambda: not house.fleets[0].of_model("tiny", Role.DECODE))
    await decode.stop()
    await wait_until(lambda: len(house.fleets[0].links) == 1)
    with pytest.raises(NoWorker):
        core.submit(incoming(), sink())


async def test_a_draining_worker_is_to_be_replaced(house, sink, incoming, wait_until):
    await house.pair()
    spare = await house.worker(Role.PREFILL, "x0")
    core = await house.core(grace_s=FOREVER_S)
    next(link for link in house.fleets[0].links if link.info.worker_id == "d0").draining = True
    house.fleets[0].changed()
    got = sink()
    core.submit(incoming(), got)
    assert not got.over.is_set()
    spare.set_role(Role.DECODE)
    await got.result()
    assert got.error is None


async def test_it_can_be_cancelled_meanwhile(house, sink, incoming, wait_until):
    core, decode = await house_without_decode(house, wait_until)
    got, other = sink(), sink()
    core.submit(incoming(), got).cancel()
    handle = core.submit(incoming(max_tokens=4), other)
    assert ended(house, "ended") == 1
    assert core.served[0].placer.num_waiting == 1
    await house.worker(Role.DECODE, "d0", listen=decode.address)
    await other.result()
    assert other.token_ids[0] == expected_tokens(house.sim, handle.request)
    assert not got.over.is_set()


async def test_its_own_deadline_goes_before(house, sink, incoming, wait_until):
    core, _ = await house_without_decode(house, wait_until)
    got = sink()
    core.submit(incoming(timeout_ms=50), got)
    await got.result()
    assert isinstance(got.error, DeadlineExceeded)
    assert got.error.leg == "queue"
    assert ended(house, "ended") == 1


async def test_when_everybody_restarts_what_the_last_ones_took_is_still_known(house, sink, incoming, wait_until):
    prefill, decode = await house.pair()
    core, first = await house.core(grace_s=FOREVER_S), sink()
    core.submit(incoming(max_tokens=2), first)
    await first.result()
    for worker in (prefill, decode):
        await worker.stop()
    await wait_until(lambda: not house.fleets[0].links)
    got = sink()
    handle = core.submit(incoming(max_tokens=6), got)
    for role, worker in ((Role.PREFILL, prefill), (Role.DECODE, decode)):
        await house.worker(role, worker.info.worker_id, listen=worker.address)
    await got.result()
    assert got.token_ids[0] == expected_tokens(house.sim, handle.request)


async def test_a_request_may_come_before_the_first_worker(house, sink, incoming, wait_until):
    prefill, decode = await house.pair()
    for worker in (prefill, decode):
        await worker.stop()
    core = await house.core(grace_s=FOREVER_S, addresses=())
    assert core.prepare(incoming()) is None  # nobody is known: `submit` refuses it
    await follow(house, prefill, decode)
    soon = core.prepare(incoming(max_tokens=6))
    for role, worker in ((Role.PREFILL, prefill), (Role.DECODE, decode)):
        await house.worker(role, worker.info.worker_id, listen=worker.address)
    got = sink()
    handle = core.submit(await soon, got)
    await got.result()
    assert got.token_ids[0] == expected_tokens(house.sim, handle.request)
    assert core.prepare(incoming()) is None


async def test_before_the_first_worker_the_requests_own_time_counts(house, sink, incoming):
    prefill = await house.worker(Role.PREFILL, "p0")
    await prefill.stop()
    core = await house.core(grace_s=FOREVER_S, addresses=())
    await follow(house, prefill)
    prepared = await core.prepare(incoming(timeout_ms=50))
    with pytest.raises(NoWorker):
        core.submit(prepared, sink())


# ---- one plan, several decisions ----


async def waiting_behind_a_stuck_worker(house, sinks, incoming):
    stuck = await house.worker(Role.PREFILL, "p0", timing=STUCK)
    await house.worker(Role.DECODE, "d0")
    core = await house.core(placement={**CONDUCTOR, "disaggregate": "always"})
    handles = [core.submit(incoming(f"{i}" * 300, max_tokens=4), got) for i, got in enumerate(sinks)]
    return stuck, core, handles


async def test_a_sink_that_cancels_another_request_of_the_same_plan_costs_the_rest_nothing(house, sink, incoming):
    class Cancels(sink):
        def on_error(self, error):
            super().on_error(error)
            self.other.cancel()

    sinks = [sink(), Cancels(), sink(), sink()]
    stuck, core, handles = await waiting_behind_a_stuck_worker(house, sinks, incoming)
    assert core.served[0].placer.num_waiting == 3
    sinks[1].other = handles[2]
    await stuck._server._server.stop(0)
    for got in (sinks[0], sinks[1], sinks[3]):
        await got.result()
        assert isinstance(got.error, NoWorker | WorkerLost)
    assert handles[2].record.outcome == "cancelled"
    assert core.admission.num_inflight == 0


async def test_a_placement_that_breaks_costs_only_its_own_request(house, sink, incoming, wait_until, monkeypatch):
    sinks = [sink() for _ in range(4)]
    _, core, handles = await waiting_behind_a_stuck_worker(house, sinks, incoming)
    spare = await house.worker(Role.PREFILL, "p1")
    (link,) = [link for link in house.fleets[0].links if link.info.worker_id == "p0"]
    submit = type(link).submit

    def broken(self, request, *rest):
        if request is handles[1].request and self.info.role is Role.PREFILL:
            raise ValueError("a fault")
        return submit(self, request, *rest)

    monkeypatch.setattr(type(link), "submit", broken)
    await follow(house, *house.workers[:2], spare)
    for got in sinks:
        await got.result()
    assert isinstance(sinks[1].error, EngineFailed)
    for number in (0, 2, 3):
        assert sinks[number].token_ids[0] == expected_tokens(house.sim, handles[number].request)
    assert core.admission.num_inflight == 0
    await house.wait_idle()


async def test_a_placement_that_breaks_at_once_is_told_to_its_client(house, sink, incoming, monkeypatch):
    await house.pair()
    core = await house.core()
    link = house.fleets[0].links[0]
    with monkeypatch.context() as broken:
        broken.setattr(type(link), "submit", lambda *_: 1 / 0)
        got = sink()
        core.submit(incoming(), got)
        await got.result()
    assert isinstance(got.error, EngineFailed)
    assert core.admission.num_inflight == 0
    good = sink()
    core.submit(incoming(max_tokens=3), good)
    await asyncio.wait_for(good.result(), 60)
    assert good.error is None


class Timer:
    def __init__(self, at_s, call):
        self.at_s, self.call = at_s, call

    def when(self):
        return self.at_s

    def cancel(self):
        self.at_s = FOREVER_S


class Time:
    """A loop of which only the time passes."""

    def __init__(self):
        self.now = 0.0
        self.timers = []

    def time(self):
        return self.now

    def call_at(self, when, call):
        self.timers.append(Timer(when, call))
        return self.timers[-1]

    def due(self):
        return [timer for timer in self.timers if timer.at_s <= self.now]


def test_one_that_is_in_the_queue_again_past_its_time_wakes_nobody():
    loop, error, woken = Time(), NoWorker("none"), []
    grace = Grace(
        5.0, loop, expects=lambda role: True, again=lambda: woken.append(loop.now), count=lambda outcome: None
    )
    first, second = Ask("1", "m", 10, 10), Ask("2", "m", 10, 10)
    assert grace.takes(first, error)
    assert grace.wake() == [first]  # a worker is there, and busy
    loop.now = 7.0
    assert grace.takes(second, error)
    for timer in loop.due():
        timer.at_s = FOREVER_S
        timer.call()
    assert grace.takes(second, error)
    assert (loop.due(), woken) == ([], [7.0])  # the first one's timer, and no more of them
    loop.now = 12.0
    assert not grace.takes(second, error)
    assert loop.due()
