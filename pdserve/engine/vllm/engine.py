"""`HandoverEngine` over vLLM: what the worker drives step by step, though vLLM runs by itself.

vLLM's processes compute whenever they have something; `step` collects what came since the last call and waits a moment
if that is nothing. Hand-over memory is a staging area in shared memory. A prompt's blocks in it are taken before vLLM
gets the request and given back when peer and vLLM have both let go, so vLLM never waits for staging, and requests
for which there is no room wait here, in order.

PREFILL: the connector copies finished blocks out (`exports.py`). DECODE: peers fill the blocks; with `resume` vLLM gets
the request and loads them; its outputs so far are forced, and the last prompt token is computed again, because vLLM
samples only from a step. Staging is a prefix cache as well: what a prompt finds in it vLLM loads instead of computing;
a store fills it (`fills.py`) and is filled from it (`saves.py`).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import xxhash

from pdserve.engine.base import ImportTarget, KVMemory, KVMemoryFactory, StepResult
from pdserve.engine.core.sequences import check_request
from pdserve.engine.vllm.board import Ending, TransferBoard
from pdserve.engine.vllm.cache import StagedCache
from pdserve.engine.vllm.exports import Exports, publish_context
from pdserve.engine.vllm.fills import Fills
from pdserve.engine.vllm.news import CacheEvents, CacheNews
from pdserve.engine.vllm.outputs import end_of, engine_load, failed, finish_of, read_tokens
from pdserve.engine.vllm.requests import Choice, Live
from pdserve.engine.vllm.saves import Saves
from pdserve.engine.vllm.settings import VllmSettings
from pdserve.engine.vllm.staging import StagingPool
from pdserve.engine.vllm.start import import_vllm, make_memory, start_error
from pdserve.engine.vllm.starter import Starter
from pdserve.errors import EngineFailed, HandoverError, InvalidRequest, NotSupported
from pdserve.types import EngineLoad, Finish, KVLayout, ModelInfo, Phase, PromptStats, Request

if TYPE_CHECKING:
    from pdserve.engine.vllm.driver import Event, Job

POLL_S = 0.002
"""Longest wait of a step. Output ends it; the board must be looked at: often, beside a chunk's tens of ms."""
NUM_SLOTS = 8192
"""Transfers at once, 88 bytes each: far above any batch, and more than two for each of MAX_CHOICES."""
EVENT_STEPS = 50
"""0.1 s after the last request has ended: vLLM's events of it may still come."""


class VllmEngine(StagedCache):
    """A `pdserve.engine.base.HandoverEngine`, and a `KVCache`."""

    def __init__(
        self, settings: VllmSettings, memory_factory: KVMemoryFactory, events: CacheEvents | None = None
    ) -> None:
        """Starts vLLM (20 s and more). The factory's memory must have a `name` for other processes of this host
        (`kvstore.transports.shm.SharedMemoryPool`). Without `events` of vLLM's own cache only staging is told of.
        Raises `ConfigError`, `EngineFailed`."""
        plan_model, finish_config, driver_class = import_vllm()
        plan = plan_model(settings)
        self._settings = settings
        self._layout: KVLayout = plan.layout
        self._memory = make_memory(memory_factory, settings, plan.layout, plan.model.max_model_len)
        self._board = TransferBoard.create(plan.tp_size, NUM_SLOTS)
        self._staging = StagingPool(self._memory, self._board, plan.layout.block_tokens, settings.verify_loads)
        self._events = events
        self._news = CacheNews(self._staging, events)
        self._fills = Fills(self._staging, self._news)
        self._saves = Saves(self._staging, self._news)
        config = finish_config(plan, settings, self._connector_config(plan.block_shape), events)
        self._caches = bool(config.cache_config.enable_prefix_caching)  # what vLLM made of it: not every backend can
        self._exports = Exports(self._staging, self._news, caching=self._caches)
        try:
            self._driver = driver_class(config, () if events is None else (events.run,))
        except Exception as error:
            self._board.close()
            raise start_error(error, self._board.refusal) from error
        self._model: ModelInfo = replace(plan.model, eos_token_ids=self._driver.eos_token_ids)
        self._starter = Starter(settings, self._model, self._staging, self._news, self._saves, caching=self._caches)
        self._live: dict[int, Live] = {}
        """By each of a request's handles."""
        self._waiting: deque[Live] = deque()
        """For room in the staging area."""
        self._filling: dict[int, Live] = {}
        """By handle: what waits for an open fill only."""
        self._jobs: dict[Job, tuple[Live, Choice]] = {}
        self._finishes: list[Finish] = []
        self._num_event_steps = 0

    @property
    def model(self) -> ModelInfo:
        return self._model

    @property
    def layout(self) -> KVLayout:
        return self._layout

    @property
    def memory(self) -> KVMemory:
        return self._memory

    def _connector_config(self, block_shape: tuple[int, ...]) -> dict[str, Any]:
        return {
            "staging": getattr(self._memory, "name"),  # noqa: B009 - no part of KVMemory; `make_memory` checked it
            "board": self._board.path,
            "num_ranks": self._board.num_ranks,
            "num_slots": self._board.num_slots,
            "block_shape": list(block_shape),
            "dtype": self._layout.dtype,
            "owner_pid": os.getpid(),
        }

    # Requests

    def submit(self, request: Request, handle: int, phase: Phase) -> None:
        check_request(request, phase, self._model, self._layout.block_tokens)
        _check_supported(request)
        live = Live(request, handle, phase)
        if any(choice.handle in self._live for choice in live.choices):
            raise InvalidRequest(f"handle {handle} is in use", param="handle")
        for choice in live.choices:
            self._take_over(live, choice, live.prior(choice.number))
        if not live.has_open_choices:
            return
        self._live.update({choice.handle: live for choice in live.choices})
        if phase is Phase.FULL:
            self._start_when_filled(live)
        else:
            self._waiting.append(live)
            self._admit()

    def _take_over(self, live: Live, choice: Choice, outputs: tuple[int, ...]) -> None:
        """These are all its outputs so far; if they have ended it, say so instead of running it."""
        choice.forced, choice.outputs = outputs[live.num_folded :], list(outputs)
        ended = end_of(live, outputs, self._model)
        if ended is not None and not choice.closed:
            self._finishes.append(Finish(choice.handle, ended[0], len(outputs), ended[1]))
            choice.closed = True

    def _admit(self) -> None:
        """Give staging to those that wait, first come first served."""
        while self._waiting:
            live = self._waiting[0]
            num_blocks = -(-live.num_context_tokens // self._layout.block_tokens)
            room = self._staging.allocate(num_blocks, 1 if live.phase is Phase.PREFILL else len(live.choices))
            if room is None:
                if self._fills.give_way():
                    continue
                return
            self._waiting.popleft()
            live.blocks, slots = room
            if live.phase is Phase.PREFILL:
                live.choices[0].save_slot = slots[0]
                self._exports.begin(live)
                self._start_when_filled(live)
                continue
            for choice, slot in zip(live.choices, slots, strict=True):
                choice.load_slot = slot

    def _start_when_filled(self, live: Live) -> None:
        if self._fills.is_open(live.handle):
            self._filling[live.handle] = live
        else:
            self._start(live)

    def _start(self, live: Live) -> None:
        """Give vLLM the choices that are open; the transfers of the others end here."""
        for choice in live.choices:
            if choice.closed and not live.carries_export(choice):
                self._drop_slots(choice)
            else:
                self._submit_job(live, choice)
        live.num_fetched_tokens = self._fills.close(live.handle) * self._layout.block_tokens

    def _submit_job(self, live: Live, choice: Choice) -> None:
        choice.job = self._starter.job(live, choice)
        self._jobs[choice.job] = (live, choice)
        self._driver.submit(choice.job)

    def cancel(self, handle: int) -> None:
        live = self._live.get(handle)
        if live is not None and live.handle == handle:
            self._forget(live)

    def cancel_choice(self, handle: int) -> None:
        live = self._live.get(handle)
        if live is None:
            return
        choice = live.choices[handle - live.handle]
        choice.closed = True
        if not live.has_open_choices:
            self._forget(live)
        elif choice.job is not None and not live.carries_export(choice):
            self._driver.abort(choice.job)

    def _forget(self, live: Live) -> None:
        """Free everything that the request holds. vLLM may touch its blocks for another step: then they are retired."""
        for choice in live.choices:
            choice.closed = True
            self._live.pop(choice.handle, None)
            if choice.job is not None:
                self._driver.abort(choice.job)
        self._exports.drop(live)
        if live in self._waiting:
            self._waiting.remove(live)
        self._filling.pop(live.handle, None)
        self._fills.close(live.handle)
        self._free_blocks(live)
        self._admit()

    def _free_blocks(self, live: Live) -> None:
        slots = live.slots
        for choice in live.choices:
            if choice.job is None:
                self._drop_slots(choice)
        announced = -(-live.num_exported // self._layout.block_tokens)
        for blocks in live.chunks.values():
            self._staging.retire_blocks(blocks)
        self._staging.retire_blocks(live.blocks[announced:], slots)
        live.blocks, live.chunks = [], {}

    def _drop_slots(self, choice: Choice) -> None:
        """End transfers that vLLM knows nothing of (or has ended)."""
        for slot in choice.slots:
            self._board.end_all(slot)
        self._retire_slots(choice)

    def _retire_slots(self, choice: Choice) -> None:
        self._saves.end(choice)
        for slot in choice.slots:
            self._staging.retire_slot(slot)
        choice.load_slot = choice.save_slot = None

    # A step

    def has_work(self) -> bool:
        busy = self._jobs or self._finishes or self._exports or self._staging.retiring or self._news
        return bool(busy or self._num_event_steps)

    def step(self) -> StepResult:
        """What came from vLLM since the last step. Raises `EngineFailed` when vLLM died."""
        result: StepResult = self._driver.pace.measured()
        result.output.finishes, self._finishes = self._finishes, []
        for event in self._driver.take(0.0 if result.output.finishes else POLL_S):
            self._handle(event, result)
        result.exports += self._exports.step()
        self._saves.step(room=not self._waiting)
        self._follow_events()
        self._staging.collect()
        self._admit()
        self._news.flush(result)
        return result

    def _follow_events(self) -> None:
        if self._jobs and self._events is not None:
            self._num_event_steps = EVENT_STEPS
        elif self._num_event_steps:
            self._num_event_steps -= 1
        self._news.follow()

    def _handle(self, event: Event, result: StepResult) -> None:
        live, choice = self._jobs[event.job]
        if event.error is not None:
            if event.dead:
                raise event.error
            self._finish(choice, failed(choice, choice.num_seen, event.error), result)
        elif event.output is not None:
            self._read(live, choice, event.output, result)
        if event.ended:
            if live.carries_export(choice):
                self._export_ended(live, result)
            self._job_ended(live, choice, event)

    def _read(self, live: Live, choice: Choice, output: Any, result: StepResult) -> None:
        completion = output.outputs[0]
        if live.num_cached_tokens is None:
            live.num_cached_tokens = min(output.num_cached_tokens or 0, len(live.request.prompt_token_ids))
        if not choice.closed:
            read_tokens(live, choice, completion, result.output)
        self._tell_prompt(live, result)
        if completion.finish_reason is not None and not choice.closed:
            ending = Ending.RUNNING if choice.load_slot is None else self._board.ending(choice.load_slot)
            self._finish(choice, finish_of(live, choice, completion, self._model, ending), result)

    def _tell_prompt(self, live: Live, result: StepResult) -> None:
        """Once every choice has its first token: a prefill is complete then, and not before."""
        if live.prompt_told or live.phase is Phase.DECODE or not live.has_open_choices:
            return
        if all(choice.closed or choice.num_seen > len(choice.forced) for choice in live.choices):
            live.prompt_told = True
            prompt = live.request.prompt_token_ids
            cached = live.num_cached_tokens or 0
            fetched = min(live.num_fetched_tokens, cached)
            result.output.prompts.append(PromptStats(live.handle, len(prompt), cached, fetched))

    @staticmethod
    def _finish(choice: Choice, finish: Finish | None, result: StepResult) -> None:
        if finish is not None and not choice.closed:
            choice.closed = True
            result.output.finishes.append(finish)

    def _job_ended(self, live: Live, choice: Choice, event: Event) -> None:
        del self._jobs[event.job]
        choice.job = None
        if event.reached_vllm:
            self._retire_slots(choice)
        else:
            self._drop_slots(choice)
        self._drop_if_done(live)

    def _drop_if_done(self, live: Live) -> None:
        """FULL and DECODE end with their last choice; PREFILL when its blocks are released as well."""
        exports = live.phase is Phase.PREFILL and (live in self._exports or live.chunks)
        if live.handle in self._live and not live.has_jobs and not exports and not live.blocks:
            for choice in live.choices:
                self._live.pop(choice.handle, None)

    def _export_ended(self, live: Live, result: StepResult) -> None:
        """vLLM is through with the request that carries the export. What it has not saved by now never comes."""
        chunk = self._exports.announce(live)
        if chunk is not None:
            result.exports.append(chunk)
        if live in self._exports:
            self._exports.drop(live)
            for choice in live.choices:
                lost = EngineFailed("vLLM ended the prefill before all of its KV was saved")
                self._finish(choice, failed(choice, choice.num_seen, lost), result)

    # Hand-over

    def export_release(self, handle: int, chunk_index: int | None = None) -> None:
        live = self._live.get(handle)
        if live is None or live.handle != handle or live.phase is not Phase.PREFILL:
            return
        if chunk_index is None:
            self._exports.drop(live)
            self._free_blocks(live)
        else:
            self._staging.retire_blocks(live.chunks.pop(chunk_index, []))
        self._drop_if_done(live)
        self._admit()

    def import_blocks(self, handle: int, first_token: int, num_tokens: int) -> ImportTarget | None:
        live = self._importing(handle)
        start, end = live.span(first_token, num_tokens, self._layout.block_tokens)
        return ImportTarget(tuple(live.blocks[start:end])) if live.blocks else None

    def import_commit(self, handle: int, first_token: int, num_tokens: int) -> None:
        live = self._importing(handle)
        if not live.blocks:
            raise HandoverError(f"tokens from {first_token} on were committed, but no blocks were given")
        for index in range(*live.span(first_token, num_tokens, self._layout.block_tokens)):
            block = self._memory.blocks[live.blocks[index]]
            live.digests[index] = xxhash.xxh3_128_hexdigest(block) if self._settings.verify_loads else ""

    def resume(self, handle: int, output_token_ids: Sequence[Sequence[int]], finished: Sequence[bool]) -> None:
        live = self._importing(handle)
        if not live.blocks or len(live.digests) < len(live.blocks):
            raise HandoverError(f"{len(live.digests)} of {len(live.blocks)} blocks were committed before resume")
        for choice, outputs, ended in zip(live.choices, output_token_ids, finished, strict=True):
            choice.closed |= ended
            self._take_over(live, choice, (*live.prior(choice.number), *outputs))
        if self._caches:
            publish_context(self._staging, self._news, live, 0, live.num_context_tokens)
        slots = live.slots
        self._start(live)
        self._staging.retire_blocks(live.blocks, slots)
        live.blocks = []
        self._drop_if_done(live)

    def _importing(self, handle: int) -> Live:
        """Raises `KeyError` for an unknown handle, or one that imports nothing (any more)."""
        live = self._live[handle]
        if live.phase is not Phase.DECODE or live.has_jobs:
            raise KeyError(handle)
        return live

    def load(self) -> EngineLoad:
        num_waiting = sum(len(live.choices) for live in (*self._waiting, *self._filling.values()))
        return engine_load(self._driver, set(self._live.values()), self._layout.block_tokens, num_waiting)

    def close(self) -> None:
        self._driver.close()
        self._board.close()
        if self._events is not None:
            self._events.close()


def _check_supported(request: Request) -> None:
    """Raises `NotSupported`, and `InvalidRequest` for a grammar that does not compile."""
    if request.deterministic:
        raise NotSupported("deterministic requests need the torch engine: vLLM's batches vary", param="deterministic")
    if request.lora:
        raise NotSupported("this engine serves no LoRA adapters", param="model")
    if request.params.grammar is not None:
        from pdserve.engine.vllm.sampling import check_grammar

        check_grammar(request.params.grammar)
