"""`deterministic`: the same bits whatever the batch, the chunks and the cache hits are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch_engine_tools import Driver, outputs, prompt

Load = Callable[..., Any]
NAMES = ["llama", "qwen3"]
LENGTH = 300
"""More than one context tile (256)."""


def final_logits(driver: Driver, token_ids: list[int], chunk: int | None = None, cached: Any = None) -> torch.Tensor:
    seq = driver.start(token_ids)
    if cached is not None:
        seq.block_table, seq.num_computed_tokens = list(cached.block_table), cached.num_computed_tokens
    while True:
        item = driver.item(seq, chunk)
        found = driver.all_logits([item], tiled=True)
        if item.choices:
            return found[-1]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_have_the_same_bits_however_the_prompt_is_cut(name: str, dtype: str, load: Load) -> None:
    driver = Driver(load(name, dtype=dtype, num_blocks=400), 400)
    token_ids = prompt(LENGTH)
    whole = final_logits(driver, token_ids)
    for chunk in (1, 5, 16, 17, 64, 299):
        assert torch.equal(final_logits(driver, token_ids, chunk), whole), f"chunks of {chunk} differ"


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_have_the_same_bits_after_a_prefix_hit(name: str, dtype: str, load: Load) -> None:
    driver = Driver(load(name, dtype=dtype, num_blocks=400), 400)
    token_ids = prompt(LENGTH)
    whole = final_logits(driver, token_ids, 50)
    for hit in (16, 64, 288):
        first = driver.start(token_ids)
        driver.all_logits([driver.item(first, hit)], tiled=True)
        assert torch.equal(final_logits(driver, token_ids, cached=first), whole), f"a hit of {hit} tokens differs"


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("batch", [2, 5, 16])
def test_logits_have_the_same_bits_in_any_batch(batch: int, dtype: str, load: Load) -> None:
    driver = Driver(load("llama", dtype=dtype, num_blocks=400), 400)
    token_ids = prompt(61)
    alone = final_logits(driver, token_ids)
    seqs = [driver.start(prompt(20 + 7 * i, seed=i)) for i in range(batch - 1)]
    for place in range(batch):
        seq = driver.start(token_ids)
        driver.all_logits([driver.item(seq, 60)], tiled=True)
        items = [driver.item(other, 1) for other in seqs]
        items.insert(place, driver.item(seq))
        assert torch.equal(driver.all_logits(items, tiled=True)[place], alone), f"row {place} of {batch} differs"


def run_together(driver: Driver, seqs: list[Any], num_tokens: int, chunk: int) -> None:
    while any(seq.num_output_tokens < num_tokens for seq in seqs):
        driver.step([driver.item(seq, chunk) for seq in seqs if seq.num_output_tokens < num_tokens])


@pytest.mark.parametrize("params", [{}, {"temperature": 0.9, "seed": 12, "top_p": 0.95, "presence_penalty": 0.5}])
def test_tokens_and_logprobs_do_not_depend_on_company(params: dict[str, Any], load: Load) -> None:
    driver = Driver(load("qwen3", dtype="bf16", num_blocks=400), 400)
    lengths = (70, 33, 5, 120, 64)
    alone: list[Any] = []
    for length in lengths:
        seq = driver.start(prompt(length, seed=length), deterministic=True, logprobs=5, **params)
        tokens = [driver.finish_prompt(seq)[0]]
        while seq.num_output_tokens < 12:
            tokens += driver.step([driver.item(seq)])
        alone.append([(token.token_id, token.logprobs.logprob, token.logprobs.top_logprobs) for token in tokens])
    together = [driver.start(prompt(n, seed=n), deterministic=True, logprobs=5, **params) for n in lengths]
    company = driver.start(prompt(200, seed=99))
    found: dict[int, list[Any]] = {seq.handle: [] for seq in [*together, company]}
    while any(seq.num_output_tokens < 12 for seq in together):
        items = [driver.item(seq, 19) for seq in [company, *together] if seq.num_output_tokens < 12]
        choices = [seq for item in items for seq in item.choices]
        for seq, token in zip(choices, driver.step(items), strict=True):
            if token.logprobs:
                found[seq.handle].append((token.token_id, token.logprobs.logprob, token.logprobs.top_logprobs))
    assert [found[seq.handle] for seq in together] == alone


def test_a_runner_can_be_deterministic_as_a_whole(load: Load) -> None:
    runner = load("llama", dtype="bf16", num_blocks=400, deterministic=True)
    driver = Driver(runner, 400)
    alone = driver.generate(driver.start(prompt(90)), 20)
    seqs = [driver.start(prompt(90)), *(driver.start(prompt(40 + i, seed=i)) for i in range(4))]
    run_together(driver, seqs, 20, chunk=23)
    assert outputs(seqs[0]) == alone


def test_fp32_without_the_flag_agrees_closely_anyway(load: Load) -> None:
    driver = Driver(load("llama", num_blocks=400), 400)
    alone = driver.start(prompt(90), logprobs=0)
    wanted = [driver.finish_prompt(alone)[0], *(driver.step([driver.item(alone)])[0] for _ in range(10))]
    seqs = [driver.start(prompt(90), logprobs=0), *(driver.start(prompt(40 + i, seed=i)) for i in range(4))]
    found = []
    while seqs[0].num_output_tokens < 11:
        items = [driver.item(seq, 23) for seq in seqs]
        at = next((i for i, seq in enumerate(seq for item in items for seq in item.choices) if seq is seqs[0]), None)
        sampled = driver.step(items)
        found += [] if at is None else [sampled[at]]
    assert [token.token_id for token in found] == [token.token_id for token in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one.logprobs.logprob == pytest.approx(other.logprobs.logprob, abs=1e-3)


def test_kv_of_a_worker_that_is_all_deterministic_is_told_apart(load: Load) -> None:
    layouts = [load("llama", num_blocks=16, deterministic=each).layout for each in (False, True)]
    assert layouts[0] == replace(layouts[1], deterministic=False) != layouts[1]
