"""A router's stream: greeting, refusals, limits, and what becomes of it when things go wrong."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import chain

import pytest
from session_client import RouterSession, finish_reason
from worker_pair import SIM, Constant, expected, make_request, running, sim_builder, until_free

from pdserve.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    Draining,
    EngineFailed,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    PdserveError,
    ProtocolMismatch,
)
from pdserve.rpc import Channel, ClientStream
from pdserve.types import FinishReason, Phase, Role, SamplingParams
from pdserve.v1 import worker_service_pb2
from pdserve.wire.session import SESSION, RouterHello, RouterUpdate, Submission

SLOW = sim_builder(timing=Constant(5.0))


async def test_the_worker_introduces_itself_first() -> None:
    async with running(Role.PREFILL, labels={"rack": "r1"}) as worker:
        router = await RouterSession.open(worker.address)
        info = router.hello.worker
        assert info == worker.info
        assert (info.role, info.address, info.labels) == (Role.PREFILL, worker.address, (("rack", "r1"),))
        assert info.worker_id == f"prefill-{worker.address}"
        assert info.transports == ("shm", "tcp")
        assert info.num_blocks == 512
        await router.until(lambda: router.load is not None)
        assert router.load.num_total_blocks == 512
        await router.close()


async def test_routers_without_a_common_protocol_version_are_refused() -> None:
    async with running() as worker:
        router = await RouterSession.open(worker.address, protocol_min=7, protocol_max=9)
        assert isinstance(await router.ended, ProtocolMismatch)
        await router.close()


async def test_a_session_must_begin_with_the_routers_hello() -> None:
    async with running() as worker:
        channel = Channel(worker.address)
        stream = channel.open(SESSION)
        await stream.read()
        await stream.write(RouterUpdate(cancels=[1]))
        with pytest.raises(InvalidRequest):
            await stream.read()
        await channel.close()


@pytest.mark.parametrize(
    ("changes", "error", "param"),
    [
        ({"model": "gpt-17"}, ModelNotFound, "model"),
        ({"lora": "french"}, ModelNotFound, "lora"),
        ({"prompt_token_ids": (1,) * 9000}, ContextLengthExceeded, None),
        ({"prompt_token_ids": (10**6,)}, InvalidRequest, None),
    ],
)
@pytest.mark.parametrize("phase", list(Phase))
async def test_a_request_that_cannot_run_is_answered_by_name(
    changes: dict[str, object], error: type[PdserveError], param: str | None, phase: Phase
) -> None:
    async with running() as worker:
        router = await RouterSession.open(worker.address)
        reply = router.submit(make_request(**changes), phase)
        with pytest.raises(error) as caught:
            await reply.result()
        if param:
            assert caught.value.param == param
        good = make_request("good")
        assert await router.submit(good, Phase.FULL).result() == expected(good)
        await until_free(worker)
        await router.close()


async def test_a_submission_that_cannot_be_read_costs_only_itself() -> None:
    async with running() as worker:
        router = await RouterSession.open(worker.address)
        good = router.submit(make_request(), Phase.FULL)
        bad = router.expect(1)
        with_unknown_phase(router, bad.handle)
        router.send(RouterUpdate(submissions=[Submission(bad.handle, Phase.FULL, make_request())]))
        with pytest.raises(InvalidRequest) as caught:
            await bad.result()
        assert caught.value.param == "phase"
        assert await good.result() == expected(make_request())
        await router.close()


def with_unknown_phase(router: RouterSession, handle: int) -> None:
    """This submission will be that of a router of a newer release, with a phase that nobody knows here."""
    stream = router._stream
    encode = stream._encode

    def encode_newer(update: RouterUpdate) -> bytes:
        message = worker_service_pb2.RouterMessage.FromString(encode(update))
        for submission in message.submissions:
            submission.phase = 99 if submission.handle == handle else submission.phase
        return message.SerializeToString()

    stream._encode = encode_newer


async def test_a_handle_in_use_is_refused_and_its_owner_unharmed() -> None:
    async with running(build=SLOW) as worker:
        router = await RouterSession.open(worker.address)
        reply = router.submit(make_request(max_tokens=30), Phase.FULL)
        router.send(RouterUpdate(submissions=[Submission(reply.handle, Phase.FULL, make_request("twin"))]))
        with pytest.raises(InvalidRequest) as caught:
            await reply.result()
        assert caught.value.param == "handle"
        await router.close()


async def test_several_routers_share_a_worker_without_mixing_their_tokens() -> None:
    async with running() as worker:
        routers = [await RouterSession.open(worker.address, f"router-{i}") for i in range(3)]
        requests = [[make_request(f"{i}-{k}", length=20 + 7 * k + i) for k in range(5)] for i in range(3)]
        replies = [[r.submit(q, Phase.FULL) for q in qs] for r, qs in zip(routers, requests, strict=True)]
        assert {reply.handle for reply in replies[0]} == {reply.handle for reply in replies[1]}
        for reply, request in zip(chain(*replies), chain(*requests), strict=True):
            assert await reply.result() == expected(request)
        routers[0].break_off()
        request = make_request("still here")
        assert await routers[1].submit(request, Phase.FULL).result() == expected(request)
        for router in routers:
            await router.close()


async def test_one_router_gets_one_message_a_step() -> None:
    async with running(build=sim_builder(timing=Constant(4.0))) as worker:
        router = await RouterSession.open(worker.address)
        replies = [router.submit(make_request(f"m{i}", length=16, max_tokens=20), Phase.FULL) for i in range(8)]
        for reply in replies:
            await reply.result()
        assert router.num_steps <= 26  # 20 tokens and a few steps to get all eight going; 160 would be one a token
        await router.close()


async def test_a_deadline_ends_the_request_with_its_leg() -> None:
    async with running(build=SLOW) as worker:
        router = await RouterSession.open(worker.address)
        other = make_request("other", max_tokens=40, timeout_ms=60_000)
        unhurried = router.submit(other, Phase.FULL)
        for timeout_ms in (100, 1000, 10_000):  # a busy machine may need longer to begin
            slow = router.submit(make_request("slow", max_tokens=7000, timeout_ms=timeout_ms), Phase.FULL)
            with pytest.raises(DeadlineExceeded) as caught:
                await slow.result()
            if caught.value.work_done:
                break
        assert (caught.value.leg, caught.value.work_done) == ("decode", True)
        assert await unhurried.result() == expected(other)
        await until_free(worker)
        await router.close()


async def test_a_decode_that_hears_nothing_of_its_prefill_ends_by_itself() -> None:
    async with running(relay_timeout_s=0.3) as worker:
        router = await RouterSession.open(worker.address)
        reply = router.submit(make_request(), Phase.DECODE)
        with pytest.raises(PdserveError) as caught:
            await reply.result()
        assert caught.value.reason == "transfer_timeout"
        await until_free(worker)
        await router.close()


async def test_a_choice_can_be_stopped_alone() -> None:
    async with running(build=SLOW) as worker:
        router = await RouterSession.open(worker.address)
        params = SamplingParams(n=2, temperature=1.0, seed=5, max_tokens=60, ignore_eos=True)
        request = make_request(params=params)
        reply = router.submit(request, Phase.FULL)
        await reply.until(lambda: len(reply.tokens[0]) > 2)
        router.cancel_choice(reply, 0)
        await reply.until(lambda: 1 in reply.finishes)
        assert 0 not in reply.finishes
        assert reply.output(1) == expected(request, 1)
        assert len(reply.tokens[0]) < 60
        await until_free(worker)
        await router.close()


async def test_stopping_every_choice_ends_the_request() -> None:
    async with running(build=SLOW) as worker:
        router = await RouterSession.open(worker.address)
        reply = router.submit(make_request(max_tokens=7000), Phase.FULL)
        await reply.until(lambda: len(reply.tokens[0]) > 2)
        router.cancel_choice(reply, 0)
        await until_free(worker)
        assert len(worker.jobs) == 0
        await router.close()


async def test_a_cancelled_request_says_nothing_more() -> None:
    async with running(build=SLOW) as worker:
        router = await RouterSession.open(worker.address)
        reply = router.submit(make_request(max_tokens=7000), Phase.FULL)
        await reply.until(lambda: len(reply.tokens[0]) > 2)
        router.cancel(reply)
        router.cancel(reply)
        await until_free(worker)
        assert not reply.finishes
        await router.close()


async def test_a_router_that_closes_its_side_cancels_its_requests() -> None:
    async with running(build=SLOW) as worker:
        router = await RouterSession.open(worker.address)
        reply = router.submit(make_request(max_tokens=7000), Phase.FULL)
        await reply.until(lambda: len(reply.tokens[0]) > 2)
        await router.half_close()
        assert await router.ended is None
        await until_free(worker)
        await router.close()


async def test_a_router_that_does_not_read_loses_its_stream_and_nobody_else_is_hurt() -> None:
    big = sim_builder(replace(SIM, core=replace(SIM.core, num_blocks=8192)))
    async with running(build=big, session_buffer_steps=20) as worker:
        good = await RouterSession.open(worker.address)
        channel = Channel(worker.address)
        deaf = channel.open(SESSION)
        await deaf.read()
        params = SamplingParams(temperature=0.0, seed=1, max_tokens=2000, ignore_eos=True, logprobs=20)
        requests = [Submission(i, Phase.FULL, make_request(f"d{i}", length=16, params=params)) for i in range(60)]
        await deaf.write(RouterUpdate(hello=RouterHello("deaf", 1), submissions=requests))
        await good.until(lambda: good.load is not None and good.load.num_running > 0)
        await until_free(worker)  # the deaf router's requests are gone, long before their 120,000 tokens
        request = make_request("good", max_tokens=200)
        assert await good.submit(request, Phase.FULL).result() == expected(request)
        num_tokens, error = await _read_to_the_end(deaf)
        assert isinstance(error, Overloaded)
        assert num_tokens < 100_000
        await channel.close()
        await good.close()


async def _read_to_the_end(stream: ClientStream) -> tuple[int, PdserveError | None]:
    num_tokens = 0
    try:
        while (update := await stream.read()) is not None:
            num_tokens += len(update.step.token_ids) if update.step else 0
    except PdserveError as error:
        return num_tokens, error
    return num_tokens, None


async def test_a_draining_worker_finishes_what_runs_and_takes_nothing_new() -> None:
    async with running(build=SLOW) as worker:
        router = await RouterSession.open(worker.address)
        request = make_request(max_tokens=30)
        reply = router.submit(request, Phase.FULL)
        await reply.until(lambda: len(reply.tokens[0]) > 2)
        draining = asyncio.create_task(worker.drain())
        await router.until(lambda: router.draining)
        with pytest.raises(Draining):
            await router.submit(make_request("late"), Phase.FULL).result()
        assert not draining.done()
        assert await reply.result() == expected(request)
        await draining
        late = await RouterSession.open(worker.address)
        await late.until(lambda: late.draining)
        await late.close()
        await router.close()


async def test_a_drain_ends_though_a_request_does_not() -> None:
    async with running(build=SLOW, drain_timeout_s=0.2) as worker:
        router = await RouterSession.open(worker.address)
        reply = router.submit(make_request(max_tokens=7000), Phase.FULL)
        await reply.until(lambda: len(reply.tokens[0]) > 2)
        await worker.drain()
        await worker.stop()
        with pytest.raises(Draining) as caught:
            await reply.result()
        assert caught.value.work_done
        assert await router.ended is None
        await router.close()


async def test_an_engine_that_raises_fails_its_requests_and_the_worker() -> None:
    async with running(build=sim_builder(timing=_Bomb(20))) as worker:
        routers = [await RouterSession.open(worker.address) for _ in range(2)]
        replies = [router.submit(make_request(max_tokens=500), Phase.FULL) for router in routers]
        waiting = routers[0].submit(make_request("never relayed"), Phase.DECODE)
        for reply in (*replies, waiting):
            with pytest.raises(EngineFailed) as caught:
                await reply.result()
            assert "out of dilithium" in caught.value.message
            ran = reply is not waiting
            assert (caught.value.leg, caught.value.work_done) == ("decode" if ran else "transfer", ran)
        for router in routers:
            assert isinstance(await router.ended, EngineFailed)
            await router.close()
        assert isinstance(await worker.failed, EngineFailed)


class _Bomb(Constant):
    """A timing model that raises in the middle of a step after a while."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def step_ms(self, work: object) -> float:
        object.__setattr__(self, "steps", self.steps - 1)
        if self.steps < 0:
            raise ValueError("out of dilithium")
        return 1.0


async def test_a_role_flip_is_told_to_connected_routers() -> None:
    async with running(Role.PREFILL) as worker:
        router = await RouterSession.open(worker.address)
        worker.set_role(Role.DECODE)
        await router.until(lambda: bool(router.hellos))
        assert router.hellos[-1].worker.role is Role.DECODE
        assert router.hellos[-1].worker.incarnation == router.hello.worker.incarnation
        request = make_request()
        assert await router.submit(request, Phase.FULL).result() == expected(request)
        await router.close()


async def test_two_workers_with_other_names_serve_under_them() -> None:
    async with running(model_name="my-model", worker_id="w7") as worker:
        router = await RouterSession.open(worker.address)
        assert (router.hello.worker.model.name, router.hello.worker.worker_id) == ("my-model", "w7")
        request = make_request(model="my-model")
        reply = router.submit(request, Phase.FULL)
        assert await reply.result() == expected(request)
        assert finish_reason(reply) is FinishReason.LENGTH
        await router.close()
