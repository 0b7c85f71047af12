"""`HandoverEngine` over vLLM: what the worker drives step by step, though vLLM runs by itself.

vLLM's processes compute whenever they have something; `step` collects what came since the last call and waits a moment
if that is nothing. Hand-over memory is a staging area in shared memory. A prompt's blocks in it are taken before vLLM
gets the request and given back when peer and vLLM have both let go, so vLLM never waits for staging, and requests
for which there is no room wait here, in order.

PREFILL: the connector copies finished blocks out; `step` sees them on the board and announces them. DECODE: peers
fill the blocks; with `resume` vLLM gets the request and loads them; its outputs so far are forced, and the last prompt
token is computed again, because vLLM samples only from a step.
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
from pdserve.engine.vllm.outputs import end_of, failed, finish_of, read_tokens
from pdserve.engine.vllm.requests import Choice, Live
from pdserve.engine.vllm.settings import VllmSettings
from pdserve.engine.vllm.staging import StagingPool
from pdserve.engine.vllm.start import import_vllm, make_memory
from pdserve.errors import EngineFailed, HandoverError, InvalidRequest, NotSupported
from pdserve.types import EngineLoad, Finish, KVLayout, ModelInfo, Phase, PromptStats, Request

if TYPE_CHECKING:
    from pdserve.engine.vllm.driver import Event, Job

POLL_S = 0.002
"""Longest wait of a step. Output ends it at once; progress on the board is only seen by looking, and 2 ms is small
beside the tens of ms of a prefill chunk."""
NUM_SLOTS = 4096
"""Transfers at once, 16 bytes a rank each: far above any batch, and more than MAX_CHOICES."""


class VllmEngine:
    """A `pdserve.engine.base.HandoverEngine`."""

    def __init__(self, settings: VllmSettings, memory_factory: KVMemoryFactory) -> None:
        """Starts vLLM (20 s and more). The factory must make memory with a `name` by which other processes of this
        host attach it (`kvstore.transports.shm.SharedMemoryPool`). Raises `ConfigError`, `EngineFailed`."""
        plan_model, finish_config, driver_class = import_vllm()
        plan = plan_model(settings)
        self._settings = settings
        self._layout: KVLayout = plan.layout
        self._memory = make_memory(memory_factory, settings, plan.layout, plan.model.max_model_len)
        self._board = TransferBoard.create(plan.tp_size, NUM_SLOTS)
        self._staging = StagingPool(self._memory, self._board)
        config = finish_config(plan, settings, self._connector_config(plan.block_shape))
        try:
            self._driver = driver_class(config)
        except Exception as error:
            self._board.close()
            raise EngineFailed(f"vLLM did not start: {error}") from error
        self._model: ModelInfo = replace(plan.model, eos_token_ids=self._driver.eos_token_ids)
        self._live: dict[int, Live] = {}
        """By each of a request's handles."""
        self._waiting: deque[Live] = deque()
        """For room in the staging area."""
        self._jobs: dict[Job, tuple[Live, Choice]] = {}
        self._exporting: dict[Live, None] = {}
        """PREFILL requests with blocks still to come, in order."""
        self._finishes: list[Finish] = []
        self._num_jobs = 0

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
            self._start(live)
        else:
            self._waiting.append(live)
            self._admit()

    def _take_over(self, live: Live, choice: Choice, outputs: tuple[int, ...]) -> None:
        """These are all its outputs so far; if they have ended it, say so instead of running it."""
        choice.forced = outputs[live.num_folded :]
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
                return
            self._waiting.popleft()
            live.blocks, slots = room
            for choice, slot in zip(live.choices, slots, strict=False):
                choice.slot = slot
            if live.phase is Phase.PREFILL:
                self._exporting[live] = None
                self._start(live)

    def _start(self, live: Live) -> None:
        """Give vLLM the choices that are open; the transfers of the others end here."""
        for choice in live.choices:
            if choice.closed and not live.carries_export(choice):
                self._drop_slot(choice)
            else:
                self._submit_job(live, choice)

    def _submit_job(self, live: Live, choice: Choice) -> None:
        from pdserve.engine.vllm.driver import Job
        from pdserve.engine.vllm.sampling import choice_params

        request, transfer = live.request, None
        if choice.slot is not None:
            generations = self._memory.generations[live.blocks].tolist()
            transfer = live.transfer(choice.slot, generations, self._settings.verify_loads)
        room = self._model.max_model_len - len(live.vllm_prompt)
        most = min(room, (request.params.max_tokens or self._model.max_model_len) - live.num_folded)
        max_tokens = len(choice.forced) + 1 if live.phase is Phase.PREFILL else most
        self._num_jobs += 1
        choice.job = Job(
            request_id=f"{request.request_id}-{choice.number}-{self._num_jobs}",
            prompt=live.vllm_prompt,
            params=choice_params(request, choice.number, max_tokens, choice.forced, transfer),
            cache_salt=request.cache_root.hex(),
            priority=request.priority,
        )
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
        self._exporting.pop(live, None)
        if live in self._waiting:
            self._waiting.remove(live)
        self._free_blocks(live)
        self._admit()

    def _free_blocks(self, live: Live) -> None:
        slots = live.slots
        for choice in live.choices:
            if choice.job is None:
                self._drop_slot(choice)
        announced = -(-live.num_exported // self._layout.block_tokens)
        for blocks in live.chunks.values():
            self._staging.retire_blocks(blocks)
        self._staging.retire_blocks(live.blocks[announced:], slots)
        live.blocks, live.chunks = [], {}

    def _drop_slot(self, choice: Choice) -> None:
        """End a transfer that vLLM knows nothing of (or has ended)."""
        if choice.slot is not None:
            self._board.end_all(choice.slot)
            self._staging.retire_slot(choice.slot)
            choice.slot = None

    # A step

    def has_work(self) -> bool:
        return bool(self._jobs or self._finishes or self._exporting or self._staging.retiring)

    def step(self) -> StepResult:
        """What came from vLLM since the last step. Raises `EngineFailed` when vLLM died."""
        result = StepResult()
        result.output.finishes, self._finishes = self._finishes, []
        for event in self._driver.take(0.0 if result.output.finishes else POLL_S):
            self._handle(event, result)
        for live in list(self._exporting):
            self._announce(live, result)
        self._staging.collect()
        self._admit()
        return result

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
            ending = Ending.RUNNING if choice.slot is None else self._board.ending(choice.slot)
            self._finish(choice, finish_of(live, choice, completion, self._model, ending), result)

    def _tell_prompt(self, live: Live, result: StepResult) -> None:
        """Once every choice has its first token: a prefill is complete then, and not before."""
        if live.prompt_told or live.phase is Phase.DECODE or not live.has_open_choices:
            return
        if all(choice.closed or choice.num_seen > len(choice.forced) for choice in live.choices):
            live.prompt_told = True
            prompt = live.request.prompt_token_ids
            result.output.prompts.append(PromptStats(live.handle, len(prompt), live.num_cached_tokens or 0))

    @staticmethod
    def _finish(choice: Choice, finish: Finish | None, result: StepResult) -> None:
        if finish is not None and not choice.closed:
            choice.closed = True
            result.output.finishes.append(finish)

    def _job_ended(self, live: Live, choice: Choice, event: Event) -> None:
        del self._jobs[event.job]
        choice.job = None
        if choice.slot is not None and event.reached_vllm:
            self._staging.retire_slot(choice.slot)
            choice.slot = None
        else:
            self._drop_slot(choice)
        self._drop_if_done(live)

    def _drop_if_done(self, live: Live) -> None:
        """FULL and DECODE end with their last choice; PREFILL when its blocks are released as well."""
        exports = live.phase is Phase.PREFILL and (live in self._exporting or live.chunks)
        if live.handle in self._live and not live.has_jobs and not exports and not live.blocks:
            for choice in live.choices:
                self._live.pop(choice.handle, None)

    def _announce(self, live: Live, result: StepResult) -> None:
        """Tell of the blocks that the connector has filled since the last look."""
        slot = live.choices[0].slot
        assert slot is not None, "an export keeps its slot until its last chunk is announced"
        chunk = live.next_chunk(self._board.num_tokens(slot), self._layout.block_tokens, self._memory.generations)
        if chunk is not None:
            result.exports.append(chunk)
            if chunk.final:
                del self._exporting[live]
                live.blocks = []

    def _export_ended(self, live: Live, result: StepResult) -> None:
        """vLLM is through with the request that carries the export. What it has not saved by now never comes."""
        if live in self._exporting:
            self._announce(live, result)
        if live in self._exporting:
            del self._exporting[live]
            for choice in live.choices:
                lost = EngineFailed("vLLM ended the prefill before all of its KV was saved")
                self._finish(choice, failed(choice, choice.num_seen, lost), result)

    # Hand-over

    def export_release(self, handle: int, chunk_index: int | None = None) -> None:
        live = self._live.get(handle)
        if live is None or live.handle != handle or live.phase is not Phase.PREFILL:
            return
        if chunk_index is None:
            self._exporting.pop(live, None)
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
        stats, cache = self._driver.stats, self._driver.config.cache_config
        total = (cache.num_gpu_blocks or 0) * cache.block_size // self._layout.block_tokens
        lives = {live for live in self._live.values() if live.phase is not Phase.DECODE and not live.prompt_told}
        return EngineLoad(
            num_running=stats.num_running,
            num_waiting=stats.num_waiting + sum(len(live.choices) for live in self._waiting),
            num_free_blocks=int(total * (1 - stats.kv_usage)),
            num_total_blocks=total,
            num_exported_blocks=sum(map(len, (b for live in set(self._live.values()) for b in live.chunks.values()))),
            num_prefill_tokens_waiting=sum(live.num_context_tokens - live.num_exported for live in lives),
            num_preemptions=stats.num_preemptions,
            prefix_cache_queries=stats.prefix_queries,
            prefix_cache_hits=stats.prefix_hits,
        )

    def close(self) -> None:
        self._driver.close()
        self._board.close()


def _check_supported(request: Request) -> None:
    """Raises `NotSupported`, and `InvalidRequest` for a grammar that does not compile."""
    if request.deterministic:
        raise NotSupported("deterministic requests need the torch engine: vLLM's batches vary", param="deterministic")
    if request.lora:
        raise NotSupported("this engine serves no LoRA adapters", param="model")
    if request.params.grammar is not None:
        from pdserve.engine.vllm.sampling import check_grammar

        check_grammar(request.params.grammar)
