"""Hand-overs between two real workers in one process: right tokens, right order, nothing left behind."""

from __future__ import annotations

import pytest
from session_client import RouterSession
from worker_pair import expected, make_request, running, running_pair

from pdserve.types import Phase


async def test_one_worker_alone_gives_the_expected_tokens() -> None:
    async with running() as worker:
        router = await RouterSession.open(worker.address)
        request = make_request(length=300, max_tokens=12)
        reply = await router.submit(request, Phase.FULL)
        assert await reply.result() == expected(request)
        await router.until_free()
        await router.close()


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 64, 1000])
async def test_a_pair_gives_the_tokens_of_one_engine_alone(transport: str, length: int) -> None:
    async with running_pair([transport]) as pair:
        request = make_request(length=length)
        assert await pair.run(request) == expected(request)
        await pair.until_free()
