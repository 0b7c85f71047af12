"""How requests come to their workers: queues, retries, migration, the index and its audit. Real workers, sim engine."""

import asyncio
from dataclasses import replace

import pytest
from msgspec import structs

from pdserve.engine.sim import expected_tokens
from pdserve.engine.timing import LinearTiming
from pdserve.errors import DeadlineExceeded, Draining, ModelNotFound, NoWorker, Overloaded, WorkerLost
from pdserve.types import Role
from pdserve_cli import explain
from router.surroundings import Timeouts

SLOW_DECODE = LinearTiming(0, 0, 0, 5.0, 0, 0)
SLOW_PREFILL = LinearTiming(60.0, 0, 0, 0, 0, 0)
"""60 ms a chunk of 64 tokens."""
STUCK = LinearTiming(400.0, 0, 0, 400.0, 0, 0)
CONDUCTOR = {"policy": "conductor"}


async def drop_streams(worker):
    await worker._server._server.stop(0)


# ---- retries and migration ----


async def test_with_nobody_else_the_loss_itself_is_told(house, sink, incoming):
    lost = await house.worker(Role.PREFILL, "p0", timing=STUCK)
    await house.worker(Role.DECODE, "d0")
    core, got = await house.core(max_retries=2), sink()
    handle = core.submit(incoming("x" * 300, max_tokens=9), got)
    await drop_streams(lost)
    await got.result()
    assert isinstance(got.error, WorkerLost)
    assert (got.error.leg, got.error.work_done) == ("prefill", False)
    assert [attempt.outcome for attempt in core.catalog.find(handle.request_id).attempts] == ["worker_lost"]
    await house.wait_idle(house.workers[1])


async def test_a_lost_prefill_is_done_elsewhere(house, sink, incoming):
    stuck = await house.worker(Role.PREFILL, "p0", timing=STUCK)
    await house.worker(Role.PREFILL, "p1", timing=STUCK)
    await house.worker(Role.DECODE, "d0")
    core = await house.core(max_retries=2)
    sinks = [sink() for _ in range(4)]
    handles = [core.submit(incoming("x" * 100 + str(i), max_tokens=9), got) for i, got in enumerate(sinks)]
    first = [handle for handle in handles if handle.record.prefill_worker == "p0"]
    assert first
    await drop_streams(stuck)
    for handle, got in zip(handles, sinks, strict=True):
        await got.result()
        assert got.error is None
        assert got.token_ids[0] == expected_tokens(house.sim, handle.request)
    record = core.catalog.find(first[0].request_id)
    assert [attempt.outcome for attempt in record.attempts] == ["worker_lost", "ok"]
    assert record.prefill_worker == "p1"
    await house.wait_idle(*house.workers[1:])


@pytest.mark.parametrize("stop", [(), ("never in the text",)])
async def test_a_lost_decode_migrates_with_no_gap_and_no_repeat(house, sink, incoming, stop):
    await house.worker(Role.PREFILL, "p0")
    for name in ("d0", "d1"):
        await house.worker(Role.DECODE, name, timing=SLOW_DECODE)
    core, got = await house.core(max_retries=2), sink()
    got.wanted = 6
    handle = core.submit(incoming("x" * 100, max_tokens=60, temperature=0.8, seed=3, stop=stop), got)
    await asyncio.wait_for(got.some.wait(), 10)
    first = handle.record.decode_worker
    await drop_streams(next(worker for worker in house.workers if worker.info.worker_id == first))
    await got.result()
    assert got.error is None
    assert got.token_ids[0] == expected_tokens(house.sim, handle.request)
    record = core.catalog.find(handle.request_id)
    assert [attempt.outcome for attempt in record.attempts] == ["worker_lost", "ok"]
    assert record.attempts[1].num_prior_tokens >= 6
    assert record.decode_worker != first
    assert got.usage.completion_tokens == 60
    await house.wait_idle(*(worker for worker in house.workers if worker.info.worker_id != first))


@pytest.mark.parametrize("how", ["lost", "draining"])
async def test_another_decode_worker_is_bound_while_prefill_goes_on(house, sink, incoming, how):
    """Nothing was handed over yet, so what prefill has computed is not lost."""
    await house.worker(Role.PREFILL, "p0", timing=STUCK)
    decodes = [await house.worker(Role.DECODE, name) for name in ("d0", "d1")]
    core, got = await house.core(max_retries=2), sink()
    if how == "draining":
        for worker in decodes:
            worker.jobs.draining = True
    handle = core.submit(incoming("x" * 100, n=2, max_tokens=9, temperature=0.7, seed=2), got)
    first = handle.record.decode_worker
    other = next(worker for worker in decodes if worker.info.worker_id != first)
    if how == "lost":
        await drop_streams(next(worker for worker in decodes if worker is not other))
    else:
        other.jobs.draining = False
        next(link for link in house.fleets[0].links if link.info.worker_id == first).draining = True
        house.fleets[0].changed()
    await got.result()
    assert got.error is None
    for choice in range(2):
        assert got.token_ids[choice] == expected_tokens(house.sim, handle.request, choice)
    record = core.catalog.find(handle.request_id)
    assert [attempt.outcome for attempt in record.attempts] == ["ok"]
    assert record.decode_worker == other.info.worker_id
    assert [pick.worker_id for pick in record.last.picks if pick.role == "decode"] == [first, other.info.worker_id]
    await house.wait_idle(house.workers[0], other)


async def test_several_choices_that_have_output_cannot_move(house, sink, incoming):
    await house.worker(Role.PREFILL, "p0")
    for name in ("d0", "d1"):
        await house.worker(Role.DECODE, name, timing=SLOW_DECODE)
    core, got = await house.core(max_retries=2), sink()
    got.wanted = 6
    handle = core.submit(incoming("x" * 100, n=2, max_tokens=600), got)
    await asyncio.wait_for(got.some.wait(), 10)
    first = handle.record.decode_worker
    await drop_streams(next(worker for worker in house.workers if worker.info.worker_id == first))
    await got.result()
    assert isinstance(got.error, WorkerLost)
    assert got.error.work_done


async def test_retries_are_bounded_and_end_in_the_error_of_the_last_worker(house, sink, incoming):
    for name in ("d0", "d1", "d2"):
        await house.worker(Role.DECODE, name, timing=SLOW_DECODE)
    core, got = await house.core(max_retries=1, placement={"disaggregate": "never"}), sink()
    handle = core.submit(incoming("x" * 100, max_tokens=3000), got)
    for wanted in (3, 40):
        got.some.clear()
        got.wanted = wanted
        await asyncio.wait_for(got.some.wait(), 10)
        name = handle.record.decode_worker
        await drop_streams(next(worker for worker in house.workers if worker.info.worker_id == name))
    await got.result()
    assert (got.error.reason, got.error.leg, got.error.work_done) == ("worker_lost", "decode", True)
    assert len(core.catalog.find(handle.request_id).attempts) == 2


async def test_a_submission_that_crosses_a_drain_notice_goes_elsewhere(house, sink, incoming):
    draining = await house.worker(Role.PREFILL, "p0")
    await house.worker(Role.PREFILL, "p1")
    await house.worker(Role.DECODE, "d0")
    core = await house.core(max_retries=2)
    sinks = [sink() for _ in range(6)]
    draining.jobs.draining = True  # it has decided to go, and its notice is not out yet
    handles = [core.submit(incoming("x" * 40 + str(i), max_tokens=5), got) for i, got in enumerate(sinks)]
    link = next(link for link in house.fleets[0].links if link.info.worker_id == "p0")
    link.draining = True
    house.fleets[0].changed()
    for handle, got in zip(handles, sinks, strict=True):
        await got.result()
        assert got.error is None
        assert got.token_ids[0] == expected_tokens(house.sim, handle.request)
    outcomes = {core.catalog.find(handle.request_id).attempts[0].outcome for handle in handles}
    assert outcomes == {"draining", "ok"}


# ---- the queue ----


async def test_requests_wait_at_the_router_until_a_worker_is_free(house, sink, incoming):
    await house.worker(Role.PREFILL, "p0", timing=SLOW_PREFILL)
    await house.worker(Role.DECODE, "d0")
    core = await house.core(placement=CONDUCTOR)
    sinks = [sink() for _ in range(6)]
    handles = [core.submit(incoming(f"{i}" * 300, max_tokens=4), got) for i, got in enumerate(sinks)]
    assert core.served[0].placer.num_waiting >= 4
    for handle, got in zip(handles, sinks, strict=True):
        await got.result()
        assert got.token_ids[0] == expected_tokens(house.sim, handle.request)
    waited = [core.catalog.find(handle.request_id).last.waited_s for handle in handles]
    assert waited[0] < 0.01
    assert waited[-1] > 0.1
    await house.wait_idle()


async def test_a_request_that_waits_can_be_cancelled(house, sink, incoming):
    await house.worker(Role.PREFILL, "p0", timing=SLOW_PREFILL)
    await house.worker(Role.DECODE, "d0")
    core = await house.core(placement=CONDUCTOR)
    sinks = [sink() for _ in range(4)]
    handles = [core.submit(incoming(f"{i}" * 300, max_tokens=4), got) for i, got in enumerate(sinks)]
    assert handles[-1].waiting
    record = core.record(handles[-1].request_id)
    assert (record["outcome"], record["attempts"]) == ("", [])
    assert "it waits for a worker" in "\n".join(explain.lines(record))
    handles[-1].cancel()
    for got in sinks[:-1]:
        await got.result()
    assert not sinks[-1].over.is_set()
    record = core.catalog.find(handles[-1].request_id)
    assert (record.outcome, record.attempts) == ("cancelled", [])
    assert core.admission.num_inflight == core.served[0].placer.num_waiting == 0
    await house.wait_idle()


async def test_a_request_waits_no_longer_than_the_queue_allows(house, sink, incoming):
    await house.worker(Role.PREFILL, "p0", timing=STUCK)
    await house.worker(Role.DECODE, "d0")
    core = await house.core(placement=CONDUCTOR, timeouts=Timeouts(10, 10, 10, queue_s=0.05))
    sinks = [sink() for _ in range(3)]
    for i, got in enumerate(sinks):
        core.submit(incoming(f"{i}" * 300, max_tokens=4), got)
    await sinks[-1].result()
    assert isinstance(sinks[-1].error, DeadlineExceeded)
    assert (sinks[-1].error.leg, sinks[-1].error.work_done) == ("queue", False)


async def test_a_worker_is_told_the_time_that_is_left(house, sink, incoming, wait_until):
    await house.worker(Role.PREFILL, "p0", timing=SLOW_PREFILL)
    await house.worker(Role.DECODE, "d0")
    core = await house.core(placement=CONDUCTOR)
    sinks = [sink() for _ in range(3)]
    handles = [core.submit(incoming(f"{i}" * 300, max_tokens=2, timeout_ms=9000), got) for i, got in enumerate(sinks)]
    assert handles[-1].waiting
    await wait_until(lambda: not handles[-1].waiting)
    waited_ms = 1000 * handles[-1].attempt.waited_s
    assert waited_ms > 50
    assert 0 < handles[-1]._submitted.timeout_ms <= 9000 - waited_ms + 1
    for got in sinks:
        await got.result()
        assert got.error is None


async def test_those_that_wait_are_told_when_the_last_worker_goes(house, sink, incoming):
    lost = await house.worker(Role.PREFILL, "p0", timing=STUCK)
    await house.worker(Role.DECODE, "d0")
    core = await house.core(placement={**CONDUCTOR, "disaggregate": "always"})
    sinks = [sink() for _ in range(3)]
    for i, got in enumerate(sinks):
        core.submit(incoming(f"{i}" * 300, max_tokens=4), got)
    assert core.served[0].placer.num_waiting
    await drop_streams(lost)
    for got in sinks:
        await got.result()
    assert {type(got.error) for got in sinks} <= {WorkerLost, NoWorker, type(None)}
    assert core.admission.num_inflight == 0


async def test_a_full_queue_refuses_with_a_time_to_come_back(house, sink, incoming):
    await house.worker(Role.PREFILL, "p0", timing=STUCK)
    await house.worker(Role.DECODE, "d0")
    core = await house.core(placement=CONDUCTOR, max_waiting=2)
    sinks = [sink() for _ in range(3)]
    for i, got in enumerate(sinks):
        core.submit(incoming(f"{i}" * 300, max_tokens=4), got)
    assert core.served[0].placer.num_waiting == 2
    with pytest.raises(Overloaded, match="wait for a worker") as caught:
        core.submit(incoming("z" * 300), sink())
    assert caught.value.retry_after_s >= 0.1
    urgent = sink()
    core.submit(structs.replace(incoming("y" * 300), priority=-1), urgent)
    assert isinstance(sinks[2].error, Overloaded)  # the newest of the less important made room
    assert core.served[0].placer.num_waiting == 2
    core.admission.draining = True
    with pytest.raises(Draining):
        core.submit(structs.replace(incoming("x" * 300), priority=-2), sink())
    assert core.served[0].placer.num_waiting == 2  # nobody gave way to what is refused anyway


async def test_a_session_stays_on_its_worker(house, sink, incoming):
    for name in ("p0", "p1", "p2"):
        await house.worker(Role.PREFILL, name)
    await house.worker(Role.DECODE, "d0")
    core = await house.core(placement={"policy": "session"})
    used = {}
    for turn in range(3):
        for session in ("anna", "ben", "carla", "dora"):
            got = sink()
            handle = core.submit(structs.replace(incoming(f"{session} {turn}", max_tokens=2), session=session), got)
            await got.result()
            used.setdefault(session, set()).add(core.catalog.find(handle.request_id).prefill_worker)
    assert all(len(workers) == 1 for workers in used.values())
    assert len(set.union(*used.values())) > 1


async def test_what_would_wait_beyond_the_slo_is_refused_at_once(house, sink, incoming):
    await house.worker(Role.PREFILL, "p0", timing=SLOW_PREFILL)
    await house.worker(Role.DECODE, "d0")
    core = await house.core(placement=CONDUCTOR, max_queue_s=0.35)
    placer, sinks = core.served[0].placer, [sink() for _ in range(5)]
    for i, got in enumerate(sinks):
        core.submit(incoming(f"{i}" * 300, max_tokens=4), got)
    assert placer.wait_s(0) > 0.35  # by the first guess of a pace
    with pytest.raises(Overloaded, match=r"the limit is 0\.35 s") as caught:
        core.submit(incoming("z" * 300), sink())
    assert caught.value.retry_after_s >= 0.1
    assert placer.wait_s(-1) == 0.0
    urgent = sink()
    core.submit(structs.replace(incoming("y" * 300, max_tokens=2), priority=-1), urgent)
    for got in (*sinks, urgent):
        await got.result()
        assert got.error is None
    assert core.admission.num_inflight == 0


# ---- several models ----


async def test_each_model_has_its_own_workers_names_and_bounds(house, sink, incoming):
    await house.pair()
    small = replace(house.sim, model=replace(house.sim.model, name="small", max_model_len=64))
    for role, name in ((Role.PREFILL, "sp"), (Role.DECODE, "sd")):
        await house.worker(role, name, sim=small, model_name="small")
    core = await house.core(models={"tiny": ("t",), "small": ("s",)})
    assert {model.name for model in core.models()} == {"tiny", "t", "small", "s"}
    for name, workers in (("t", ("p0", "d0")), ("small", ("sp", "sd"))):
        got = sink()
        handle = core.submit(incoming("abc" * 10, model=name, max_tokens=4), got)
        await got.result()
        record = core.catalog.find(handle.request_id)
        assert (record.prefill_worker, record.decode_worker) == workers
    with pytest.raises(ModelNotFound, match="'tiny', 'small'"):
        core.submit(incoming(model="nope"), sink())
    with pytest.raises(Exception, match="64 tokens"):
        core.submit(incoming("x" * 80, model="s"), sink())


async def test_one_model_without_workers_leaves_the_other_alone(house, sink, incoming):
    await house.pair()
    core, got = await house.core(models={"tiny": (), "gone": ()}), sink()
    assert core.ready() is None
    assert {model.name for model in core.models()} == {"tiny"}
    core.submit(incoming(max_tokens=3), got)
    await got.result()
    with pytest.raises(NoWorker, match="no worker for gone"):
        core.submit(incoming(model="gone"), sink())


async def test_a_rolling_upgrade_pairs_only_equal_revisions(house, sink, incoming):
    upgraded = replace(house.sim, model=replace(house.sim.model, revision="r2"), model_seed=1)
    for sim, tag in ((house.sim, "r1"), (upgraded, "r2")):
        await house.worker(Role.PREFILL, f"p-{tag}", sim=sim)
        await house.worker(Role.DECODE, f"d-{tag}", sim=sim)
    core = await house.core(placement={**CONDUCTOR, "disaggregate": "always"})
    sinks = [sink() for _ in range(12)]
    handles = [core.submit(incoming(f"{i} " * 100, max_tokens=5), got) for i, got in enumerate(sinks)]
    seen = set()
    for handle, got in zip(handles, sinks, strict=True):
        await got.result()
        record = core.catalog.find(handle.request_id)
        assert record.prefill_worker[2:] == record.decode_worker[2:] == record.revision
        sim = house.sim if record.revision == "r1" else upgraded
        assert got.token_ids[0] == expected_tokens(sim, handle.request)
        seen.add(record.revision)
    assert seen == {"r1", "r2"}
