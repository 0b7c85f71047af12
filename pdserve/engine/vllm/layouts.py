"""Which KV layouts vLLM can hand over: decided from a model's config before anything starts, and once more from the
caches that vLLM then makes. What is not supported is refused by name, never guessed at.

| layout | | why |
|---|---|---|
| full attention | supported | |
| sliding window in some layers | supported | without a hybrid KV cache manager vLLM keeps all tokens of every layer |
| sliding window in all layers | where the context fits the window | vLLM frees what falls out of the window |
| MLA | supported | one latent a token, the same on every rank |
| sparse MLA, chunked local attention | refused | a second cache beside the KV; never tried |
| hybrid, state space (mamba) | refused | a state is no function of a token's block |
| encoder-decoder | refused | cross attention is no prefix |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

from pdserve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class KVShape:
    """What a token's KV is in one layer, over all ranks."""

    layout: str
    """The name, as the table above has it."""
    num_sides: int
    """K and V: 2. A latent: 1."""
    num_heads: int
    head_dim: int
    order: str = "layer,kv,head,token,dim"
    """As in `KVLayout.order`."""

    @property
    def shared_by_ranks(self) -> bool:
        """Every rank has all of it, not only its heads."""
        return self.num_sides == 1


def kv_shape(model: Any) -> KVShape:
    """From vLLM's `ModelConfig`. Raises `ConfigError` (key "model") naming a layout that is not supported."""
    _refuse_states(model)
    if model.use_mla:
        return KVShape("MLA", 1, 1, model.get_head_size(), order="layer,latent,token,dim")
    _refuse_lost_windows(model)
    name = "full attention" if model.get_sliding_window() is None else "sliding window in some layers"
    return KVShape(name, 2, model.get_total_num_kv_heads(), model.get_head_size())


def fits_window(model: Any) -> bool:
    """Whether a model with a sliding window in all layers never gets to its end: it is then full attention."""
    window = model.get_sliding_window()
    return window is not None and _slides_everywhere(model) and model.max_model_len <= window


def _refuse_states(model: Any) -> None:
    config = model.hf_text_config
    if model.is_encoder_decoder:
        _refuse("encoder-decoder", "cross attention is no prefix that could be handed over")
    if model.is_attention_free or model.is_hybrid:
        kind = "state space (mamba)" if model.is_attention_free else "hybrid"
        _refuse(kind, "layers with a state have no KV a token; serve it without pdserve")
    if getattr(config, "index_topk", None):
        _refuse("sparse MLA", "its index cache is not handed over")
    if model.attention_chunk_size:
        _refuse("chunked local attention", "it was never tried")


def _refuse_lost_windows(model: Any) -> None:
    window = model.get_sliding_window()
    if window is not None and _slides_everywhere(model):
        hint = f"give max_model_len of at most {window}, or vllm.disable_sliding_window with the same effect"
        _refuse("sliding window in all layers", f"vLLM frees what falls out of the window of {window} tokens: {hint}")


def _slides_everywhere(model: Any) -> bool:
    """vLLM's own rule (`EngineArgs.create_engine_config`)."""
    kinds = getattr(model.hf_text_config, "layer_types", None)
    return kinds is None or all(kind == "sliding_attention" for kind in kinds)


def check_groups(groups: Any, block_shape: tuple[int, ...]) -> None:
    """The cache groups that vLLM made: one, of full attention (or MLA) in all layers. Raises `ConfigError`."""
    kinds = {_kind(spec) for group in groups for spec in _layer_specs(group)}
    num_layers = sum(len(group.layer_names) for group in groups)
    latent = block_shape[1] == 1
    expected = {"MLAAttentionSpec"} if latent else {"FullAttentionSpec"}
    if len(groups) != 1 or kinds != expected:
        _refuse(" and ".join(sorted(kinds)) or "no cache", f"vLLM made {len(groups)} cache groups")
    if num_layers != block_shape[0]:
        _refuse("layers that share KV", f"{num_layers} of {block_shape[0]} layers have a cache")


def _layer_specs(group: Any) -> list[Any]:
    spec = group.kv_cache_spec
    each = getattr(spec, "kv_cache_specs", None)
    return [spec] if each is None else list(each.values())


def _kind(spec: Any) -> str:
    return type(spec).__name__


def _refuse(layout: str, why: str) -> NoReturn:
    raise ConfigError(f"KV layout {layout!r} is not supported: {why}", key="model")
