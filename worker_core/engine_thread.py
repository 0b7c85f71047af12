"""The engine's own thread, and the two queues that join it to the event loop.

The loop owns all I/O and the thread owns the engine: commands (`submit`, `cancel`, `import_blocks`, ...) go in and
run between steps, in the order given; what steps and commands produced comes out and runs on the loop, in the order
in which it happened. An engine without work costs no CPU: the thread sleeps on its inbox.

Both queues are bounded. The inbox refuses submissions beyond `max_commands` (a cancel is always taken: there are at
most as many as there are requests); the thread waits once `MAX_ROUNDS` rounds lie unread in the outbox.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from typing import TypeVar

from pdserve.engine.base import HandoverEngine, StepResult
from pdserve.errors import EngineFailed, Overloaded, PdserveError
from pdserve.types import EngineLoad

MAX_ROUNDS = 4
"""Step results that may wait for the loop. More would only add latency: the loop reads each in well under a step."""
LOAD_INTERVAL_S = 0.1
"""Seconds between two looks at the engine's load: the router corrects its accounting with it, no more."""

MAX_RETRIES = 64
"""Waiting commands that are tried again after a step: at 1 to 2 us each they must not cost more than the step. They
take turns; before the engine rests all are tried."""

ResultT = TypeVar("ResultT")
EngineFactory = Callable[[], HandoverEngine]
Command = Callable[[HandoverEngine], object]


@dataclass(slots=True)
class Round:
    """What came out of the engine at once: a step's result, and the load when it was looked at and had changed."""

    result: StepResult = field(default_factory=StepResult)
    load: EngineLoad | None = None
    duration_s: float = 0.0


@dataclass(slots=True)
class _Parked:
    """A command that gave None: there was no room yet."""

    command: Command
    future: asyncio.Future[object]


class EngineThread:
    """Runs one engine. All methods are for the loop that called `start`."""

    def __init__(
        self,
        factory: EngineFactory,
        *,
        on_round: Callable[[Round], None],
        on_failed: Callable[[EngineFailed], None],
        max_commands: int = 8192,
    ) -> None:
        self._factory = factory
        self._on_round = on_round
        self._on_failed = on_failed
        self._max_commands = max_commands
        self._inbox: SimpleQueue[Command | None] = SimpleQueue()
        self._outbox: list[Callable[[], None]] = []
        self._outbox_lock = threading.Lock()
        self._slots = threading.Semaphore(MAX_ROUNDS)
        self._parked: deque[_Parked] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._ended = asyncio.Event()
        self._stopping = False
        self._load: EngineLoad | None = None
        self._load_due = 0.0

    async def start(self) -> HandoverEngine:
        """Build the engine in its thread (loading a model takes seconds) and return it, to read `model`, `layout`
        and `memory` from. Raises whatever the factory raises."""
        self._loop = asyncio.get_running_loop()
        built: asyncio.Future[HandoverEngine] = self._loop.create_future()
        self._thread = threading.Thread(target=self._main, args=(built,), name="engine", daemon=True)
        self._thread.start()
        return await built

    async def stop(self) -> None:
        """Stop after the step under way and close the engine. Idempotent."""
        if self._thread is None or self._stopping:
            return
        self._stopping = True
        self._inbox.put(None)
        self._slots.release()
        await self._ended.wait()
        self._thread.join()

    def check_room(self) -> None:
        """Raises `Overloaded` when the inbox is full: ask before a submission."""
        if self._inbox.qsize() >= self._max_commands:
            raise Overloaded("the engine does not keep up with its submissions; retry elsewhere", retry_after_s=1.0)

    def post(self, command: Command) -> None:
        """Run it between steps; it must not raise (a raise counts as a broken engine)."""
        self._inbox.put(command)

    def submit(self, command: Command, on_refused: Callable[[PdserveError], None]) -> None:
        """As `post`, for a command that may raise a `PdserveError`: `on_refused` hears of it on the loop."""
        self._inbox.put(partial(self._run_submit, command, on_refused))

    def call(self, command: Callable[[HandoverEngine], ResultT]) -> asyncio.Future[ResultT]:
        """Run it between steps; the future has its result or what it raised."""
        future: asyncio.Future[ResultT] = asyncio.get_running_loop().create_future()
        self._inbox.put(partial(self._run_call, command, future))  # type: ignore[arg-type]
        return future

    def call_when_possible(self, command: Callable[[HandoverEngine], ResultT | None]) -> asyncio.Future[ResultT]:
        """As `call`, but a command that gives None is tried again after each round until it gives something.
        Cancel the future to give up."""
        future: asyncio.Future[ResultT] = asyncio.get_running_loop().create_future()
        parked = _Parked(command, future)  # type: ignore[arg-type]
        self._inbox.put(lambda engine: self._parked.append(parked))
        return future

    # ---- in the engine's thread ----

    def _main(self, built: asyncio.Future[HandoverEngine]) -> None:
        try:
            engine = self._factory()
        except BaseException as error:  # noqa: BLE001 - handed to the caller of start()
            self._put(partial(_fail, built, error))
            self._put(self._ended.set)
            return
        self._put(partial(_settle, built, engine))
        try:
            self._run(engine)
        except Exception as error:  # noqa: BLE001 - whatever the engine raised, its requests must hear of it
            failure = EngineFailed(f"the engine raised {type(error).__name__}: {error}")
            failure.__cause__ = error
            self._put(partial(self._on_failed, failure))
        finally:
            try:
                engine.close()
            finally:
                self._put(self._ended.set)

    def _run(self, engine: HandoverEngine) -> None:
        """Hot path: a turn costs about 2 us beside the step itself."""
        self._publish_idle_load(engine)
        while not self._stopping:
            busy = engine.has_work()
            if not self._run_commands(engine, wait=not busy):
                return
            if busy or engine.has_work():
                self._slots.acquire()
                started = time.monotonic()
                result = engine.step()
                duration_s = time.monotonic() - started
                self._put(partial(self._deliver, Round(result, self._changed_load(engine), duration_s)))
            if self._parked:
                self._retry_parked(engine)
            if not engine.has_work():
                self._publish_idle_load(engine)

    def _run_commands(self, engine: HandoverEngine, *, wait: bool) -> bool:
        """Run what has come in; sleep until something does when `wait`. False: stop."""
        if wait:
            command = self._inbox.get()
            if command is None:
                return False
            command(engine)
        try:
            while (command := self._inbox.get_nowait()) is not None:
                command(engine)
        except Empty:
            return True
        return False

    def _run_submit(self, command: Command, on_refused: Callable[[PdserveError], None], engine: HandoverEngine) -> None:
        try:
            command(engine)
        except PdserveError as error:
            self._put(partial(on_refused, error))

    def _run_call(self, command: Command, future: asyncio.Future[object], engine: HandoverEngine) -> None:
        if future.cancelled():
            return
        try:
            self._put(partial(_settle, future, command(engine)))
        except Exception as error:  # noqa: BLE001 - handed to the caller
            self._put(partial(_fail, future, error))

    def _retry_parked(self, engine: HandoverEngine) -> None:
        num_parked = len(self._parked)
        for _ in range(min(num_parked, MAX_RETRIES) if engine.has_work() else num_parked):
            parked = self._parked.popleft()
            if parked.future.cancelled():
                continue
            try:
                value = parked.command(engine)
            except Exception as error:  # noqa: BLE001 - handed to the caller
                self._put(partial(_fail, parked.future, error))
                continue
            if value is None:
                self._parked.append(parked)
            else:
                self._put(partial(_settle, parked.future, value))

    def _changed_load(self, engine: HandoverEngine) -> EngineLoad | None:
        now = time.monotonic()
        if now < self._load_due:
            return None
        self._load_due = now + LOAD_INTERVAL_S
        load = engine.load()
        if load == self._load:
            return None
        self._load = load
        return load

    def _publish_idle_load(self, engine: HandoverEngine) -> None:
        """Before a sleep of unknown length the routers should know the last state."""
        self._load_due = 0.0
        load = self._changed_load(engine)
        if load is not None:
            self._slots.acquire()
            self._put(partial(self._deliver, Round(load=load)))

    def _put(self, action: Callable[[], None]) -> None:
        loop = self._loop
        assert loop is not None
        with self._outbox_lock:
            self._outbox.append(action)
            wake = len(self._outbox) == 1
        if wake and not loop.is_closed():
            loop.call_soon_threadsafe(self._drain)

    # ---- on the loop ----

    def _drain(self) -> None:
        with self._outbox_lock:
            actions, self._outbox = self._outbox, []
        for action in actions:
            try:
                action()
            except Exception as error:  # noqa: BLE001 - one faulty answer must not swallow those behind it
                context = {"message": "handling an engine's answer failed", "exception": error}
                asyncio.get_running_loop().call_exception_handler(context)

    def _deliver(self, round_: Round) -> None:
        self._slots.release()
        self._on_round(round_)


def _settle(future: asyncio.Future[ResultT], value: ResultT) -> None:
    if not future.done():
        future.set_result(value)


def _fail(future: asyncio.Future[ResultT], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
