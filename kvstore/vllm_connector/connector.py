"""The class that vLLM loads by our module path, twice: once beside its scheduler, once beside the model.

Each method that vLLM calls goes to the side that it belongs to. Signatures are those of vLLM 0.32. It may stand alone
or be a child of vLLM's `MultiConnector`: it touches only requests that carry its own part of `kv_transfer_params`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, KVConnectorRole

from kvstore.vllm_connector.plan import Copies
from kvstore.vllm_connector.scheduler_side import SchedulerSide
from kvstore.vllm_connector.worker_side import WorkerSide
from pdserve.engine.vllm.board import TransferBoard
from pdserve.engine.vllm.layouts import check_groups
from pdserve.engine.vllm.pages import paged_kv
from pdserve.engine.vllm.parent import end_with_parent
from pdserve.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass
class TransferPlan(KVConnectorMetadata):  # type: ignore[misc]  # vllm has no types
    """What travels from scheduler to workers each step."""

    copies: Copies = field(default_factory=Copies)


class PdserveConnector(KVConnectorBase_V1):  # type: ignore[misc]  # vllm has no types
    """Raises `ConfigError` for a KV layout that is not supported; the reason goes to the board as well, because vLLM
    tells its embedder only that it did not start."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._extra: dict[str, Any] = vllm_config.kv_transfer_config.kv_connector_extra_config
        self._block_tokens: int = self._extra["block_shape"][3]
        self._check(lambda: check_groups(kv_cache_config.kv_cache_groups, tuple(self._extra["block_shape"])))
        if role == KVConnectorRole.SCHEDULER:
            end_with_parent(self._extra["owner_pid"])
            self._scheduler = SchedulerSide(self._block_tokens)
        else:
            from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

            keeps_part = bool(vllm_config.cache_config.enable_prefix_caching)
            self._worker = WorkerSide(self._extra, get_tensor_model_parallel_rank(), keeps_part=keeps_part)

    def _check(self, check: Any) -> Any:
        """Run a check whose `ConfigError` the engine must hear of."""
        try:
            return check()
        except ConfigError as error:
            board = TransferBoard.attach(self._extra["board"], self._extra["num_ranks"], self._extra["num_slots"])
            board.refuse(f"{error.key}\n{error.message}")
            board.close()
            raise

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
        return TransferPlan(self._scheduler.plan(scheduler_output))

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, None]:
        self._scheduler.finished(request)
        return False, None

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        attention = self._vllm_config.compilation_config.static_forward_context
        vllm_block = self._kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        latent = self._extra["block_shape"][1] == 1
        pages = self._check(lambda: paged_kv(kv_caches, attention, self._block_tokens, vllm_block, latent=latent))
        self._worker.register(pages)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self._worker.start_loads(self._get_connector_metadata().copies)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: loads are asynchronous, vLLM schedules a request after its load."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: a block leaves whole, all layers at once."""

    def wait_for_save(self) -> None:
        self._worker.save(self._get_connector_metadata().copies)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[None, set[str]]:
        return None, self._worker.take_loaded()

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.take_bad_blocks()

    def shutdown(self) -> None:
        if self.role == KVConnectorRole.WORKER:
            self._worker.close()
