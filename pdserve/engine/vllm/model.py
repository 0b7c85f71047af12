"""From settings to vLLM's config: what the model's KV looks like, and how our parts are plugged in."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from vllm.config import KVEventsConfig, KVTransferConfig, VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform

from pdserve.engine.vllm.convert import model_folder
from pdserve.engine.vllm.layouts import KVShape, fits_window, kv_shape
from pdserve.engine.vllm.news import CacheEvents
from pdserve.engine.vllm.settings import VllmSettings
from pdserve.errors import ConfigError
from pdserve.models import ResolvedModel, resolve
from pdserve.types import KVLayout, ModelInfo

_DTYPES = {"torch.float32": ("fp32", 4), "torch.bfloat16": ("bf16", 2), "torch.float16": ("fp16", 2)}
CPU_KV_BYTES = 2 << 30
"""vLLM's KV cache on CPU, a rank, unless told: its own default is 92 % of the host, so that a second worker fails."""
_VLLM_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """A model about to be served: vLLM's arguments and the layout of its hand-over blocks."""

    args: AsyncEngineArgs
    layout: KVLayout
    shape: KVShape
    model: ModelInfo
    """Without EOS tokens: those come from the tokenizer that vLLM loads."""
    tp_size: int

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        """[layer, K/V, kv_head of all ranks, token, head_dim]."""
        layout, shape = self.layout, self.shape
        return (layout.num_layers, shape.num_sides, shape.num_heads, layout.block_tokens, shape.head_dim)


def plan_model(settings: VllmSettings) -> ModelPlan:
    """Read the model's config, no weights. Raises `ConfigError` naming the key of what vLLM won't take."""
    resolved = resolve(settings.model)
    args = _engine_args(settings, resolved)
    model = _model_config(args, settings)
    if fits_window(model):
        args.disable_sliding_window = True
        model = _model_config(args, settings)
    shape = kv_shape(model)
    name = str(model.dtype)
    if name not in _DTYPES:
        raise ConfigError(f"KV of {name} cannot be handed over; use bf16 or fp32", key="dtype")
    dtype, item_bytes = _DTYPES[name]
    heads, tp_size = shape.num_heads, args.tensor_parallel_size
    if heads % tp_size and tp_size % heads:
        raise ConfigError(f"{heads} KV heads do not divide among {tp_size} ranks", key="vllm.tensor_parallel_size")
    layers, tokens = model.get_total_num_hidden_layers(), settings.block_tokens
    layout = KVLayout(
        model_revision=resolved.revision,
        dtype=dtype,
        block_tokens=tokens,
        num_layers=layers,
        num_kv_heads=heads,
        head_dim=shape.head_dim,
        block_bytes=layers * shape.num_sides * heads * tokens * shape.head_dim * item_bytes,
        order=shape.order,
    )
    info = ModelInfo(
        name=settings.name or resolved.name,
        revision=resolved.revision,
        tokenizer_id=resolved.tokenizer_id,
        max_model_len=model.max_model_len,
        vocab_size=model.get_vocab_size(),
        eos_token_ids=(),
    )
    return ModelPlan(args, layout, shape, info, tp_size)


def _model_config(args: AsyncEngineArgs, settings: VllmSettings) -> Any:
    try:
        return args.create_model_config()
    except (ValueError, OSError) as error:
        raise ConfigError(f"vLLM cannot take model {settings.model!r}: {error}", key="model") from error


def finish_config(
    plan: ModelPlan, settings: VllmSettings, connector: dict[str, Any], events: CacheEvents | None
) -> VllmConfig:
    """vLLM's config with our connector (told `connector`), beside another one if the user has one, and with its events
    for us. Raises `ConfigError` for what vLLM won't take together."""
    plan.args.kv_transfer_config = _transfer_config(settings, connector)
    if events is not None:
        plan.args.kv_events_config = KVEventsConfig(**events.vllm_config)
    try:
        return plan.args.create_engine_config()
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(f"vLLM cannot take this configuration: {error}", key="vllm") from error


def _transfer_config(settings: VllmSettings, connector: dict[str, Any]) -> KVTransferConfig:
    """Ours alone, or first in a `MultiConnector`: vLLM loads from the first that has tokens, and saves to all."""
    ours = {
        "kv_connector": "PdserveConnector",
        "kv_connector_module_path": "kvstore.vllm_connector.connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": connector,
    }
    policy, users = settings.load_failure, settings.engine_args.get("kv_transfer_config")
    if users is None:
        return KVTransferConfig(**ours, kv_load_failure_policy=policy)
    several = users["kv_connector"] == "MultiConnector"
    others = users["kv_connector_extra_config"]["connectors"] if several else [users]
    return KVTransferConfig(
        kv_connector="MultiConnector",
        kv_role="kv_both",
        kv_load_failure_policy=policy,
        kv_connector_extra_config={"connectors": [ours, *others]},
    )


def _engine_args(settings: VllmSettings, resolved: ResolvedModel) -> AsyncEngineArgs:
    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    for key in settings.engine_args:
        if key not in known:
            raise ConfigError(f"vLLM has no engine argument {key}", key=f"vllm.{key}")
    ours = {
        "model": str(model_folder(resolved)),
        "logits_processors": ["pdserve.engine.vllm.forced:ForcedOutputs"],
    }
    return AsyncEngineArgs(**{**_defaults(settings), **settings.engine_args, **ours})


def _defaults(settings: VllmSettings) -> dict[str, Any]:
    defaults: dict[str, Any] = {"dtype": _VLLM_DTYPES[settings.dtype]} if settings.dtype else {}
    if current_platform.is_cpu() and "gpu_memory_utilization" not in settings.engine_args:
        defaults["kv_cache_memory_bytes"] = CPU_KV_BYTES
    return defaults
