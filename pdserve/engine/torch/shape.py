"""A decoder's shape as its config states it: from HF's config.json or a GGUF's metadata, before any weight is read.

Llama, Qwen2, Qwen3 and Mistral differ only in what this value says (and in which biases their weights hold), so one
model runs all four. What we would compute wrongly is refused here, by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pdserve.errors import NotSupported
from pdserve.gguf_metadata import GGUFFile

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "MistralForCausalLM": "mistral",
}
GGUF_FAMILIES = ("llama", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class RopeShape:
    """Rotary embedding. `scaling` holds the parameters of `rope_type` under HF's names."""

    theta: float
    rotary_dim: int
    rope_type: str = "default"
    scaling: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise NotSupported(
                f"rope_type {self.rope_type!r} is not supported; supported are {', '.join(ROPE_TYPES)}", param="model"
            )


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes in elements. `qk_norm`: RMS norm over each head of q and k (Qwen3)."""

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    max_model_len: int
    rope: RopeShape
    tied: bool
    qk_norm: bool

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise NotSupported(f"{self.num_heads} heads are no multiple of {self.num_kv_heads} KV heads", param="model")

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads


def shape_from_hf(config: Mapping[str, Any], max_model_len: int) -> ModelShape:
    """From a parsed config.json. Raises `NotSupported` naming what it asks for that we don't compute."""
    family = _family(config)
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    _refuse_sliding_window(family, config, max_model_len)
    return ModelShape(
        family=family,
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        intermediate_size=config["intermediate_size"],
        rms_norm_eps=config["rms_norm_eps"],
        max_model_len=max_model_len,
        rope=_rope_from_hf(config, head_dim),
        tied=bool(config.get("tie_word_embeddings", False)),
        qk_norm=family == "qwen3",
    )


def shape_from_gguf(gguf: GGUFFile, max_model_len: int) -> ModelShape:
    """From GGUF metadata. Raises `NotSupported` for an architecture or RoPE scaling that we don't compute."""
    family = gguf.text("general.architecture")
    if family not in GGUF_FAMILIES:
        raise NotSupported(f"GGUF architecture {family!r}; supported are {', '.join(GGUF_FAMILIES)}", param="model")
    tensors = {tensor.name: tensor for tensor in gguf.tensors}
    heads = _gguf_number(gguf, "attention.head_count")
    hidden = _gguf_number(gguf, "embedding_length")
    head_dim = _gguf_number(gguf, "attention.key_length", hidden // heads)
    return ModelShape(
        family=family,
        vocab_size=tensors["token_embd.weight"].shape[0],
        hidden_size=hidden,
        num_layers=_gguf_number(gguf, "block_count"),
        num_heads=heads,
        num_kv_heads=_gguf_number(gguf, "attention.head_count_kv", heads),
        head_dim=head_dim,
        intermediate_size=_gguf_number(gguf, "feed_forward_length"),
        rms_norm_eps=_gguf_float(gguf, "attention.layer_norm_rms_epsilon", 1e-5),
        max_model_len=max_model_len,
        rope=_rope_from_gguf(gguf, head_dim),
        tied="output.weight" not in tensors,
        qk_norm=family == "qwen3",
    )


def _family(config: Mapping[str, Any]) -> str:
    architectures = config.get("architectures") or []
    known = next((FAMILIES[name] for name in architectures if name in FAMILIES), None)
    if known is None:
        raise NotSupported(
            f"architectures {architectures} are not supported; supported are {', '.join(FAMILIES)}", param="model"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise NotSupported(f"hidden_act {config['hidden_act']!r} is not supported; only silu is", param="model")
    return known


def _refuse_sliding_window(family: str, config: Mapping[str, Any], max_model_len: int) -> None:
    """A window that no context can outgrow does nothing, so it is let pass."""
    window = config.get("sliding_window")
    if family == "llama" or window is None or window >= max_model_len:
        return
    layer_types = config.get("layer_types")
    used = "sliding_attention" in layer_types if layer_types else family == "mistral"
    if family.startswith("qwen"):
        used = used or bool(config.get("use_sliding_window", False))
    if used:
        raise NotSupported(
            f"sliding_window {window} is not supported; set max_model_len to {window} or less, where it does nothing",
            param="sliding_window",
        )


def _rope_from_hf(config: Mapping[str, Any], head_dim: int) -> RopeShape:
    """Transformers 5 writes `rope_parameters`; before, `rope_theta` and `rope_scaling` were apart."""
    stated = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    partial = stated.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor") or 1.0
    theta = stated.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    rope_type = stated.pop("rope_type", None) or stated.pop("type", None) or "default"
    stated.setdefault("original_max_position_embeddings", config.get("original_max_position_embeddings"))
    if stated["original_max_position_embeddings"] is None:
        stated["original_max_position_embeddings"] = config["max_position_embeddings"]
    scaling = tuple((name, float(value)) for name, value in stated.items() if isinstance(value, int | float))
    return RopeShape(float(theta), int(head_dim * partial), rope_type, scaling if rope_type != "default" else ())


def _rope_from_gguf(gguf: GGUFFile, head_dim: int) -> RopeShape:
    if any(tensor.name == "rope_freqs.weight" for tensor in gguf.tensors):
        raise NotSupported("GGUF files with rope_freqs (Llama 3.1 scaling): use the safetensors folder", param="model")
    prefix = gguf.text("general.architecture") + ".rope."
    rope_type = gguf.text(prefix + "scaling.type", "none")
    theta = _gguf_float(gguf, "rope.freq_base", 10000.0)
    rotary_dim = _gguf_number(gguf, "rope.dimension_count", head_dim)
    if rope_type == "none":
        return RopeShape(theta, rotary_dim)
    scaling = {
        "factor": _gguf_float(gguf, "rope.scaling.factor", 1.0),
        "original_max_position_embeddings": _gguf_float(gguf, "rope.scaling.original_context_length", 0.0),
    }
    return RopeShape(theta, rotary_dim, rope_type, tuple(scaling.items()))


def _gguf_number(gguf: GGUFFile, name: str, default: int | None = None) -> int:
    value = gguf.integer(f"{gguf.text('general.architecture')}.{name}")
    if value is None and default is None:
        raise NotSupported(f"the GGUF states no {name}", param="model")
    return value if value is not None else default or 0


def _gguf_float(gguf: GGUFFile, name: str, default: float) -> float:
    value = gguf.metadata.get(f"{gguf.text('general.architecture')}.{name}", default)
    return float(value) if isinstance(value, int | float) else default
