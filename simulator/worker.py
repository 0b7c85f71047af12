"""A worker in virtual time: an engine core, its hand-over in both directions, and its way to the stores.

The steps are those of `worker_core`: chunks are pulled as they are exported, decode resumes when all KV and the first
token are there, blocks that a store holds are fetched before the prompt is computed, and what was computed is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from kvstore.index.base import split_keys
from kvstore.node.entries import Hit
from pdserve.engine.base import ExportedChunk, PublishedBlocks, StepResult
from pdserve.engine.core.blocks import CachePolicy
from pdserve.engine.core.config import CoreConfig
from pdserve.engine.timing import TimingModel
from pdserve.types import CacheDelta, Phase, PromptStats, Request, WorkerInfo
from router.scheduling.base import Outstanding
from simulator.engines import VirtualEngine
from simulator.events import EventQueue
from simulator.network import Network
from simulator.store import NodeStore
from worker_core.cache_view import CacheView


class Listener(Protocol):
    """The router's end of a request."""

    def on_prompt(self, stats: PromptStats) -> None:
        """The prompt is computed and its first token is there."""
        ...

    def on_decoding(self) -> None:
        """Decode holds all the KV."""
        ...

    def on_end(self, num_output_tokens: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Around:
    """What all workers of a simulation share. `stores` by address; `num_kv_bytes` of a token."""

    queue: EventQueue
    network: Network
    host_links: Network
    stores: Mapping[str, NodeStore]
    num_kv_bytes: int


@dataclass(slots=True, eq=False)
class Pull:
    """A pair's KV on its way to decode: chunks that wait for room, chunks that move, and whether the end is known."""

    source: SimWorker
    source_handle: int
    target: SimWorker
    handle: int
    waiting: list[ExportedChunk] = field(default_factory=list)
    num_moving: int = 0
    has_all: bool = False
    is_prefilled: bool = False

    @property
    def complete(self) -> bool:
        return self.is_prefilled and self.has_all and not self.waiting and not self.num_moving


@dataclass(slots=True)
class Job:
    """A submission on a worker. `pull`: PREFILL feeds it, DECODE waits for it."""

    request: Request
    phase: Phase
    listener: Listener
    pull: Pull | None = None
    stats: PromptStats | None = None
    num_held_steps: int = 0


class SimWorker:
    """A `router.scheduling.base.Candidate`."""

    def __init__(
        self,
        info: WorkerInfo,
        around: Around,
        config: CoreConfig,
        timing: TimingModel,
        *,
        cache_policy: CachePolicy | None = None,
        late_release: bool = False,
    ) -> None:
        """`late_release`: a computed prompt leaves a prefill worker only when that has no prompt left to compute, or
        after as many further steps as the request has outputs. NVIDIA Dynamo's replay (1.4.2) behaves so: there a
        prefill worker runs the whole request, the outputs at no cost."""
        self.info = info
        self.draining = False
        self.own = Outstanding()
        self.foreign = Outstanding()
        self.on_cache: Callable[[CacheDelta], None] | None = None
        self.engine = VirtualEngine(
            around.queue, info.model, info.block_tokens, config, timing, self._on_step, cache_policy
        )
        self._around = around
        self._late_release = late_release
        self._cache = CacheView()
        self._jobs: dict[int, Job] = {}
        self._held: list[int] = []
        """Handles of computed prompts that are released late."""
        self._hungry: list[Pull] = []
        """Pulls with chunks that found no room here."""
        self._next_handle = 1

    # ---- submissions ----

    def submit_full(self, request: Request, listener: Listener, prefix_store: str = "") -> None:
        self._compute(self._add(Job(request, Phase.FULL, listener)), prefix_store)

    def submit_pair(self, request: Request, decode: SimWorker, listener: Listener, prefix_store: str = "") -> None:
        """Prefill here; `decode` pulls the KV and goes on."""
        job, other = Job(request, Phase.PREFILL, listener), Job(request, Phase.DECODE, listener)
        handle, target = self._add(job), decode._add(other)
        job.pull = other.pull = Pull(self, handle, decode, target)
        decode._start(target)
        self._compute(handle, prefix_store)

    def _add(self, job: Job) -> int:
        handle, self._next_handle = self._next_handle, self._next_handle + 1
        self._jobs[handle] = job
        return handle

    def _start(self, handle: int) -> None:
        job = self._jobs[handle]
        self.engine.core.submit(job.request, handle, job.phase)
        self.engine.wake()

    # ---- stores ----

    def _compute(self, handle: int, prefix_store: str) -> None:
        """Queue the prompt in the engine, what a store has of it first."""
        own = self._around.stores.get(self.info.store_address)
        store = self._around.stores.get(prefix_store) or own
        request, block_tokens = self._jobs[handle].request, self.info.block_tokens
        keys = list(split_keys(request.block_keys))[: (len(request.prompt_token_ids) - 1) // block_tokens]
        num_cached = self._cache.match(keys)
        if store is None or num_cached == len(keys):
            self._start(handle)
            return
        hit = store.lookup(keys, self.info.fingerprint, self.info.worker_id)
        num_found = len(hit.slots)
        target = self.engine.core.cache_open(handle, keys[:num_found], num_cached) if num_found > num_cached else None
        if target is None:
            store.release(hit, self.info.worker_id)
            self._start(handle)
            return
        num_bytes = (len(target.blocks) - target.num_cached_blocks) * block_tokens * self._around.num_kv_bytes
        links = self._around.host_links if store is own else self._around.network
        fetched = partial(self._fetched, handle, store, hit, len(target.blocks))
        links.send(store.node, self.info.worker_id, num_bytes, fetched)

    def _fetched(self, handle: int, store: NodeStore, hit: Hit, num_blocks: int) -> None:
        store.release(hit, self.info.worker_id)
        self.engine.core.cache_commit(handle, num_blocks)
        self._start(handle)

    def _keep(self, published: PublishedBlocks) -> None:
        """Copy to the node's store what it does not have of this chain."""
        store, job = self._around.stores.get(self.info.store_address), self._jobs.get(published.handle)
        if store is None or job is None or job.phase is Phase.DECODE:
            return
        end = published.first_block + len(published.keys)
        keys = list(split_keys(job.request.block_keys))[:end]
        reservation, num_blocks = store.reserve(keys, self.info.fingerprint, self.info.worker_id)
        if num_blocks:
            done = partial(store.commit, reservation, self.info.worker_id, num_blocks)
            num_bytes = num_blocks * self.info.block_tokens * self._around.num_kv_bytes
            self._around.host_links.send(self.info.worker_id, store.node, num_bytes, done)

    # ---- steps ----

    def _on_step(self, result: StepResult) -> None:
        delta = self._cache.update(result)
        if delta and self.on_cache is not None:
            self.on_cache(delta)
        if self.info.store_address:
            for published in result.published:
                self._keep(published)
        for chunk in result.exports:
            self._export(chunk)
        for stats in result.output.prompts:
            self._computed(stats)
        if self._held:
            self._release_due()
        for finish in result.output.finishes:
            self._finished(finish.handle, finish.num_output_tokens)
        if self._hungry:
            hungry, self._hungry = self._hungry, []
            for pull in hungry:
                self._pull(pull)

    def _computed(self, stats: PromptStats) -> None:
        job = self._jobs[stats.handle]
        job.stats = stats
        if job.phase is Phase.DECODE:
            return
        if self._late_release and job.phase is Phase.PREFILL:
            job.num_held_steps = job.request.params.max_tokens or 1
            self._held.append(stats.handle)
        else:
            self._release(stats.handle)

    def _release_due(self) -> None:
        """The prompts whose time has come: `late_release`."""
        idle = not self.engine.core.load().num_prefill_tokens_waiting
        still: list[int] = []
        for handle in self._held:
            job = self._jobs[handle]
            job.num_held_steps -= 1
            if idle or job.num_held_steps <= 0:
                self._release(handle)
            else:
                still.append(handle)
        self._held = still

    def _release(self, handle: int) -> None:
        """The prompt and its first token are out."""
        job = self._jobs[handle]
        assert job.stats is not None, "a prompt is released when it is computed"
        job.listener.on_prompt(job.stats)
        if job.pull is not None:
            del self._jobs[handle]
            job.pull.is_prefilled = True
            job.pull.target._resume_if_complete(job.pull)

    def _finished(self, handle: int, num_output_tokens: int) -> None:
        job = self._jobs.get(handle)
        if job is not None and job.phase is not Phase.PREFILL:
            del self._jobs[handle]
            job.listener.on_end(num_output_tokens)

    # ---- hand-over ----

    def _export(self, chunk: ExportedChunk) -> None:
        pull = self._jobs[chunk.handle].pull
        assert pull is not None, "only PREFILL exports"
        pull.waiting.append(chunk)
        pull.has_all = pull.has_all or chunk.final
        pull.target._pull(pull)

    def _pull(self, pull: Pull) -> None:
        """Begin with the chunks for which there is room."""
        while pull.waiting:
            chunk = pull.waiting[0]
            target = self.engine.core.import_blocks(pull.handle, chunk.first_token, chunk.num_tokens)
            if target is None:
                if pull not in self._hungry:
                    self._hungry.append(pull)
                return
            pull.waiting.pop(0)
            pull.num_moving += 1
            num_tokens = max(chunk.num_tokens - target.num_cached_blocks * self.info.block_tokens, 0)
            num_bytes = num_tokens * self._around.num_kv_bytes
            source = pull.source.info.worker_id
            self._around.network.send(source, self.info.worker_id, num_bytes, partial(self._arrived, pull, chunk))

    def _arrived(self, pull: Pull, chunk: ExportedChunk) -> None:
        self.engine.core.import_commit(pull.handle, chunk.first_token, chunk.num_tokens)
        pull.source.engine.core.export_release(pull.source_handle, chunk.chunk_index)
        pull.source.engine.wake()
        pull.num_moving -= 1
        self._resume_if_complete(pull)

    def _resume_if_complete(self, pull: Pull) -> None:
        if pull.complete:
            self.engine.core.resume(pull.handle, ((0,),), (False,))
            self._jobs[pull.handle].listener.on_decoding()
            self.engine.wake()
