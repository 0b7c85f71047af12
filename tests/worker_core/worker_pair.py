"""Real workers with the sim engine inside the test's own loop, and requests for them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from session_client import PairRequest, RouterSession

from pdserve.config import WorkerConfig, load
from pdserve.engine.base import HandoverEngine, KVMemoryFactory
from pdserve.engine.core.config import CoreConfig
from pdserve.engine.sim import DEFAULT_MODEL, SimEngine, SimEngineConfig, expected_tokens
from pdserve.types import Request, Role, SamplingParams
from worker_core.worker import EngineBuilder, Worker

MODEL = DEFAULT_MODEL.name
SIM = SimEngineConfig(core=CoreConfig(num_blocks=512, chunk_tokens=64, max_num_batched_tokens=256))


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple((seed * 7919 + i * 31) % 40_000 + 100 for i in range(length))


def make_request(request_id: str = "r", length: int = 100, max_tokens: int = 8, **changes: object) -> Request:
    """Greedy unless `params` says otherwise; the prompt depends on the id alone."""
    params = changes.pop("params", None) or SamplingParams(temperature=0.0, max_tokens=max_tokens, seed=1)
    seed = sum(request_id.encode())
    return replace(Request(request_id, MODEL, prompt(length, seed), params), **changes)


def expected(request: Request, choice: int = 0, sim: SimEngineConfig = SIM) -> list[int]:
    return expected_tokens(sim, request, choice)


def sim_builder(sim: SimEngineConfig = SIM, **engine_options: object) -> EngineBuilder:
    def build(config: WorkerConfig, memory_factory: KVMemoryFactory) -> HandoverEngine:
        return SimEngine(sim, memory_factory, **engine_options)

    return build


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


@dataclass
class Pair:
    """A prefill and a decode worker, and one router's sessions with them."""

    prefill_worker: Worker
    decode_worker: Worker
    prefill: RouterSession
    decode: RouterSession

    async def start(self, request: Request, tweak: Callable[[PairRequest], None] = lambda pair: None) -> PairRequest:
        pair = PairRequest(self.prefill, self.decode, request)
        tweak(pair)
        return await pair.start()

    async def run(self, request: Request) -> list[int]:
        return await (await self.start(request)).result()

    async def until_free(self) -> None:
        await self.prefill.until_free()
        await self.decode.until_free()


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
