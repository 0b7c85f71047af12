"""Bytes of one KV block, from a worker's config alone: a node's store must know them before any worker has loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping

from pdserve.config import WorkerConfig, load
from pdserve.errors import NotSupported
from pdserve.gguf_metadata import read_gguf
from pdserve.models import model_info, resolve

_ITEM_BYTES = {"bf16": 2, "fp32": 4}


def block_bytes(worker: Mapping[str, object]) -> int:
    """`block_bytes` of the layout that a worker with these (dotted) config keys will have.

    Raises `ConfigError` (a key, or no such model), `NotSupported` for an engine whose layout only it knows.
    """
    config = load(WorkerConfig, None, worker)
    if config.engine == "sim":
        from pdserve.engine.sim import DEFAULT_MODEL
        from pdserve.engine.sim_runner import sim_layout

        return sim_layout(DEFAULT_MODEL, config.block_tokens).block_bytes
    if config.engine == "torch":
        return _torch_block_bytes(config)
    raise NotSupported(f"the block size of engine {config.engine} is its own: give block_bytes", param="block_bytes")


def _torch_block_bytes(config: WorkerConfig) -> int:
    """As `KVShape.block_bytes`, without loading torch."""
    from pdserve.engine.torch.shape import shape_from_gguf, shape_from_hf

    resolved = resolve(config.model)
    max_model_len = model_info(resolved, config.max_model_len or None).max_model_len
    if resolved.kind == "gguf":
        shape = shape_from_gguf(read_gguf(resolved.path), max_model_len)
    else:
        shape = shape_from_hf(json.loads((resolved.path / "config.json").read_text("utf-8")), max_model_len)
    values = shape.num_layers * 2 * shape.num_kv_heads * config.block_tokens * shape.head_dim
    return values * _ITEM_BYTES[config.dtype]
