"""The engine's thread: order, failure, back-pressure, and rest."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from queue import SimpleQueue
from typing import Any

import pytest
from worker_pair import SIM, Constant, expected, make_request

from pdserve.engine.base import StepResult
from pdserve.engine.memory import LocalMemory
from pdserve.engine.sim import SimEngine
from pdserve.errors import ConfigError, EngineFailed, InvalidRequest, Overloaded
from pdserve.types import Phase
from worker_core.engine_thread import MAX_ROUNDS, EngineThread, Round


class CountingEngine(SimEngine):
    """A real sim engine that counts its steps and the questions it was asked."""

    num_steps = 0
    num_asked = 0
    fail_at = -1

    def has_work(self) -> bool:
        self.num_asked += 1
        return super().has_work()

    def step(self) -> StepResult:
        self.num_steps += 1
        if self.num_steps == self.fail_at:
            raise ValueError("broken")
        return super().step()


class Inbox(SimpleQueue[Any]):
    """Tells whether the thread sleeps on it. `get` has no time-out here: a thread that polled would fail."""

    def __init__(self) -> None:
        self._waits, self._put, self._taken = False, 0, 0

    @property
    def rests(self) -> bool:
        return self._waits and self._put == self._taken

    def put(self, command: Any) -> None:  # type: ignore[override]
        self._put += 1
        super().put(command)

    def get(self) -> Any:  # type: ignore[override]
        self._waits = True
        command = super().get()
        self._waits = False
        self._taken += 1
        return command

    def get_nowait(self) -> Any:
        command = super().get_nowait()
        self._taken += 1
        return command


class Harness:
    def __init__(self) -> None:
        self.rounds: list[Round] = []
        self.failures: list[EngineFailed] = []
        self.engine: CountingEngine
        self.thread = EngineThread(
            lambda: CountingEngine(SIM, LocalMemory, timing=Constant(0.0)),
            on_round=self.on_round,
            on_failed=self.failures.append,
            max_commands=100,
        )
        self.inbox = self.thread._inbox = Inbox()
        self.changed = asyncio.Event()

    async def rest(self) -> None:
        """Until the thread sleeps, and would for ever."""
        async with asyncio.timeout(60):
            while not self.inbox.rests:  # noqa: ASYNC110 - it tells nobody
                await asyncio.sleep(0.001)

    def on_round(self, round_: Round) -> None:
        self.rounds.append(round_)
        self.changed.set()

    @property
    def tokens(self) -> list[int]:
        return [token for round_ in self.rounds for token in round_.result.output.token_ids]

    async def until_tokens(self, num_tokens: int) -> None:
        async with asyncio.timeout(60):
            while len(self.tokens) < num_tokens:
                self.changed.clear()
                await self.changed.wait()


@asynccontextmanager
async def harness() -> AsyncIterator[Harness]:
    h = Harness()
    h.engine = await h.thread.start()
    yield h
    await h.thread.stop()


async def test_requests_run_and_their_steps_come_back_in_order() -> None:
    async with harness() as h:
        request = make_request(max_tokens=50)
        h.thread.post(lambda engine: engine.submit(request, 7, Phase.FULL))
        await h.until_tokens(len(expected(request)))
        assert h.tokens == expected(request)
        assert {handle for r in h.rounds for handle in r.result.output.handles} == {7}


async def test_commands_run_in_order_and_give_their_results_back() -> None:
    async with harness() as h:
        seen: list[int] = []
        for i in range(20):
            h.thread.post(lambda engine, i=i: seen.append(i))
        assert await h.thread.call(lambda engine: list(seen)) == list(range(20))
        with pytest.raises(KeyError):
            await h.thread.call(lambda engine: engine.import_blocks(99, 0, 16))


async def test_a_refused_submission_is_told_and_harms_nothing() -> None:
    async with harness() as h:
        refused: list[Exception] = []
        bad = make_request(prompt_token_ids=(10**6,))
        h.thread.submit(lambda engine: engine.submit(bad, 1, Phase.FULL), refused.append)
        good = make_request(max_tokens=3)
        h.thread.submit(lambda engine: engine.submit(good, 2, Phase.FULL), refused.append)
        await h.until_tokens(3)
        assert [type(error) for error in refused] == [InvalidRequest]
        assert h.tokens == expected(good)


async def test_a_command_that_finds_no_room_is_tried_again_when_something_has_changed() -> None:
    async with harness() as h:
        room: list[str] = []
        tries: list[int] = []

        def attempt(engine: object) -> str | None:
            tries.append(1)
            return room[0] if room else None

        waiting = h.thread.call_when_possible(attempt)
        await h.rest()
        assert not waiting.done()
        assert tries == [1], "once, when it came"
        h.thread.post(lambda engine: room.append("here"))
        assert await waiting == "here"


async def test_an_idle_engine_is_left_alone() -> None:
    async with harness() as h:
        h.thread.post(lambda engine: engine.submit(make_request(max_tokens=3), 1, Phase.FULL))
        await h.until_tokens(3)
        await h.rest()
        steps = h.engine.num_steps
        await h.thread.call(lambda engine: None)
        await h.rest()
        assert h.engine.num_steps == steps, "a command alone makes no step"
        assert not h.failures


async def test_the_load_is_told_before_the_engine_goes_to_rest() -> None:
    async with harness() as h:
        h.thread.post(lambda engine: engine.submit(make_request(max_tokens=3), 1, Phase.FULL))
        await h.until_tokens(3)
        await h.thread.call(lambda engine: None)
        loads = [round_.load for round_ in h.rounds if round_.load is not None]
        assert loads[-1].num_free_blocks == loads[-1].num_total_blocks
        assert loads[-1].num_running == 0


async def test_a_loop_that_does_not_listen_holds_the_engine_back() -> None:
    async with harness() as h:
        request = make_request(max_tokens=500)
        h.thread.post(lambda engine: engine.submit(request, 1, Phase.FULL))
        _block_the_loop(h)
        assert h.engine.num_steps <= MAX_ROUNDS + 1
        await h.until_tokens(len(expected(request)))


def _block_the_loop(h: Harness) -> None:
    """Until the engine has stepped as far as it may, and a little longer."""
    never = threading.Event()
    for _ in range(10_000):
        if h.engine.num_steps >= MAX_ROUNDS:
            break
        never.wait(0.001)
    never.wait(0.02)


async def test_a_full_inbox_refuses_submissions() -> None:
    async with harness() as h:
        held = threading.Event()
        h.thread.post(lambda engine: held.wait(60))
        for _ in range(100):
            h.thread.post(lambda engine: None)
        with pytest.raises(Overloaded) as caught:
            h.thread.check_room()
        assert caught.value.retry_after_s
        held.set()
        await h.thread.call(lambda engine: None)
        h.thread.check_room()


async def test_an_engine_that_raises_is_closed_and_told_of() -> None:
    async with harness() as h:
        h.engine.fail_at = 3
        h.thread.post(lambda engine: engine.submit(make_request(max_tokens=50), 1, Phase.FULL))
        async with asyncio.timeout(60):
            while not h.failures:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
        assert "ValueError: broken" in h.failures[0].message
        await h.thread.stop()


async def test_an_engine_that_cannot_be_built_tells_start() -> None:
    def factory() -> SimEngine:
        raise ConfigError("no such model", key="model")

    thread = EngineThread(factory, on_round=lambda round_: None, on_failed=lambda error: None)
    with pytest.raises(ConfigError):
        await thread.start()
    await thread.stop()


async def test_a_faulty_handler_does_not_swallow_the_answers_behind_it() -> None:
    problems: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: problems.append(context))
    async with harness() as h:
        h.thread.submit(
            lambda engine: engine.submit(make_request(model="m", prompt_token_ids=()), 1, Phase.FULL), _raise
        )
        assert await h.thread.call(lambda engine: 42) == 42
    assert isinstance(problems[0]["exception"], RuntimeError)


def _raise(error: Exception) -> None:
    raise RuntimeError("handler")
