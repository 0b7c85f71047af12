"""The judge of chaos: against a small HTTP server that answers as told, each kind of wrong answer is seen as such."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from pdserve_cli import chaos_load
from pdserve_cli.chaos_load import Load
from pdserve_cli.parity_types import Case, Run

pytestmark = pytest.mark.asyncio

CASE = Case(prompt=(5, 6, 7), seed=1, reply=(8,))
RUN = Run(greedy=(1, 2, 3), seeded=(4, 5), second=(9, 9), logprobs=())
HEAD = "HTTP/1.1 {status} X\r\nconnection: close\r\ncontent-type: text/event-stream\r\n\r\n"


def event(*token_ids: int) -> str:
    return "data: " + json.dumps({"choices": [{"index": 0, "token_ids": list(token_ids)}]}) + "\n\n"


def error(code: str) -> str:
    return "data: " + json.dumps({"error": {"code": code, "message": "as told"}}) + "\n\n"


DONE = "data: [DONE]\n\n"
GOOD = event(1, 2) + event(3) + DONE


@asynccontextmanager
async def answering(*replies: str, status: int = 200) -> AsyncIterator[tuple[Load, list[dict[str, Any]]]]:
    """A load of one case against a server that gives these replies in turn, the last one for ever."""
    asked: list[dict[str, Any]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        asked.append(json.loads(await reader.readexactly(length)))
        reply = replies[min(len(asked), len(replies)) - 1]
        writer.write((HEAD.format(status=status) + reply).encode())
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        yield Load(f"http://127.0.0.1:{port}", "m", [CASE], [RUN], 0), asked


async def settle(load: Load, round_: str = "greedy") -> None:
    await load.answered(0, round_, random.Random(0))


async def test_a_right_answer_counts() -> None:
    async with answering(GOOD) as (load, asked):
        await settle(load)
    assert (load.tally.answers, load.tally.wrong, load.tally.hung) == (1, [], [])
    assert asked[0]["prompt"] == [5, 6, 7]


async def test_the_second_turn_continues_the_greedy_answer() -> None:
    async with answering(event(9, 9) + DONE) as (load, asked):
        await settle(load, "second turn")
    assert asked[0]["prompt"] == [5, 6, 7, 1, 2, 3, 8]
    assert load.tally.wrong == []


@pytest.mark.parametrize("tokens", [(1, 2, 4), (1, 2), (1, 2, 3, 4), ()])
async def test_other_tokens_are_wrong(tokens: tuple[int, ...]) -> None:
    async with answering(event(*tokens) + DONE) as (load, _):
        await settle(load)
    assert len(load.tally.wrong) == 1


async def test_a_retryable_error_is_retried_and_counted() -> None:
    async with answering(event(1, 2) + error("worker_lost"), GOOD) as (load, asked):
        await settle(load)
    tally = load.tally
    assert (tally.answers, tally.wrong, dict(tally.errors)) == (1, [], {"worker_lost": 1})
    assert tally.partial_tokens == 2
    assert len(asked) == 2


async def test_wrong_tokens_before_an_error_are_wrong() -> None:
    async with answering(event(1, 7) + error("worker_lost"), GOOD) as (load, _):
        await settle(load)
    assert len(load.tally.wrong) == 1


async def test_an_error_that_forbids_a_retry_is_wrong() -> None:
    async with answering(error("invalid_value"), GOOD) as (load, asked):
        await settle(load)
    assert "not retryable" in load.tally.wrong[0]
    assert len(asked) == 1


@pytest.mark.parametrize("reply", [event(1, 2), "", 'data: {"choi'])
async def test_a_connection_that_breaks_while_the_router_lives_is_wrong(reply: str) -> None:
    async with answering(reply) as (load, _):
        await settle(load)
    assert len(load.tally.wrong) == 1
    assert load.tally.answers == 0


async def test_a_connection_may_break_while_the_router_is_down() -> None:
    async with answering(event(1, 2), GOOD) as (load, _):
        load.outages.down = True
        await settle(load)
    assert (load.tally.wrong, dict(load.tally.errors)) == ([], {"router_gone": 1})


@pytest.mark.parametrize(("first", "wrong"), [(event(1, 2), 0), (event(1, 7), 1)])
async def test_what_a_client_got_before_it_left_is_judged(first: str, wrong: int) -> None:
    async with answering(first + event(3) + DONE) as (load, _):
        await load._try(0, "greedy", leave_after=2)
    assert (load.tally.left, len(load.tally.wrong)) == (1, wrong)


async def test_silence_is_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chaos_load, "HANG_S", 0.2)
    gate = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await gate.wait()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        load = Load(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "m", [CASE], [RUN], 0)
        await settle(load)
        gate.set()
    assert len(load.tally.hung) == 1


async def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chaos_load, "PATIENCE_S", 0.0)
    async with answering(error("no_worker")) as (load, _):
        await settle(load)
    assert "no answer" in load.tally.hung[0]
