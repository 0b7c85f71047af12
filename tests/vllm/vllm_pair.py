"""Two real vLLM engines in one process, driven by hand: what workers do, without their network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from kvstore.handover.verify import DigestPolicy, PoolDescriptor, digest_blocks, pull_blocks
from kvstore.transports.shm import SharedMemoryPool, ShmTransport
from kvstore.vllm_connector.events import EngineEvents
from pdserve.block_keys import KEY_BYTES, block_keys
from pdserve.engine.base import ExportedChunk, ImportTarget, PublishedBlocks
from pdserve.engine.vllm.engine import VllmEngine
from pdserve.engine.vllm.settings import VllmSettings
from pdserve.types import Finish, KVManifest, Logprobs, Phase, PromptStats, Request, SamplingParams

Tokens = list[list[list[int]]]
"""By request and choice."""
MAX_LEN = 1024
BUDGET = 64
"""Tokens a step: longer prompts are prefilled in chunks."""
SMALL_BLOCK, SMALL_BLOCKS = 32, 24
"""Of the small engine: the smallest block that vLLM's CPU kernels take, two hand-over blocks; and how many."""
STEPS = 20_000
"""A step waits 2 ms at most, so this is a bound of a minute or so."""


def settings(**changes: object) -> VllmSettings:
    engine_args = {
        "enforce_eager": True,
        "max_model_len": MAX_LEN,
        "max_num_batched_tokens": BUDGET,
        "max_num_seqs": 16,
        "kv_cache_memory_bytes": 1 << 30,
    }
    base = VllmSettings(model="embedded", dtype="fp32", staging_bytes=192 << 20, saves=True, engine_args=engine_args)
    return replace(base, **changes)


@contextmanager
def running_engine(**changes: object) -> Iterator[Driven]:
    made = settings(**changes)
    events = None if "kv_events_config" in made.engine_args else EngineEvents(made.block_tokens)
    driven = Driven(VllmEngine(made, SharedMemoryPool, events))
    try:
        yield driven
    finally:
        driven.engine.close()
        driven.pool.close()


@contextmanager
def before_vllm_has_it(engine: Driven, act: Callable[[], None]) -> Iterator[None]:
    """Act when the engine has described a request's transfers, and vLLM has not heard of it."""
    driver = engine.engine._driver
    original = driver.submit

    def act_then_submit(job: object) -> None:
        act()
        original(job)

    driver.submit = act_then_submit
    try:
        yield
    finally:
        del driver.submit


@dataclass(eq=False)
class Driven:
    """An engine and what came out of it, by handle."""

    engine: VllmEngine
    tokens: dict[int, list[int]] = field(default_factory=dict)
    first_index: dict[int, int] = field(default_factory=dict)
    finishes: dict[int, Finish] = field(default_factory=dict)
    logprobs: dict[int, list[Logprobs]] = field(default_factory=dict)
    prompts: dict[int, PromptStats] = field(default_factory=dict)
    exports: dict[int, list[ExportedChunk]] = field(default_factory=dict)
    published: dict[int, list[PublishedBlocks]] = field(default_factory=dict)
    cached: set[bytes] = field(default_factory=set)
    """What the engine said it has."""
    keeps: dict[bytes, bytes] | None = None
    """Given one, published blocks are copied into it: what a worker does with its node's store."""
    order: list[tuple[str, int]] = field(default_factory=list)
    """What came in which order: ("export" | "token", handle)."""
    measured: list[tuple[int, float]] = field(default_factory=list)
    """Prompt tokens computed, and the seconds that took."""
    _next_handle: int = 1

    @property
    def pool(self) -> SharedMemoryPool:
        assert isinstance(self.engine.memory, SharedMemoryPool)
        return self.engine.memory

    def submit(self, request: Request, phase: Phase) -> int:
        handle, self._next_handle = self._next_handle, self._next_handle + request.params.n
        self.engine.submit(request, handle, phase)
        return handle

    def run_until(self, done: Callable[[], bool]) -> None:
        for _ in range(STEPS):
            if done():
                return
            self.step()
        raise AssertionError("the engine did not get there")

    def step(self) -> None:
        result = self.engine.step()
        output, position = result.output, 0
        self.cached.difference_update(result.evicted)
        if result.num_prompt_tokens:
            self.measured.append((result.num_prompt_tokens, result.prefill_s))
        for told in result.published:
            self.published.setdefault(told.handle, []).append(told)
            self.cached.update(told.keys)
            if self.keeps is not None:
                self.keep(told)
        for chunk in result.exports:
            self.exports.setdefault(chunk.handle, []).append(chunk)
            self.order.append(("export", chunk.handle))
        for handle, first, count in zip(output.handles, output.first_indexes, output.counts, strict=True):
            known = self.tokens.setdefault(handle, [])
            assert first == self.first_index.setdefault(handle, first) + len(known), "a gap or a repeat in the stream"
            known += output.token_ids[position : position + count]
            position += count
            self.order.append(("token", handle))
        for entry in output.logprobs:
            self.logprobs.setdefault(entry.handle, []).append(entry)
        self.finishes.update({finish.handle: finish for finish in output.finishes})
        self.prompts.update({stats.handle: stats for stats in output.prompts})

    def keep(self, told: PublishedBlocks) -> None:
        for key, block, generation in zip(told.keys, told.blocks, told.generations, strict=False):
            content = self.pool.blocks[block].tobytes()
            assert self.pool.generations[block] == generation, "nothing was given away since"
            self.keeps[key] = content

    def fill(self, handle: int, keys: list[bytes], store: dict[bytes, bytes], first_block: int = 0) -> ImportTarget:
        """Open blocks for the request `handle` and write them; the caller commits."""
        target = self.engine.cache_open(handle, keys, first_block)
        assert target is not None
        for block, key in list(zip(target.blocks, keys[first_block:], strict=True))[target.num_cached_blocks :]:
            self.pool.blocks[block] = np.frombuffer(store[key], dtype=np.uint8)
        return target

    def run_alone(self, *requests: Request) -> Tokens:
        """Tokens of every choice of each request, prefilled and decoded here."""
        handles = [self.submit(request, Phase.FULL) for request in requests]
        spans = [range(h, h + r.params.n) for h, r in zip(handles, requests, strict=True)]
        self.run_until(lambda: all(handle in self.finishes for span in spans for handle in span))
        return [[self.tokens.get(handle, []) for handle in span] for span in spans]

    def prefilled(self, handle: int) -> bool:
        chunks = self.exports.get(handle, [])
        return handle in self.prompts and bool(chunks) and chunks[-1].final

    def settle(self) -> None:
        """Until nothing runs or retires; then every block and slot must be free."""
        self.run_until(lambda: not self.engine.has_work())
        staging = self.engine._staging
        self.engine.check_integrity()
        assert staging.num_free_blocks == staging.num_blocks
        assert staging.num_free_slots == staging.board.num_slots


@dataclass
class Pair:
    """Prefill here, decode there."""

    prefill: Driven
    decode: Driven
    transport: ShmTransport = field(default_factory=ShmTransport)

    def run(
        self, *requests: Request, before_resume: Callable[[int], None] = lambda handle: None
    ) -> list[list[list[int]]]:
        """Tokens of every choice of each request, prefill's and decode's joined."""
        halves = [self.start(request) for request in requests]
        self.prefill.run_until(lambda: all(self.prefill.prefilled(p) for p, _ in halves))
        for (p, d), request in zip(halves, requests, strict=True):
            self.pull(p, d)
            before_resume(d)
            self.resume(p, d, request)
        spans = [range(r.params.n) for r in requests]
        self.decode.run_until(
            lambda: all(self.ended(p + c, d + c) for (p, d), span in zip(halves, spans, strict=True) for c in span)
        )
        return [
            [self.prefill.tokens.get(p + c, []) + self.decode.tokens.get(d + c, []) for c in span]
            for (p, d), span in zip(halves, spans, strict=True)
        ]

    def ended(self, prefill_handle: int, decode_handle: int) -> bool:
        return prefill_handle in self.prefill.finishes or decode_handle in self.decode.finishes

    def start(self, request: Request) -> tuple[int, int]:
        return self.prefill.submit(request, Phase.PREFILL), self.decode.submit(request, Phase.DECODE)

    def pull(self, prefill_handle: int, decode_handle: int) -> None:
        """All chunks, checked as a worker checks them; the exporter's hold ends with each."""
        source = PoolDescriptor.of(self.prefill.pool, self.transport.register(self.prefill.pool.region))
        peer = self.transport.connect(source.region)
        for chunk in self.prefill.exports[prefill_handle]:
            target = self.decode.engine.import_blocks(decode_handle, chunk.first_token, chunk.num_tokens)
            assert target is not None
            manifest = self.manifest(chunk)
            pull_blocks(peer, source, manifest, self.decode.pool, target, DigestPolicy())
            self.decode.engine.import_commit(decode_handle, chunk.first_token, chunk.num_tokens)
            self.prefill.engine.export_release(prefill_handle, chunk.chunk_index)

    def manifest(self, chunk: ExportedChunk) -> KVManifest:
        return KVManifest(
            chunk.chunk_index,
            chunk.first_token,
            chunk.num_tokens,
            chunk.blocks,
            chunk.generations,
            digest_blocks(self.prefill.pool, chunk.blocks),
            chunk.final,
        )

    def resume(self, prefill_handle: int, decode_handle: int, request: Request) -> None:
        choices = range(request.params.n)
        outputs = [self.prefill.tokens[prefill_handle + c] for c in choices]
        self.decode.engine.resume(
            decode_handle, outputs, [prefill_handle + c in self.prefill.finishes for c in choices]
        )


class SelfPair(Pair):
    """One engine that hands over to itself. The decode half has another cache root: it must load, not find."""

    def start(self, request: Request) -> tuple[int, int]:
        other = renamed(request, "decode " + request.request_id[:8])
        return self.prefill.submit(request, Phase.PREFILL), self.decode.submit(other, Phase.DECODE)


def keys_of(request: Request, tokens: Sequence[int] = (), block_tokens: int = 16) -> list[bytes]:
    """Keys of the full blocks of a prompt and what came after it."""
    packed = block_keys(request.cache_root, (*request.prompt_token_ids, *tokens), block_tokens)
    return [packed[i : i + KEY_BYTES] for i in range(0, len(packed), KEY_BYTES)]


def make_request(name: str, length: int, max_tokens: int = 16, **params: object) -> Request:
    """Greedy unless told otherwise. Name and length make the prompt; the name makes the cache root, so that a second
    request of another name finds nothing cached."""
    seed = sum(name.encode())
    prompt = tuple((seed * 7919 + i * 104_729) % 40_000 + 100 for i in range(length))
    sampling = SamplingParams(**{"temperature": 0.0, "seed": 7, "max_tokens": max_tokens, **params})
    return Request(name, "smollm2-135m", prompt, sampling, cache_root=name.encode().ljust(16, b"."))


def renamed(request: Request, name: str) -> Request:
    """The same request where nothing of it is cached."""
    return replace(request, request_id=name, cache_root=name.encode().ljust(16, b"."))
