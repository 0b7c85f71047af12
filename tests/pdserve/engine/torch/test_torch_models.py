"""Every supported shape computes what transformers computes: whole, in chunks, token by token, many at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch_engine_tools import SHAPES, SIZES, Driver, make_reference, prompt, resolved

from pdserve.engine.torch.engine import build_runner
from pdserve.engine.torch.shape import shape_from_hf
from pdserve.errors import ConfigError, NotSupported

Load = Callable[..., Any]


def reference_logits(name: str, token_ids: list[int]) -> torch.Tensor:
    return make_reference(name)(torch.tensor([token_ids])).logits[0]


@pytest.mark.parametrize("name", SHAPES)
def test_logits_equal_those_of_transformers(name: str, load: Load) -> None:
    driver = Driver(load(name))
    token_ids = prompt(75)
    found = driver.all_logits([driver.item(driver.start(token_ids))])
    torch.testing.assert_close(found, reference_logits(name, token_ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("chunk", [1, 7, 16, 33])
def test_chunks_of_any_size_give_the_same_logits(name: str, chunk: int, load: Load) -> None:
    driver = Driver(load(name))
    token_ids = prompt(70)
    seq = driver.start(token_ids)
    found = torch.cat([driver.all_logits([driver.item(seq, chunk)]) for _ in range(0, 70, chunk)])
    torch.testing.assert_close(found, reference_logits(name, token_ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tiled", [False, True], ids=["fast", "deterministic"])
def test_a_mixed_batch_gives_each_row_its_own_logits(tiled: bool, load: Load) -> None:
    driver = Driver(load("llama"))
    prompts = [prompt(length, seed=length) for length in (90, 61, 40, 17, 1, 33)]
    seqs = [driver.start(token_ids) for token_ids in prompts]
    for seq in seqs[:4]:
        driver.all_logits([driver.item(seq, len(seq.token_ids) - 1)], tiled=tiled)
    driver.all_logits([driver.item(seqs[5], 16)], tiled=tiled)
    found = driver.all_logits([driver.item(seq) for seq in seqs], tiled=tiled)
    wanted = [reference_logits("llama", token_ids)[-1:] for token_ids in prompts[:5]]
    wanted.append(reference_logits("llama", prompts[5])[16:])
    torch.testing.assert_close(found, torch.cat(wanted), atol=1e-4, rtol=1e-4)


def test_greedy_tokens_equal_those_of_transformers(load: Load) -> None:
    driver = Driver(load("qwen3"))
    token_ids = prompt(37, seed=2)
    reference = make_reference("qwen3")
    reference.generation_config.eos_token_id = None
    wanted = reference.generate(torch.tensor([token_ids]), do_sample=False, max_new_tokens=24)[0, 37:].tolist()
    assert driver.generate(driver.start(token_ids), 24, chunk=10) == wanted


def test_a_stale_block_with_nan_in_it_does_no_harm(load: Load) -> None:
    runner = load("llama")
    clean = Driver(runner)
    wanted = clean.generate(clean.start(prompt(20)), 15)
    runner.kv.pool.fill_(float("nan"))
    driver = Driver(runner)
    assert driver.generate(driver.start(prompt(20)), 15) == wanted


def test_copied_blocks_carry_the_context_along(load: Load) -> None:
    runner = load("llama")
    driver = Driver(runner, num_blocks=48)
    seq = driver.start(prompt(30))
    driver.finish_prompt(seq)
    copies = [60 + i for i in range(len(seq.block_table))]
    runner.copy_blocks(seq.block_table, copies)
    twin = driver.start(prompt(30))
    twin.token_ids, twin.num_computed_tokens, twin.block_table = list(seq.token_ids), 30, copies
    runner.kv.pool[seq.block_table] = 0
    wanted = reference_logits("llama", seq.token_ids)[-1:]
    torch.testing.assert_close(driver.all_logits([driver.item(twin)]), wanted, atol=1e-4, rtol=1e-4)


def test_staged_blocks_come_back_unchanged(load: Load) -> None:
    runner = load("llama")
    driver = Driver(runner)
    seq = driver.start(prompt(50))
    driver.finish_prompt(seq)
    before = runner.kv.pool[seq.block_table].clone()
    staging = torch.zeros(8, runner.layout.block_bytes, dtype=torch.uint8).numpy()
    slots = [5, 1, 7, 2]
    runner.stage_out(seq.block_table, staging, slots)
    runner.kv.pool[seq.block_table] = 0
    runner.stage_in(staging, slots, seq.block_table)
    assert torch.equal(runner.kv.pool[seq.block_table], before)


def test_layout_states_the_size_of_a_block(load: Load) -> None:
    layout = load("qwen3", dtype="bf16", block_tokens=8).layout
    assert layout.block_bytes == 3 * 2 * 2 * 8 * 16 * 2
    assert (layout.num_layers, layout.num_kv_heads, layout.head_dim, layout.block_tokens) == (3, 2, 16, 8)
    assert (layout.dtype, layout.model_revision) == ("bf16", "revision")


# --- what is refused ---


def hf_config(**changes: Any) -> dict[str, Any]:
    base = {"architectures": ["MistralForCausalLM"], "rms_norm_eps": 1e-6, "hidden_act": "silu", **SIZES}
    return {**base, **changes}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sliding_window": 128}, "sliding_window 128"),
        ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
        ({"num_key_value_heads": 3}, "3 KV heads"),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "sliding_window": 64,
                "use_sliding_window": True,
                "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            },
            "sliding_window 64",
        ),
    ],
)
def test_what_we_would_compute_wrongly_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(NotSupported, match=named):
        shape_from_hf(hf_config(**changes), max_model_len=512)


def test_a_window_that_no_context_outgrows_is_accepted() -> None:
    assert shape_from_hf(hf_config(sliding_window=128), max_model_len=128).family == "mistral"
    qwen = hf_config(architectures=["Qwen2ForCausalLM"], sliding_window=64, use_sliding_window=False)
    assert shape_from_hf(qwen, max_model_len=512).family == "qwen2"


def test_old_style_rope_scaling_is_read() -> None:
    scaling = {"type": "linear", "factor": 4.0}
    shape = shape_from_hf(hf_config(rope_theta=5e5, rope_scaling=scaling, partial_rotary_factor=0.5), 512)
    assert (shape.rope.theta, shape.rope.rope_type, shape.rope.rotary_dim) == (5e5, "linear", 8)
    assert dict(shape.rope.scaling)["factor"] == 4.0


def test_a_missing_tensor_is_a_config_error(tmp_path: Path) -> None:
    model = make_reference("llama")
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.2.mlp.up" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ConfigError, match=r"layers\.2\.mlp\.up_proj\.weight"):
        build_runner(resolved(tmp_path), dtype="fp32")


def test_a_damaged_file_is_a_config_error(tmp_path: Path) -> None:
    make_reference("llama").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="not a whole safetensors file"):
        build_runner(resolved(tmp_path), dtype="fp32")


def test_config_that_is_no_json_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{nope")
    with pytest.raises(ConfigError, match="not valid JSON"):
        build_runner(resolved(tmp_path), dtype="fp32")
