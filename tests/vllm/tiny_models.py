"""Tiny models with random weights, one a KV layout, made here: folders as vLLM loads them. Nothing is downloaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pdserve.engine.vllm.convert import model_folder
from pdserve.models import resolve

VOCAB = 49_152
"""The embedded model's, whose tokenizer they share."""
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "initializer_range": 0.3,
}
"""Wide enough an initialisation that outputs depend on the whole context, not on the last token alone."""

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "head_dim": 32},
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 32,
        "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "query_pre_attn_scalar": 32,
    },
    "mistral": {"model_type": "mistral", "head_dim": 32, "sliding_window": 256},
    "deepseek": {
        "model_type": "deepseek_v2",
        "initializer_range": 0.05,  # wider, vLLM's own prefill and decode kernels part ways
        "num_key_value_heads": 4,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 64,
        "v_head_dim": 32,
        "first_k_dense_replace": 4,
        "n_routed_experts": 2,
        "n_shared_experts": 1,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 64,
        "n_group": 1,
        "topk_group": 1,
    },
    "jamba": {
        "model_type": "jamba",
        "num_hidden_layers": 4,
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "expert_layer_period": 100,
        "expert_layer_offset": 99,
        "num_experts": 1,
        "num_experts_per_tok": 1,
        "mamba_d_state": 16,
        "use_mamba_kernels": False,
    },
    "mamba": {"model_type": "mamba", "state_size": 16},
}


def tiny_model(name: str, folder: Path) -> Path:
    """The model of this name as a folder in `folder`, made at the first call."""
    target = folder / name
    if target.exists():
        return target
    torch.manual_seed(7)
    config = AutoConfig.for_model(**{**_COMMON, **CONFIGS[name]})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(target)
    for file in model_folder(resolve()).glob("tokenizer*"):
        shutil.copy(file, target)
    _check(target, name)
    return target


def _check(target: Path, name: str) -> None:
    """transformers drops what it does not know: what makes the layout must be in the file."""
    written = json.loads((target / "config.json").read_text())
    for key in ("sliding_window", "layer_types", "kv_lora_rank"):
        if key in CONFIGS[name]:
            assert written[key] == CONFIGS[name][key], (key, written.get(key))
