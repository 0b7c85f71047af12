"""Moves KV between vLLM's paged cache and the staging area: the connector that vLLM loads by our module path.

vLLM makes it twice. `SchedulerSide` lives beside vLLM's scheduler and decides, step by step, which tokens of which
request move; `WorkerSide` lives beside the model, where it maps the staging area and the transfer board (both made
by `pdserve.engine.vllm`) and copies. Between them travels one `TransferPlan` a step, in order.

Saving: after each step the whole blocks that it finished are copied out, at the end of the prompt the partial tail;
all chunks of a chunked prefill, cached blocks too, each block once even if the request is preempted and computed
again. Loading runs in a thread of its own while other requests decode. A staging block is checked against its
generation before and after it was copied, and against its digest, before vLLM's cache is touched.

Every transfer ends exactly once on the board, whatever happens: moved, dropped by vLLM (cancelled), or found bad.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, KVConnectorRole

from kvstore.transports.shm import SharedMemoryPool
from pdserve.engine.vllm.board import Ending, TransferBoard
from pdserve.engine.vllm.pages import PagedKV, paged_kv
from pdserve.engine.vllm.parent import end_with_parent

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

LOAD_TOKENS = 1024
"""Tokens that a load checks and copies at once: bounds its private copy (330 MB for a 70B model in bf16)."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(slots=True)
class Transfer:
    """One prompt on its way, as the engine described it in `kv_transfer_params`, and how far it is."""

    slot: int
    blocks: list[int]
    """Staging blocks; the i-th holds tokens from i * block_tokens."""
    generations: list[int]
    num_tokens: int
    loads: bool
    digests: list[str] = field(default_factory=list)
    vllm_blocks: list[int] = field(default_factory=list)
    moved: int = 0
    """Tokens whose copy was ordered (a load: tokens that vLLM's own prefix cache already had)."""


@dataclass(frozen=True, slots=True)
class Copy:
    """Tokens [first, last) of a transfer, between these blocks; the tuples start at token 0."""

    request_id: str
    slot: int
    first: int
    last: int
    final: bool
    vllm_blocks: tuple[int, ...]
    blocks: tuple[int, ...]
    generations: tuple[int, ...]
    digests: tuple[str, ...] = ()


@dataclass
class TransferPlan(KVConnectorMetadata):  # type: ignore[misc]  # vllm has no types
    """What the workers do in one step."""

    saves: list[Copy] = field(default_factory=list)
    loads: list[Copy] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    """Slots of transfers that end without (further) copies."""


class SchedulerSide:
    """Turns vLLM's schedule into copies. Knows no memory."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._open: dict[str, Transfer] = {}
        """Transfers that still need a copy, or an end."""
        self._seen: set[str] = set()
        """Requests whose load was decided: asked again (preempted, or the load failed), vLLM must compute."""
        self._plan = TransferPlan()

    def num_loadable(self, request: Any, num_computed_tokens: int) -> int:
        """Tokens past the cached ones that staging holds. No side effect: vLLM may ask several times."""
        params = request.kv_transfer_params
        if not params or not params["loads"] or request.request_id in self._seen:
            return 0
        num_tokens: int = min(params["num_tokens"], request.num_prompt_tokens)
        return max(0, num_tokens - num_computed_tokens)

    def allocated(self, request: Any, vllm_blocks: list[int], num_loaded: int) -> None:
        """vLLM gave the request blocks. The first time decides what becomes of its transfer."""
        request_id = request.request_id
        if not request.kv_transfer_params or request_id in self._seen:
            return
        self._seen.add(request_id)
        transfer = Transfer(**request.kv_transfer_params)
        if not transfer.loads:
            self._open[request_id] = transfer
        elif num_loaded:
            last = min(transfer.num_tokens, int(request.num_prompt_tokens))
            transfer.vllm_blocks, transfer.moved = vllm_blocks, last - num_loaded
            self._plan.loads.append(self._copy(request_id, transfer, last, final=True))
        else:
            self._plan.dropped.append(transfer.slot)

    def plan(self, schedule: Any) -> TransferPlan:
        """The copies of one step; called once a step."""
        for new in schedule.scheduled_new_reqs:
            if new.req_id in self._open:
                self._open[new.req_id].vllm_blocks = list(new.block_ids[0])
                self._save(new.req_id, new.num_computed_tokens + schedule.num_scheduled_tokens[new.req_id])
        self._plan_running(schedule.scheduled_cached_reqs, schedule.num_scheduled_tokens)
        plan, self._plan = self._plan, TransferPlan()
        return plan

    def _plan_running(self, cached: Any, num_scheduled: dict[str, int]) -> None:
        for index, request_id in enumerate(cached.req_ids):
            transfer = self._open.get(request_id)
            if transfer is None:
                continue
            added = list((cached.new_block_ids[index] or ([],))[0])
            resumed = request_id in cached.resumed_req_ids
            transfer.vllm_blocks = added if resumed else transfer.vllm_blocks + added
            self._save(request_id, cached.num_computed_tokens[index] + num_scheduled[request_id])

    def _save(self, request_id: str, num_computed: int) -> None:
        """Order the copy of what is newly whole."""
        transfer = self._open[request_id]
        final = num_computed >= transfer.num_tokens
        last = transfer.num_tokens if final else num_computed - num_computed % self._block_tokens
        if last > transfer.moved:
            self._plan.saves.append(self._copy(request_id, transfer, last, final))
            transfer.moved = last
        if final:
            del self._open[request_id]

    def _copy(self, request_id: str, transfer: Transfer, last: int, final: bool) -> Copy:
        return Copy(
            request_id=request_id,
            slot=transfer.slot,
            first=transfer.moved,
            last=last,
            final=final,
            vllm_blocks=tuple(transfer.vllm_blocks),
            blocks=tuple(transfer.blocks),
            generations=tuple(transfer.generations),
            digests=tuple(transfer.digests),
        )

    def finished(self, request: Any) -> None:
        """vLLM ended the request, for whatever reason. A transfer without a final copy ends now; one that has it
        (every load) ends by itself."""
        transfer = self._open.pop(request.request_id, None)
        if transfer is not None:
            self._plan.dropped.append(transfer.slot)
        elif request.kv_transfer_params and request.request_id not in self._seen:
            self._plan.dropped.append(request.kv_transfer_params["slot"])
        self._seen.discard(request.request_id)


class WorkerSide:
    """Copies. One rank's heads of every block."""

    def __init__(self, extra: dict[str, Any], rank: int) -> None:
        self._rank = rank
        self._extra = extra
        self._staging = SharedMemoryPool.attach(extra["staging"])
        self._board = TransferBoard.attach(extra["board"], extra["num_ranks"], extra["num_slots"])
        shape = tuple(extra["block_shape"])  # [layer, K/V, kv_head of all ranks, token, head_dim]
        flat = torch.from_numpy(self._staging.blocks).view(_DTYPES[extra["dtype"]])
        self._blocks = flat.view(len(flat), *shape)
        self._pages: PagedKV | None = None
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="kv-load")
        self._loaded: SimpleQueue[tuple[str, set[int]]] = SimpleQueue()
        self._bad_blocks: set[int] = set()

    def register(self, pages: PagedKV) -> None:
        self._pages = pages

    @property
    def _heads(self) -> slice:
        assert self._pages is not None
        return slice(self._rank * self._pages.num_heads, (self._rank + 1) * self._pages.num_heads)

    def start_loads(self, plan: TransferPlan) -> None:
        for slot in plan.dropped:
            self._board.end(self._rank, slot, Ending.DROPPED)
        for copy in plan.loads:
            self._loader.submit(self._load_guarded, copy)

    def save(self, plan: TransferPlan) -> None:
        """After the step's forward: the KV of its tokens is there, and vLLM has not reused the blocks yet."""
        assert self._pages is not None
        for copy in plan.saves:
            blocks = self._pages.read(list(copy.vllm_blocks), copy.first, copy.last)
            start = copy.first // self._pages.block_tokens
            targets = list(copy.blocks[start : start + len(blocks)])
            self._blocks[targets, :, :, self._heads] = blocks
            self._board.advance(self._rank, copy.slot, copy.last)
            if copy.final:
                self._board.end(self._rank, copy.slot, Ending.DONE)

    def _load_guarded(self, copy: Copy) -> None:
        """In the loader's thread. Whatever goes wrong, the request comes back to vLLM and the slot ends."""
        assert self._pages is not None
        ending, bad = Ending.CORRUPT, set(copy.vllm_blocks[copy.first // self._pages.vllm_block :])
        try:
            ending, bad = self._load(copy)
        except Exception:
            logger.exception("loading KV of request %s failed", copy.request_id)
        self._board.end(self._rank, copy.slot, ending)
        self._loaded.put((copy.request_id, bad))

    def _load(self, copy: Copy) -> tuple[Ending, set[int]]:
        """How it ended, and vLLM's blocks from the first bad one on: those are computed anew, or the request fails."""
        assert self._pages is not None
        vllm_block = self._pages.vllm_block
        step = max(LOAD_TOKENS // vllm_block, 1) * vllm_block
        for first in range(copy.first, copy.last, step):
            last = min(first + step, copy.last)
            loaded, ending = self._load_part(copy, first, last)
            if loaded < last:
                return ending, set(copy.vllm_blocks[loaded // vllm_block :])
            self._board.advance(self._rank, copy.slot, last)
        return Ending.DONE, set()

    def _load_part(self, copy: Copy, first: int, last: int) -> tuple[int, Ending]:
        """Load tokens [first, last): up to which it went, and what stopped it. The checks are made on a private copy,
        so that what was checked is what is decoded."""
        assert self._pages is not None
        pages = self._pages
        span = slice(first // pages.block_tokens, -(-last // pages.block_tokens))
        numbers, expected = list(copy.blocks[span]), np.array(copy.generations[span], dtype=np.uint64)
        stale = self._staging.generations[numbers] != expected
        private = self._staging.blocks[numbers]
        stale |= self._staging.generations[numbers] != expected
        bad = stale | _differs(private, copy.digests[span])
        if bad.any():  # keep whole blocks of vLLM only
            last = first + int(bad.argmax()) * pages.block_tokens
            last -= last % pages.vllm_block
        if last > first:
            count = -(-(last - first) // pages.block_tokens)
            blocks = torch.from_numpy(private).view(self._blocks.dtype).view(-1, *self._blocks.shape[1:])
            pages.write(list(copy.vllm_blocks), first, last, blocks[:count, :, :, self._heads])
        return last, Ending.STALE if stale.any() else Ending.CORRUPT

    def take_loaded(self) -> set[str]:
        """Requests whose load ended since the last call; their bad blocks go to `take_bad_blocks`."""
        ended: set[str] = set()
        while True:
            try:
                request_id, bad = self._loaded.get_nowait()
            except Empty:
                return ended
            ended.add(request_id)
            self._bad_blocks |= bad

    def take_bad_blocks(self) -> set[int]:
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def close(self) -> None:
        self._loader.shutdown(wait=True)
        self._board.close()
        self._staging.close()


def _differs(
    blocks: np.ndarray[Any, np.dtype[np.uint8]], digests: Iterable[str]
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which blocks do not have their digest; without digests none."""
    wrong = np.zeros(len(blocks), dtype=bool)
    for index, digest in enumerate(digests):
        wrong[index] = xxhash.xxh3_128_hexdigest(blocks[index]) != digest
    return wrong


class PdserveConnector(KVConnectorBase_V1):  # type: ignore[misc]  # vllm has no types
    """What vLLM calls: each method goes to the side that it belongs to. Signatures are those of vLLM 0.32."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        self._block_tokens: int = extra["block_shape"][3]
        if role == KVConnectorRole.SCHEDULER:
            end_with_parent(extra["owner_pid"])
            self._scheduler = SchedulerSide(self._block_tokens)
        else:
            from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

            self._worker = WorkerSide(extra, get_tensor_model_parallel_rank())

    @property
    def requires_kv_delivery(self) -> bool:
        """False: blocks are copied out within the step, so a preemption loses nothing that was to be handed over."""
        return False

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        count = self._scheduler.num_loadable(request, num_computed_tokens)
        return count, count > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self._scheduler.allocated(request, list(blocks.get_block_ids()[0]), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> TransferPlan:
        return self._scheduler.plan(scheduler_output)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, None]:
        self._scheduler.finished(request)
        return False, None

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        attention = self._vllm_config.compilation_config.static_forward_context
        vllm_block = self._kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        self._worker.register(paged_kv(kv_caches, attention, self._block_tokens, vllm_block))

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self._worker.start_loads(self._get_connector_metadata())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: loads are asynchronous, vLLM schedules a request after its load."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: a block leaves whole, all layers at once."""

    def wait_for_save(self) -> None:
        self._worker.save(self._get_connector_metadata())

    def get_finished(self, finished_req_ids: set[str]) -> tuple[None, set[str]]:
        return None, self._worker.take_loaded()

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.take_bad_blocks()

    def shutdown(self) -> None:
        if self.role == KVConnectorRole.WORKER:
            self._worker.close()
