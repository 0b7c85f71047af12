"""Real workers with the sim engine inside the test's own loop, and requests for them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import numpy as np
from session_client import PairRequest, RouterSession

from kvstore.transports.base import Arrived, Peer, Range, Region, Transport, ignore
from pdserve.config import WorkerConfig, load
from pdserve.engine.base import HandoverEngine, KVMemoryFactory
from pdserve.engine.core.config import CoreConfig
from pdserve.engine.sim import DEFAULT_MODEL, SimEngine, SimEngineConfig, expected_tokens
from pdserve.engine.timing import StepWork
from pdserve.types import Request, Role, SamplingParams
from worker_core.worker import EngineBuilder, Worker

MODEL = DEFAULT_MODEL.name
SIM = SimEngineConfig(core=CoreConfig(num_blocks=512, chunk_tokens=64, max_num_batched_tokens=256))


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple((seed * 7919 + i * 31) % 40_000 + 100 for i in range(length))


def make_request(request_id: str = "r", length: int = 100, max_tokens: int = 8, **changes: object) -> Request:
    """Greedy unless `params` says otherwise, long ones without regard to EOS; the prompt depends on the id alone."""
    is_long = max_tokens > 100
    params = changes.pop("params", None) or SamplingParams(
        temperature=0.0, max_tokens=max_tokens, seed=1, ignore_eos=is_long
    )
    seed = sum(request_id.encode())
    return replace(Request(request_id, MODEL, prompt(length, seed), params), **changes)


def expected(request: Request, choice: int = 0, sim: SimEngineConfig = SIM) -> list[int]:
    return expected_tokens(sim, request, choice)


def sim_builder(sim: SimEngineConfig = SIM, **engine_options: object) -> EngineBuilder:
    def build(config: WorkerConfig, memory_factory: KVMemoryFactory) -> HandoverEngine:
        return SimEngine(sim, memory_factory, **engine_options)

    return build


class HeldStep:
    """A timing model whose n-th step goes on only when `release` is set: an order of events made certain."""

    def __init__(self, step: int, release: threading.Event) -> None:
        self._left = step
        self._release = release

    def step_ms(self, work: StepWork) -> float:
        self._left -= 1
        if self._left == 0:
            assert self._release.wait(60), "nothing released the held step"
        return 0.0


@dataclass(frozen=True)
class Constant:
    """A timing model: every step takes as long."""

    ms: float

    def step_ms(self, work: StepWork) -> float:
        return self.ms


class GatedPeer:
    """A real peer whose reads of blocks wait for the gate: tests decide what happens in the middle of a pull."""

    def __init__(self, peer: Peer, gate: Gate) -> None:
        self._peer, self._gate = peer, gate

    def read(self, ranges: Sequence[Range], into: np.ndarray, arrived: Arrived = ignore) -> None:
        if into.nbytes == self._gate.pool_bytes:  # not the table of generations
            self._gate.pass_through()
        self._peer.read(ranges, into, arrived)
        self._gate.num_reads += 1

    def write(self, ranges: Sequence[Range], source: np.ndarray) -> None:
        self._peer.write(ranges, source)

    def close(self) -> None:
        self._peer.close()


class Gate:
    """Put before a decode worker's transports with `install`."""

    def __init__(self) -> None:
        self.arrived = threading.Event()
        self.open = threading.Event()
        self.num_reads = 0
        self.pool_bytes = 0

    def pass_through(self) -> None:
        self.arrived.set()
        assert self.open.wait(60), "the gate was never opened"

    def install(self, worker: Worker) -> Gate:
        self.pool_bytes = worker.port.pool.region.nbytes
        for name, transport in list(worker.port.transports.items()):
            worker.port.transports[name] = GatedTransport(transport, self)
        return self

    async def reached(self) -> None:
        assert await asyncio.to_thread(self.arrived.wait, 60), "no pull came"


class GatedTransport:
    def __init__(self, transport: Transport, gate: Gate) -> None:
        self._transport, self._gate = transport, gate
        self.name = transport.name

    def connect(self, descriptor: bytes) -> GatedPeer:
        return GatedPeer(self._transport.connect(descriptor), self._gate)

    def register(self, memory: np.ndarray) -> Region:
        return self._transport.register(memory)

    def deregister(self, region: Region) -> None:
        self._transport.deregister(region)

    def close(self) -> None:
        self._transport.close()


@asynccontextmanager
async def running(
    role: Role = Role.DECODE,
    build: EngineBuilder | None = None,
    **overrides: object,
) -> AsyncIterator[Worker]:
    worker = Worker(load(WorkerConfig, None, {"engine": "sim", **overrides}), role, build or sim_builder())
    await worker.start()
    try:
        yield worker
    finally:
        await worker.stop()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that nobody announces."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def until_free(*workers: Worker) -> None:
    """Until the engines hold no block and no part of the workers knows a request; then the books must balance."""
    async with asyncio.timeout(60):
        for worker in workers:
            while not await _is_free(worker):  # noqa: ASYNC110 - nobody announces it
                await asyncio.sleep(0.005)
            await worker.engine.call(lambda engine: engine.check_integrity())
            _check_nothing_is_remembered(worker)


def _check_nothing_is_remembered(worker: Worker) -> None:
    jobs, puller, exporter = worker.jobs, worker.puller, worker.exporter
    left = (jobs._choices, puller._open, puller._sources, puller._running, exporter._open, worker.store.fetcher)
    assert not any(left), left
    assert worker.store.publisher is None or not worker.store.publisher._chains
    assert not len(jobs._deadlines)


async def _is_free(worker: Worker) -> bool:
    load = await worker.engine.call(lambda engine: engine.load())
    in_engine = load.num_running + load.num_waiting + load.num_exported_blocks
    in_worker = len(worker.jobs) + len(worker.exporter) + len(worker.puller) + len(worker.store.fetcher)
    return load.num_free_blocks == load.num_total_blocks and not in_engine and not in_worker


@dataclass
class Pair:
    """A prefill and a decode worker, and one router's sessions with them."""

    prefill_worker: Worker
    decode_worker: Worker
    prefill: RouterSession
    decode: RouterSession

    def start(self, request: Request, tweak: Callable[[PairRequest], None] = lambda pair: None) -> PairRequest:
        pair = PairRequest(self.prefill, self.decode, request)
        tweak(pair)
        return pair.start()

    async def run(self, request: Request) -> list[int]:
        return await self.start(request).result()

    async def until_free(self) -> None:
        await until_free(self.prefill_worker, self.decode_worker)


@asynccontextmanager
async def running_pair(
    transports: Sequence[str] = ("shm", "tcp"),
    prefill_build: EngineBuilder | None = None,
    decode_build: EngineBuilder | None = None,
    prefill_overrides: dict[str, object] | None = None,
    **overrides: object,
) -> AsyncIterator[Pair]:
    overrides = {"transports": list(transports), **overrides}
    async with (
        running(Role.PREFILL, prefill_build, **{**overrides, **(prefill_overrides or {})}) as prefill_worker,
        running(Role.DECODE, decode_build, **overrides) as decode_worker,
    ):
        prefill = await RouterSession.open(prefill_worker.address)
        decode = await RouterSession.open(decode_worker.address)
        try:
            yield Pair(prefill_worker, decode_worker, prefill, decode)
        finally:
            await prefill.close()
            await decode.close()
