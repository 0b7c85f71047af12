"""A router's core over real workers with the sim engine, all in one process and one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from prometheus_client import CollectorRegistry
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from kvstore.index.index import KVIndex
from pdserve.config import WorkerConfig
from pdserve.engine.base import KVMemoryFactory
from pdserve.engine.core.config import CoreConfig
from pdserve.engine.sim import SimEngine, SimEngineConfig
from pdserve.engine.timing import TimingModel
from pdserve.errors import Draining, PdserveError
from pdserve.metrics import RouterMetrics
from pdserve.tokens import ChatTemplate, Tokenizer
from pdserve.types import FinishReason, Logprobs, ModelInfo, Role, SamplingParams
from pdserve.wire.session import RouterHello
from router.base import Incoming, Usage
from router.breakers import BreakerRules
from router.core import CoreOptions, RouterCore
from router.discovery import StaticDiscovery
from router.fleet import Fleet
from router.models import ModelSetup, PlacementOptions, maker
from router.prefixes import PrefixIndex
from router.served import ModelNames
from router.stores import Stores
from router.surroundings import Timeouts
from worker_core.worker import Worker

VOCAB_SIZE = 1024
PATIENT = Timeouts(10, 10, 10)
EOS = 0
MODEL = ModelInfo("tiny", "r1", "t1", max_model_len=4096, vocab_size=VOCAB_SIZE, eos_token_ids=(EOS,))
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def tiny_tokenizer() -> Tokenizer:
    """Byte-level: id 0 is EOS, ids 1 to 256 are single bytes, all others are words " w257", " w258", ..."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<eos>": EOS} | {char: i + 1 for i, char in enumerate(alphabet)}
    vocab |= {f"Ġw{i}": i for i in range(len(vocab), VOCAB_SIZE)}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    return Tokenizer(backend, ChatTemplate(TEMPLATE, {}))


@dataclass
class Collector:
    """A sink that keeps everything."""

    texts: dict[int, str] = field(default_factory=dict)
    token_ids: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[Logprobs]] = field(default_factory=dict)
    finishes: dict[int, tuple[FinishReason, str | int | None]] = field(default_factory=dict)
    usage: Usage | None = None
    error: PdserveError | None = None
    over: asyncio.Event = field(default_factory=asyncio.Event)
    some: asyncio.Event = field(default_factory=asyncio.Event)
    wanted: int = 1
    """`some` is set once choice 0 has so many tokens."""

    def on_tokens(self, choice: int, text: str, token_ids: Sequence[int], logprobs: Sequence[Logprobs]) -> None:
        assert not self.over.is_set()
        assert choice not in self.finishes
        self.texts[choice] = self.texts.get(choice, "") + text
        self.token_ids.setdefault(choice, []).extend(token_ids)
        self.logprobs.setdefault(choice, []).extend(logprobs)
        if len(self.token_ids.get(0, ())) >= self.wanted:
            self.some.set()

    def on_finish(self, choice: int, reason: FinishReason, stop: str | int | None) -> None:
        assert not self.over.is_set()
        assert choice not in self.finishes
        self.finishes[choice] = (reason, stop)

    def on_done(self, usage: Usage) -> None:
        assert not self.over.is_set()
        self.usage = usage
        self.over.set()

    def on_error(self, error: PdserveError) -> None:
        assert not self.over.is_set()
        self.error = error
        self.over.set()
        self.some.set()

    async def result(self) -> Collector:
        await asyncio.wait_for(self.over.wait(), 60)
        return self


@dataclass
class House:
    """What a test builds: workers, then a core that knows them."""

    tmp: Path
    tokenizer: Tokenizer = field(default_factory=tiny_tokenizer)
    workers: list[Worker] = field(default_factory=list)
    engines: dict[int, SimEngine] = field(default_factory=dict)
    """By the incarnation of their worker."""
    fleets: list[Fleet] = field(default_factory=list)
    cores: list[RouterCore] = field(default_factory=list)
    prefixes: list[PrefixIndex] = field(default_factory=list)
    registry: CollectorRegistry | None = None
    """Of the last core."""
    sim: SimEngineConfig = field(
        default_factory=lambda: SimEngineConfig(
            core=CoreConfig(num_blocks=1024, max_num_seqs=64, chunk_tokens=64), model=MODEL, eos_period=0
        )
    )

    async def worker(
        self, role: Role, name: str, *, listen: str = "127.0.0.1:0", timing: TimingModel | None = None,
        sim: SimEngineConfig | None = None, **config: object,
    ) -> Worker:  # fmt: skip
        engine_config = sim or self.sim

        built: list[SimEngine] = []

        def build(_: WorkerConfig, memory: KVMemoryFactory) -> SimEngine:
            built.append(SimEngine(engine_config, memory, timing=timing))
            return built[0]

        worker = Worker(
            WorkerConfig(worker_id=name, listen=listen, engine="sim", drain_timeout_s=60.0, **config), role, build
        )
        await worker.start()
        self.workers.append(worker)
        self.engines[worker.incarnation] = built[0]
        return worker

    async def pair(self, timing: TimingModel | None = None) -> tuple[Worker, Worker]:
        prefill = await self.worker(Role.PREFILL, "p0", timing=timing)
        return prefill, await self.worker(Role.DECODE, "d0", timing=timing)

    async def core(
        self, *, addresses: Sequence[str] | None = None, timeouts: Timeouts = PATIENT, models: object = None,
        placement: object = (), traces: object = None, **options: object,
    ) -> RouterCore:  # fmt: skip
        """`models`: name -> aliases; `placement` and `options`: fields of PlacementOptions and CoreOptions."""
        if addresses is None:
            addresses = [worker.address for worker in self.workers]
        fleet = Fleet(StaticDiscovery(addresses), RouterHello("router", 1), tls=None, max_backoff_s=0.1)
        registry = self.registry = CollectorRegistry()
        metrics = RouterMetrics(registry)
        given = {
            "policy": "least_loaded", "disaggregate": "always", "block_tokens": 16, "secret": b"s",
            "breaker": BreakerRules(slow_s=1000.0), "seed": 1, **dict(placement),
        }  # fmt: skip
        core_given = {
            "policy": given["policy"], "max_inflight": 64, "max_waiting": 64, "max_retries": 0, "timeouts": timeouts,
            "num_records": 300, **options,
        }  # fmt: skip
        setups = [
            ModelSetup(ModelNames(name, tuple(aliases)), self.tokenizer, "smollm2-135m-cpu")
            for name, aliases in (models or {"tiny": ()}).items()
        ]
        loop = asyncio.get_running_loop()
        index = KVIndex(max_entries=100_000, clock=loop.time)
        prefixes = PrefixIndex(index, Stores(index, None), metrics, loop.time, loop.call_soon)
        self.prefixes.append(prefixes)
        core = RouterCore(
            CoreOptions(**core_given), fleet, prefixes, maker(setups, PlacementOptions(**given), metrics), traces
        )
        self.fleets.append(fleet)
        self.cores.append(core)
        fleet.start()
        if addresses:
            await until(lambda: len(fleet.links) == len(addresses))
        return core

    def is_idle(self, worker: Worker) -> bool:
        """It knows no request and every one of its KV blocks is free (or cached)."""
        load = self.engines[worker.incarnation].load()
        return len(worker.jobs) == 0 and load.num_free_blocks == load.num_total_blocks

    async def wait_idle(self, *workers: Worker) -> None:
        await until(lambda: all(map(self.is_idle, workers or self.workers)))

    async def close(self) -> None:
        for core in self.cores:
            core.close(Draining("the test is over"))
        for fleet in self.fleets:
            await fleet.close()
        for prefixes in self.prefixes:
            await prefixes.close()
        for worker in self.workers:
            await worker.stop()


async def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - it looks at others' state, which signals nothing
            await asyncio.sleep(0.002)


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    built = House(tmp_path)
    yield built
    await built.close()


@pytest.fixture
def sink() -> type[Collector]:
    return Collector


@pytest.fixture
def wait_until() -> Callable[..., Awaitable[None]]:
    return until


@pytest.fixture
def incoming() -> Callable[..., Incoming]:
    """`incoming("text", max_tokens=4, ...)`: params and request fields by name."""
    number = iter(range(10**6))
    own = {
        "model",
        "cache_salt",
        "include_stop_str_in_output",
        "skip_special_tokens",
        "timeout_ms",
        "request_id",
        "traceparent",
    }

    def make(text: str | None = "hello world", **given: object) -> Incoming:
        fields = {key: given.pop(key) for key in list(given) if key in own}
        prompt = given.pop("token_ids", None)
        messages = given.pop("messages", None)
        params = SamplingParams(**{"max_tokens": 8, "temperature": 0.0, **given})
        base = Incoming(f"r{next(number)}", "tiny", params, text if prompt is None and messages is None else None)
        return msgspec.structs.replace(base, token_ids=prompt, messages=messages, **fields)

    return make
