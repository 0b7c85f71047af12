"""What the vLLM engine takes and refuses: arguments, layouts, groups of layers. No vLLM is needed."""

from __future__ import annotations

import importlib.util
import os
from types import SimpleNamespace

import pytest

from pdserve.config import WorkerConfig, load
from pdserve.engine.base import KVCache
from pdserve.engine.memory import LocalMemory
from pdserve.engine.vllm.engine import VllmEngine
from pdserve.engine.vllm.layouts import check_groups, fits_window, kv_shape
from pdserve.engine.vllm.settings import OWNED_ARGUMENTS, VllmSettings, settings_from_config
from pdserve.engine.vllm.start import start_error
from pdserve.errors import ConfigError, EngineFailed


@pytest.mark.parametrize("key", sorted(OWNED_ARGUMENTS))
def test_an_argument_that_pdserve_owns_is_refused_by_name(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        VllmSettings(model="m", engine_args={key: 1})
    assert caught.value.key == f"vllm.{key}"


@pytest.mark.parametrize("beside", ["NixlConnector", {"kv_role": "kv_both"}, 7])
def test_a_connector_beside_ours_must_be_a_mapping_that_names_one(beside: object) -> None:
    with pytest.raises(ConfigError) as caught:
        VllmSettings(model="m", engine_args={"kv_transfer_config": beside})
    assert caught.value.key == "vllm.kv_transfer_config"


def model_of(**traits: object) -> SimpleNamespace:
    """As vLLM describes a model; a plain one but for these traits."""
    config = SimpleNamespace(layer_types=traits.pop("layer_types", None), index_topk=traits.pop("index_topk", None))
    window = traits.pop("window", None)
    plain: dict[str, object] = {
        "hf_text_config": config,
        "is_encoder_decoder": False,
        "is_attention_free": False,
        "is_hybrid": False,
        "attention_chunk_size": None,
        "use_mla": False,
        "max_model_len": 4096,
        "get_sliding_window": lambda: window,
        "get_total_num_kv_heads": lambda: 2,
        "get_head_size": lambda: 64,
    }
    return SimpleNamespace(**{**plain, **traits})


@pytest.mark.parametrize(
    ("traits", "layout"),
    [
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"is_attention_free": True}, "state space (mamba)"),
        ({"is_hybrid": True}, "hybrid"),
        ({"index_topk": 2048, "use_mla": True}, "sparse MLA"),
        ({"attention_chunk_size": 8192}, "chunked local attention"),
        ({"window": 1024}, "sliding window in all layers"),
        ({"window": 1024, "layer_types": ["sliding_attention"] * 2}, "sliding window in all layers"),
    ],
)
def test_a_layout_that_is_not_supported_is_refused_by_its_name(traits: dict[str, object], layout: str) -> None:
    with pytest.raises(ConfigError) as caught:
        kv_shape(model_of(**traits))
    assert caught.value.key == "model"
    assert repr(layout) in caught.value.message


@pytest.mark.parametrize(
    ("traits", "layout", "fits"),
    [
        ({}, "full attention", False),
        ({"use_mla": True}, "MLA", False),
        (
            {"window": 1024, "layer_types": ["sliding_attention", "full_attention"]},
            "sliding window in some layers",
            False,
        ),
        ({"window": 4096}, "", True),
    ],
)
def test_a_supported_layout_has_a_name(traits: dict[str, object], layout: str, fits: bool) -> None:
    model = model_of(**traits)
    assert fits_window(model) is fits
    if layout:
        assert kv_shape(model).layout == layout


class FullAttentionSpec: ...


class SlidingWindowSpec: ...


def group_of(*kinds: type, layers: int) -> SimpleNamespace:
    names = [f"layer{number}" for number in range(layers)]
    spec = (
        kinds[0]()
        if len(kinds) == 1
        else SimpleNamespace(kv_cache_specs={name: kind() for name, kind in zip(names, kinds, strict=False)})
    )
    return SimpleNamespace(layer_names=names, kv_cache_spec=spec)


@pytest.mark.parametrize(
    ("groups", "named"),
    [
        ([group_of(SlidingWindowSpec, layers=4)], "SlidingWindowSpec"),
        ([group_of(FullAttentionSpec, layers=2), group_of(SlidingWindowSpec, layers=2)], "2 cache groups"),
        ([group_of(FullAttentionSpec, SlidingWindowSpec, layers=2)], "FullAttentionSpec and SlidingWindowSpec"),
        ([group_of(FullAttentionSpec, layers=3)], "layers that share KV"),
        ([], "no cache"),
    ],
)
def test_caches_that_vllm_made_otherwise_are_refused(groups: list[SimpleNamespace], named: str) -> None:
    check_groups([group_of(FullAttentionSpec, layers=4)], (4, 2, 2, 16, 64))
    with pytest.raises(ConfigError) as caught:
        check_groups(groups, (4, 2, 2, 16, 64))
    assert named in caught.value.message


def test_the_reason_of_vllms_side_reaches_whoever_starts_it() -> None:
    refused = start_error(RuntimeError("core failed"), "model\nKV layout 'x' is not supported")
    assert isinstance(refused, ConfigError)
    assert (refused.key, refused.message) == ("model", "KV layout 'x' is not supported")
    assert isinstance(start_error(RuntimeError("core failed"), ""), EngineFailed)


def test_a_block_size_that_is_no_multiple_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        VllmSettings(model="m", block_tokens=16, engine_args={"block_size": 40})
    assert caught.value.key == "vllm.block_size"


def test_a_workers_config_gives_sizes_and_vllms_own_arguments_win() -> None:
    overrides = {"max_num_seqs": 7, "vllm.max_num_seqs": 9, "vllm.enforce_eager": True, "max_model_len": 100}
    made = settings_from_config(
        load(WorkerConfig, None, {"engine": "vllm", "kv_load_failure": "recompute", **overrides})
    )
    assert made.engine_args["max_num_seqs"] == 9
    assert made.engine_args["enforce_eager"] is True
    assert made.engine_args["max_model_len"] == 100
    assert made.load_failure == "recompute"


def test_the_engine_is_a_cache_that_a_store_can_fill() -> None:
    assert issubclass(VllmEngine, KVCache)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_the_engine_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(ConfigError) as caught:
        VllmEngine(VllmSettings(model="embedded"), LocalMemory)
    assert caught.value.key == "engine"
    assert "pip install" in caught.value.message
