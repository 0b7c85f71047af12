"""Hundreds of requests with random shapes and random ends, on small pools: every token right, every block back."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest
from session_client import PairRequest, RouterSession
from worker_pair import SIM, Constant, Pair, expected, make_request, prompt, running_pair, sim_builder

from pdserve.types import Phase, Request, SamplingParams
from pdserve.wire.session import RouterUpdate

NUM_REQUESTS = 200
NUM_AT_ONCE = 24
SMALL = sim_builder(replace(SIM, core=replace(SIM.core, num_blocks=192)), timing=Constant(0.5))


def _random_request(draw: random.Random, number: int) -> Request:
    n = draw.choice((1, 1, 1, 2, 3))
    params = SamplingParams(
        n=n,
        temperature=draw.choice((0.0, 0.8)),
        max_tokens=draw.randint(1, 24),
        seed=draw.randint(0, 2**32),
        ignore_eos=draw.random() < 0.5,
        logprobs=draw.choice((None, 1)),
    )
    shared = prompt(draw.choice((0, 0, 48, 160)))  # some share a prefix, and find it cached
    tail = tuple(draw.randint(100, 40_000) for _ in range(draw.choice((1, 15, 16, 17, 100, 500))))
    return make_request(f"soak-{number}", params=params, prompt_token_ids=(*shared, *tail))


async def _check(handed: PairRequest) -> None:
    await handed.result()
    for choice in range(handed.request.params.n):
        tokens = {**handed.first.tokens[choice], **handed.rest.tokens[choice]}
        assert [tokens[i] for i in sorted(tokens)] == expected(handed.request, choice), handed.request.request_id


async def _cancel_somewhere(draw: random.Random, handed: PairRequest) -> None:
    """At once, after the first chunk, after prefill, or in the middle of decode; or after the end."""
    num_announced, num_decoded = draw.randint(0, 2), draw.randint(0, 6)
    at_prefill = draw.random() < 0.5

    def due() -> bool:
        if handed.all_finished:
            return True
        if at_prefill:
            return len(handed.first.announcements) >= num_announced
        return len(handed.rest.tokens[0]) >= num_decoded

    waiting = [asyncio.create_task(reply.until(due)) for reply in (handed.first, handed.rest)]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()
    handed.cancel()


def _repeat_relays(handed: PairRequest) -> None:
    """Relays may come twice."""
    send = handed._decode.send

    def relay_twice(relay):
        send(RouterUpdate(relays=[relay]))
        return relay

    handed.change_relay = relay_twice


async def _one(draw: random.Random, pair: Pair, number: int) -> None:
    request = _random_request(draw, number)
    kind = draw.random()
    if kind < 0.1:
        reply = pair.decode.submit(request, Phase.FULL)
        assert await reply.result() == expected(request)
    elif kind < 0.4:
        await _cancel_somewhere(draw, pair.start(request))
    else:
        await _check(pair.start(request, _repeat_relays if kind < 0.5 else lambda handed: None))


@pytest.mark.parametrize(("transport", "seed"), [("shm", 1), ("tcp", 2), ("shm", 3)])
async def test_no_token_is_wrong_and_no_block_lost(transport: str, seed: int) -> None:
    async with running_pair([transport], prefill_build=SMALL, decode_build=SMALL) as pair:
        room = asyncio.Semaphore(NUM_AT_ONCE)

        async def one(number: int) -> None:
            async with room:
                await _one(random.Random(seed * 1000 + number), pair, number)

        async with asyncio.TaskGroup() as tasks:
            for number in range(NUM_REQUESTS):
                tasks.create_task(one(number))
        await pair.until_free()


async def _announced(handed: PairRequest) -> None:
    await handed.first.until(lambda: bool(handed.first.announcements))


async def test_routers_come_and_go_without_a_trace() -> None:
    async with running_pair(prefill_build=SMALL, decode_build=SMALL) as pair:
        draw = random.Random(4)
        for generation in range(6):
            prefill = await RouterSession.open(pair.prefill_worker.address, f"mortal-{generation}")
            decode = await RouterSession.open(pair.decode_worker.address, f"mortal-{generation}")
            mortal = Pair(pair.prefill_worker, pair.decode_worker, prefill, decode)
            doomed = [mortal.start(_random_request(draw, 10 * generation + i)) for i in range(8)]
            safe = pair.start(_random_request(draw, 1000 + generation))
            if generation % 2:
                await _announced(doomed[0])
            draw.choice((prefill, decode)).break_off()
            prefill.break_off()
            decode.break_off()
            await _check(safe)
            await prefill.close()
            await decode.close()
        await pair.until_free()
