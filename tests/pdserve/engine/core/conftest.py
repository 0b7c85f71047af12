"""A twin of a model that computes for real: the KV of a token is a hash of the KV before it, and the next token is a
hash of all the KV that lies in the sequence's blocks now. A wrong, stale or missing block gives a wrong token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, ClassVar

import numpy as np
import pytest

from pdserve.block_keys import KEY_BYTES, block_keys
from pdserve.engine.base import ExportedChunk, ImportTarget, PublishedBlocks, StepResult
from pdserve.engine.core.config import CoreConfig
from pdserve.engine.core.engine import LocalEngine
from pdserve.engine.core.runner import Sampled, Scheduled
from pdserve.engine.core.runner import Sequence as RunnerSequence
from pdserve.engine.memory import LocalMemory
from pdserve.errors import EngineFailed
from pdserve.types import Finish, KVLayout, Logprobs, ModelInfo, Phase, PromptStats, Request, SamplingParams

BLOCK = 4
VOCAB = 50
EOS = 7
TOKEN_BYTES = 16


def kv_of(token_ids: Sequence[int]) -> bytes:
    """The KV that the twin computes for these tokens, all of it."""
    kv = [b""]
    for token_id in token_ids:
        kv.append(_hash(kv[-1], token_id.to_bytes(4, "little")))
    return b"".join(kv)


def _hash(*parts: bytes) -> bytes:
    return blake2b(b"".join(parts), digest_size=TOKEN_BYTES).digest()


class TwinRunner:
    """A `ModelRunner`. `pool_is_host_memory` False makes it behave like a device."""

    def __init__(self, pool_is_host_memory: bool = True, max_model_len: int = 512) -> None:
        self.pool_is_host_memory = pool_is_host_memory
        self.model = ModelInfo("twin", "r1", "twin", max_model_len, VOCAB, (EOS,))
        self.layout = KVLayout("r1", "u8", BLOCK, 1, 1, TOKEN_BYTES, BLOCK * TOKEN_BYTES)
        self.opened: list[RunnerSequence] = []
        self.batches: list[list[tuple[int, int, int]]] = []
        """(handle, start, number of tokens) of each item of each batch."""
        self.num_copied_blocks = 0
        self.num_computed_tokens = 0
        self.closed = 0
        self.fail_handles: set[int] = set()
        self.forbidden: Callable[[int], bool] = lambda block: False

    def allocate(self, num_blocks: int, host_blocks: Any) -> None:
        assert (host_blocks is not None) == self.pool_is_host_memory
        shape = (num_blocks, self.layout.block_bytes)
        self.pool = np.zeros(shape, dtype=np.uint8) if host_blocks is None else host_blocks
        assert self.pool.shape == shape

    def open(self, seq: RunnerSequence) -> None:
        assert seq not in self.opened
        self.opened.append(seq)

    def drop(self, seq: RunnerSequence) -> None:
        if seq in self.opened:
            self.opened.remove(seq)

    def run(self, batch: Sequence[Scheduled]) -> list[Sampled]:
        self.batches.append([(item.seq.handle, item.start, item.num_tokens) for item in batch])
        for item in batch:
            self._compute(item)
        return [self._sample(item, choice) for item in batch for choice in item.choices]

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        self.num_copied_blocks += len(sources)
        for source, target in zip(sources, targets, strict=True):
            self.pool[target] = self.pool[source]

    def stage_out(self, pool_blocks: Sequence[int], staging: Any, staging_blocks: Sequence[int]) -> None:
        staging[list(staging_blocks)] = self.pool[list(pool_blocks)]

    def stage_in(self, staging: Any, staging_blocks: Sequence[int], pool_blocks: Sequence[int]) -> None:
        self.pool[list(pool_blocks)] = staging[list(staging_blocks)]

    def close(self) -> None:
        self.closed += 1

    def _token(self, seq: RunnerSequence, position: int) -> Any:
        start = position % BLOCK * TOKEN_BYTES
        return self.pool[seq.block_table[position // BLOCK]][start : start + TOKEN_BYTES]

    def _compute(self, item: Scheduled) -> None:
        assert item.num_tokens >= 1
        assert item.seq.num_computed_tokens == item.start
        assert item.start + item.num_tokens <= min(len(item.seq.block_table) * BLOCK, len(item.seq.token_ids))
        self.num_computed_tokens += item.num_tokens
        for position in range(item.start, item.start + item.num_tokens):
            before = self._token(item.seq, position - 1).tobytes() if position else b""
            token = item.seq.token_ids[position].to_bytes(4, "little")
            self._token(item.seq, position)[:] = np.frombuffer(_hash(before, token), dtype=np.uint8)

    def _sample(self, item: Scheduled, choice: RunnerSequence) -> Sampled:
        assert choice in self.opened
        assert choice.token_ids[: item.start + item.num_tokens] == item.seq.token_ids[: item.start + item.num_tokens]
        if choice.handle in self.fail_handles:
            return Sampled(0, error=EngineFailed("no token could be drawn"))
        seen = b"".join(self._token(item.seq, i).tobytes() for i in range(item.start + item.num_tokens))
        index = choice.num_output_tokens
        draw = 0 if choice.request.params.greedy else choice.choice
        digest = _hash(seen, index.to_bytes(4, "little"), draw.to_bytes(4, "little"))
        token_id = self._masked(choice, int.from_bytes(digest[:4], "little") % VOCAB)
        wanted = choice.request.params.logprobs
        logprobs = None if wanted is None else Logprobs(choice.handle, index, -1.0, 1)
        return Sampled(token_id, logprobs)

    def _masked(self, choice: RunnerSequence, token_id: int) -> int:
        params = choice.request.params
        stops = {EOS, *params.stop_token_ids} if choice.num_output_tokens < params.min_tokens else set()
        while token_id in stops:
            token_id = (token_id + 1) % VOCAB
        return token_id


@dataclass
class Collected:
    """What an engine said, by choice handle."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    finishes: dict[int, Finish] = field(default_factory=dict)
    prompts: dict[int, PromptStats] = field(default_factory=dict)
    logprobs: list[Logprobs] = field(default_factory=list)
    exports: list[ExportedChunk] = field(default_factory=list)
    first_indexes: dict[int, int] = field(default_factory=dict)

    def add(self, result: StepResult) -> StepResult:
        output = result.output
        assert output.counts == [1] * len(output.token_ids)
        for handle, index, token_id in zip(output.handles, output.first_indexes, output.token_ids, strict=True):
            assert handle not in self.finishes, "a token after the end"
            self.first_indexes.setdefault(handle, index)
            tokens = self.tokens.setdefault(handle, [])
            assert index == self.first_indexes[handle] + len(tokens), "a gap or a repeat"
            tokens.append(token_id)
        for finish in output.finishes:
            assert finish.handle not in self.finishes, "two ends"
            self.finishes[finish.handle] = finish
        for stats in output.prompts:
            assert stats.handle not in self.prompts, "two PromptStats"
            self.prompts[stats.handle] = stats
        self.logprobs += output.logprobs
        self.exports += result.exports
        return result


def keys_of(token_ids: Sequence[int]) -> list[bytes]:
    packed = block_keys(bytes(KEY_BYTES), token_ids, BLOCK)
    return [packed[i : i + KEY_BYTES] for i in range(0, len(packed), KEY_BYTES)]


class Bench:
    """An engine on a twin, and what it has said."""

    def __init__(self, num_blocks: int = 64, *, host: bool = True, max_model_len: int = 512, **settings: Any) -> None:
        settings = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "chunk_tokens": 16, **settings}
        self.runner = TwinRunner(host, max_model_len)
        self.engine = LocalEngine(self.runner, LocalMemory, CoreConfig(num_blocks=num_blocks, **settings))
        self.said = Collected()
        self.view: set[bytes] = set()
        """Keys in the prefix cache, as its news tell."""
        self.fills: dict[int, tuple[ImportTarget, list[int], int]] = {}
        """Open ones, by handle: target, tokens, first block."""

    def submit(self, prompt: Sequence[int], handle: int = 0, phase: Phase = Phase.FULL, **fields: Any) -> Request:
        request = make_request(prompt, **fields)
        self.engine.submit(request, handle, phase)
        return request

    def step(self) -> StepResult:
        return self.take(self.engine.step())

    def take(self, result: StepResult) -> StepResult:
        """What a step gave: its news must make the cache's content known exactly."""
        self.said.add(result)
        self.view -= set(result.evicted)
        self.view |= {key for published in result.published for key in published.keys}
        assert self.view == set(self.engine.cached_keys())
        for published in result.published:
            self.check_published(published)
        self.engine.check_integrity()
        return result

    def check_published(self, published: PublishedBlocks) -> None:
        """Blocks whose generation is still the one that was told hold what the key says."""
        if not published.blocks:
            assert self.engine._area.staged
            return
        memory = self.engine.memory
        for key, block, generation in zip(published.keys, published.blocks, published.generations, strict=True):
            if memory.generations[block] == generation:
                content = memory.blocks[block].tobytes()
                assert self.known.setdefault(key, content) == content, "a key with other bytes"

    keys_of = staticmethod(keys_of)
    kv_of = staticmethod(kv_of)
    known: ClassVar[dict[bytes, bytes]] = {}
    """Bytes by key, of all engines: a key names the tokens that the bytes follow from."""

    def open_fill(self, handle: int, token_ids: Sequence[int], num_blocks: int, first_block: int = 0) -> bool:
        """As before a fetch; False if there is no room."""
        keys = keys_of(token_ids)[:num_blocks]
        target = self.engine.cache_open(handle, keys, first_block)
        if target is None:
            return False
        assert 0 < len(target.blocks) <= len(keys) - first_block
        self.fills[handle] = target, list(token_ids), first_block
        return True

    def end_fill(self, handle: int, num_blocks: int) -> None:
        """Write so many of the blocks, rubbish into the others, and commit them."""
        target, token_ids, first_block = self.fills.pop(handle)
        kv, size = kv_of(token_ids), BLOCK * TOKEN_BYTES
        for i, block in enumerate(target.blocks[target.num_cached_blocks :], target.num_cached_blocks):
            start = (first_block + i) * size
            content = kv[start : start + size] if i < num_blocks else b"?" * size
            self.engine.memory.blocks[block] = np.frombuffer(content, dtype=np.uint8)
        self.engine.cache_commit(handle, num_blocks)

    def drop_fill(self, handle: int) -> None:
        """Half-written, and not wanted any more."""
        target, *_ = self.fills.pop(handle)
        self.engine.memory.blocks[list(target.blocks[target.num_cached_blocks :])] = 0x3F
        self.engine.cache_drop(handle)

    def drain(self, limit: int = 3000) -> Collected:
        for _ in range(limit):
            if not self.engine.has_work():
                return self.said
            self.step()
        raise AssertionError("the engine does not come to an end")

    def pull(self, source: Bench, handle: int, chunk: ExportedChunk) -> bool:
        """Copy a chunk as a decode worker does; False if there is no room."""
        target = self.engine.import_blocks(handle, chunk.first_token, chunk.num_tokens)
        if target is None:
            return False
        pairs = list(zip(chunk.blocks, target.blocks, chunk.generations, strict=True))[target.num_cached_blocks :]
        for theirs, ours, generation in pairs:
            assert source.engine.memory.generations[theirs] == generation
            self.engine.memory.blocks[ours] = source.engine.memory.blocks[theirs]
        self.engine.import_commit(handle, chunk.first_token, chunk.num_tokens)
        return True

    def assert_empty(self) -> None:
        """Nothing is held any more."""
        load = self.engine.load()
        assert load.num_free_blocks == load.num_total_blocks
        assert (load.num_running, load.num_waiting, load.num_exported_blocks) == (0, 0, 0)
        assert self.runner.opened == []
        self.engine.check_integrity()


def make_request(prompt: Sequence[int], outputs: Sequence[Sequence[int]] = (), **params: Any) -> Request:
    priority = params.pop("priority", 0)
    keys = params.pop("block_keys", b"")
    return Request(
        request_id="r",
        model="twin",
        prompt_token_ids=tuple(prompt),
        params=SamplingParams(**{"temperature": 0.0, "ignore_eos": True, "seed": 1, **params}),
        output_token_ids=tuple(tuple(tokens) for tokens in outputs),
        priority=priority,
        block_keys=keys,
    )


def run_alone(request: Request) -> dict[int, list[int]]:
    """Tokens by choice, from a fresh engine with plenty of room."""
    bench = Bench(700, max_num_seqs=200, max_num_batched_tokens=4096, chunk_tokens=4096, prefix_cache=False)
    bench.engine.submit(request, 0, Phase.FULL)
    while bench.engine.has_work():
        bench.said.add(bench.engine.step())
    return bench.said.tokens


@pytest.fixture
def bench() -> type[Bench]:
    return Bench


@pytest.fixture
def request_of() -> Callable[..., Request]:
    return make_request


@pytest.fixture
def alone() -> Callable[[Request], dict[int, list[int]]]:
    return run_alone
