"""What the vLLM engine is told: a frozen value, checked before anything is started.

Engine arguments go to vLLM verbatim. The few that pdserve owns, or that the hand-over cannot honour, are refused by
name with what to do instead: nothing that a user writes is silently overwritten.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pdserve.config import WorkerConfig
from pdserve.errors import ConfigError

LoadFailurePolicy = Literal["recompute", "fail"]

OWNED_ARGUMENTS: Mapping[str, str] = {
    "model": "set `model` of the worker",
    "served_model_name": "set `model_name` of the worker",
    "logits_processors": "the one that forces the outputs sampled at prefill is loaded there",
    "disable_log_stats": "the worker's load report is made from vLLM's statistics",
    "skip_tokenizer_init": "grammars and EOS come from the tokenizer",
    "logprobs_mode": "logprobs are of the raw distribution everywhere in pdserve",
    "speculative_config": "vLLM refuses logits processors with speculative decoding",
    "spec_method": "vLLM refuses logits processors with speculative decoding",
    "spec_model": "vLLM refuses logits processors with speculative decoding",
    "spec_tokens": "vLLM refuses logits processors with speculative decoding",
    "pipeline_parallel_size": "the hand-over knows no pipeline stages yet",
    "data_parallel_size": "start one worker a replica: pdserve balances between workers",
    "kv_cache_dtype": "blocks are handed over in the model's dtype",
    "decode_context_parallel_size": "a block's tokens would lie on several ranks",
    "prefill_context_parallel_size": "a block's tokens would lie on several ranks",
}
"""Engine argument -> why it is not the user's here."""


@dataclass(frozen=True, slots=True)
class VllmSettings:
    """Raises `ConfigError` naming the key when an engine argument is owned, or a size makes no sense."""

    model: str
    """As `pdserve.models.resolve` takes it: embedded, a folder, a .gguf file or a hub id."""
    name: str = ""
    """What clients call it; empty: the model's own."""
    dtype: str = ""
    """bf16 | fp32; empty: what `engine_args` or the model says."""
    block_tokens: int = 16
    """Tokens of a hand-over block; vLLM's own block must be a multiple."""
    staging_blocks: int = 0
    """Blocks of the staging area; 0: what `staging_bytes` holds."""
    staging_bytes: int = 512 << 20
    """Shared memory between vLLM and the transports: every prompt on its way is in it, whole."""
    load_failure: LoadFailurePolicy = "fail"
    """What vLLM does with a request whose KV cannot be loaded. vLLM's default; `recompute` prefills it again here."""
    verify_loads: bool = True
    """Take a digest of each imported block when it is committed and check it when vLLM reads it: staging is written
    one-sidedly by peers, and what a late write left must not be decoded. 0.06 ms a MB."""
    saves: bool = False
    """Copy to staging, for a store, what is decoded where it was prefilled and what is generated. What is handed
    over goes there anyway."""
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    """vLLM's `AsyncEngineArgs`, verbatim; a `kv_transfer_config` names connectors that run beside pdserve's."""

    @property
    def caches(self) -> bool:
        """Whether staging is a prefix cache: as vLLM's own."""
        return self.engine_args.get("enable_prefix_caching") is not False

    def __post_init__(self) -> None:
        for key in self.engine_args:
            if key in OWNED_ARGUMENTS:
                raise ConfigError(f"vllm.{key} is pdserve's: {OWNED_ARGUMENTS[key]}", key=f"vllm.{key}")
        if self.block_tokens < 1:
            raise ConfigError("block_tokens must be at least 1", key="block_tokens")
        if self.load_failure not in ("recompute", "fail"):
            raise ConfigError("kv_load_failure must be recompute or fail", key="kv_load_failure")
        beside = self.engine_args.get("kv_transfer_config")
        if beside is not None and not (isinstance(beside, Mapping) and "kv_connector" in beside):
            raise ConfigError("give a mapping with kv_connector", key="vllm.kv_transfer_config")
        block = self.engine_args.get("block_size")
        if block is not None and block % self.block_tokens:
            raise ConfigError(
                f"vllm.block_size {block} must be a multiple of block_tokens {self.block_tokens}", key="vllm.block_size"
            )


def settings_from_config(config: WorkerConfig) -> VllmSettings:
    """A worker's config as settings. Sizes of the batch that `vllm` doesn't name are the worker's.

    `chunk_tokens` is not passed on: vLLM splits prompts by its token budget alone.
    """
    sizes: dict[str, Any] = {
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "enable_prefix_caching": config.prefix_cache,
    }
    if config.max_model_len:
        sizes["max_model_len"] = config.max_model_len
    return VllmSettings(
        model=config.model,
        name=config.model_name,
        dtype="" if "dtype" in config.vllm else config.dtype,
        block_tokens=config.block_tokens,
        staging_blocks=config.num_blocks,
        staging_bytes=config.kv_memory_bytes,
        load_failure="recompute" if config.kv_load_failure == "recompute" else "fail",
        saves=bool(config.store),
        engine_args={**sizes, **config.vllm},
    )
