"""Beside vLLM's scheduler: turns its schedule into copies. Knows no memory.

A load is decided once, when vLLM first gives the request blocks: asked again (it was preempted, or its load failed),
vLLM computes. A save goes on over all chunks of a chunked prefill, cached blocks too, and over what is generated; a
preempted request goes on where it was, from its new blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kvstore.vllm_connector.plan import Copies, LoadCopy, Save, SaveCopy, transfers_of


@dataclass(slots=True)
class _Saving:
    request: Any
    save: Save
    vllm_blocks: list[int] = field(default_factory=list)
    ordered: int = 0
    """Tokens whose copy was ordered."""


class SchedulerSide:
    """One engine's. Every transfer ends: by a final copy, by its load's end, or as dropped."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._saving: dict[str, _Saving] = {}
        self._decided: set[str] = set()
        self._copies = Copies()

    def num_loadable(self, request: Any, num_computed_tokens: int) -> int:
        """Tokens past the cached ones that staging holds. No side effect: vLLM may ask several times."""
        load = transfers_of(request.kv_transfer_params).load
        if load is None or request.request_id in self._decided:
            return 0
        if num_computed_tokens < load.first_block * self._block_tokens:
            return 0  # vLLM's cache has lost what it had when this was asked for
        return max(0, min(load.num_tokens, int(request.num_prompt_tokens)) - num_computed_tokens)

    def allocated(self, request: Any, vllm_blocks: list[int], num_loaded: int) -> None:
        """vLLM gave the request blocks. The first time decides what becomes of its transfers."""
        request_id, transfers = request.request_id, transfers_of(request.kv_transfer_params)
        if request_id in self._decided or (transfers.load is None and transfers.save is None):
            return
        self._decided.add(request_id)
        if transfers.save is not None:
            self._saving[request_id] = _Saving(request, transfers.save)
        load = transfers.load
        if load is not None and num_loaded:
            last = min(load.num_tokens, int(request.num_prompt_tokens))
            self._copies.loads.append(LoadCopy(request_id, load, last - num_loaded, last, tuple(vllm_blocks)))
        elif load is not None:
            self._copies.dropped.append(load.slot)

    def plan(self, schedule: Any) -> Copies:
        """The copies of one step; called once a step."""
        for new in schedule.scheduled_new_reqs:
            if new.req_id in self._saving:
                self._saving[new.req_id].vllm_blocks = list(new.block_ids[0])
                self._order(new.req_id, new.num_computed_tokens + schedule.num_scheduled_tokens[new.req_id])
        self._plan_running(schedule.scheduled_cached_reqs, schedule.num_scheduled_tokens)
        copies, self._copies = self._copies, Copies()
        return copies

    def _plan_running(self, cached: Any, num_scheduled: dict[str, int]) -> None:
        for index, request_id in enumerate(cached.req_ids):
            saving = self._saving.get(request_id)
            if saving is None:
                continue
            added = list((cached.new_block_ids[index] or ([],))[0])
            resumed = request_id in cached.resumed_req_ids
            saving.vllm_blocks = added if resumed else saving.vllm_blocks + added
            self._order(request_id, cached.num_computed_tokens[index] + num_scheduled[request_id])

    def _order(self, request_id: str, num_computed: int) -> None:
        """Order the copy of what is newly whole. A token that vLLM scheduled before it was sampled (asynchronous
        scheduling) may yet be another one: only known tokens are saved."""
        saving = self._saving[request_id]
        save, known = saving.save, min(num_computed, int(saving.request.num_tokens))
        final = bool(save.num_tokens) and known >= save.num_tokens
        last = save.num_tokens if final else known - known % self._block_tokens
        if final or last > max(saving.ordered, save.first_block * self._block_tokens):
            self._copies.saves.append(SaveCopy(save, last, final, tuple(saving.vllm_blocks)))
            saving.ordered = last
        if final:
            del self._saving[request_id]

    def finished(self, request: Any) -> None:
        """vLLM ended the request, for whatever reason. A transfer without a final copy ends now; one that has it
        (every load) ends by itself."""
        saving = self._saving.pop(request.request_id, None)
        if saving is not None:
            self._copies.dropped.append(saving.save.slot)
        if request.request_id in self._decided:
            self._decided.discard(request.request_id)
            return
        transfers = transfers_of(request.kv_transfer_params)
        self._copies.dropped += [part.slot for part in (transfers.load, transfers.save) if part is not None]
