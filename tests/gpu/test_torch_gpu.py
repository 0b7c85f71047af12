"""The torch engine on a CUDA device: the same code, so what must hold there is that it gives the CPU's answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch_engine_tools import SHAPES, Driver, make_reference, prompt, resolved

from pdserve.engine.memory import LocalMemory
from pdserve.engine.torch.engine import TorchEngineConfig, build_runner, build_torch_engine
from pdserve.types import Phase, Request, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: torch.cuda.is_available() is false"),
]


@pytest.fixture(autouse=True)
def _exact_products() -> Any:
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.no_grad():
        yield


def driver_of(folder: Path, **options: Any) -> Driver:
    runner = build_runner(resolved(folder), device="cuda", **options)
    runner.allocate(200, None)
    return Driver(runner, 200)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_reference("qwen3").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", SHAPES)
def test_logits_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = make_reference(name)
    model.save_pretrained(tmp_path)
    driver = driver_of(tmp_path, dtype="fp32")
    token_ids = prompt(75)
    seq = driver.start(token_ids)
    found = torch.cat([driver.all_logits([driver.item(seq, 20)]) for _ in range(0, 75, 20)]).cpu()
    torch.testing.assert_close(found, model(torch.tensor([token_ids])).logits[0], atol=1e-3, rtol=1e-3)


def test_a_batch_of_decodes_gets_what_each_gets_alone(folder: Path) -> None:
    driver = driver_of(folder, dtype="fp32")
    prompts = [prompt(length, seed=length) for length in (90, 61, 40, 17, 1)]
    alone = [driver.generate(driver.start(token_ids), 12) for token_ids in prompts]
    seqs = [driver.start(token_ids) for token_ids in prompts]
    while any(seq.num_output_tokens < 12 for seq in seqs):
        driver.step([driver.item(seq) for seq in seqs if seq.num_output_tokens < 12])
    assert [seq.token_ids[seq.num_prompt_tokens :] for seq in seqs] == alone


def test_deterministic_rows_have_the_same_bits_however_the_prompt_is_cut(folder: Path) -> None:
    driver = driver_of(folder, dtype="bf16")
    token_ids = prompt(300)
    last = []
    for chunk in (300, 16, 37):
        seq = driver.start(token_ids)
        rows = [driver.all_logits([driver.item(seq, chunk)], tiled=True) for _ in range(0, 300, chunk)]
        last.append(rows[-1][-1])
    assert torch.equal(last[0], last[1])
    assert torch.equal(last[0], last[2])


def test_kv_handed_over_through_host_memory_gives_the_same_tokens(folder: Path) -> None:
    config = TorchEngineConfig(model=str(folder), dtype="fp32", device="cuda", num_blocks=64, chunk_tokens=32)
    (folder / "tokenizer.json").write_text("{}")
    request = Request("r", "m", tuple(prompt(80)), SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True))
    prefill, decode, single = (build_torch_engine(config, LocalMemory) for _ in range(3))
    single.submit(request, 0, Phase.FULL)
    prefill.submit(request, 0, Phase.PREFILL)
    decode.submit(request, 0, Phase.DECODE)
    wanted = [token_id for result in _steps(single) for token_id in result.output.token_ids]
    results = list(_steps(prefill))
    for chunk in (chunk for result in results for chunk in result.exports):
        place = decode.import_blocks(0, chunk.first_token, chunk.num_tokens)
        assert place is not None
        decode.memory.blocks[list(place.blocks)] = prefill.memory.blocks[list(chunk.blocks)]
        decode.import_commit(0, chunk.first_token, chunk.num_tokens)
        prefill.export_release(0, chunk.chunk_index)
    first = [token_id for result in results for token_id in result.output.token_ids]
    decode.resume(0, [first], [False])
    assert first + [token_id for result in _steps(decode) for token_id in result.output.token_ids] == wanted


def _steps(engine: Any) -> Any:
    while engine.has_work():
        yield engine.step()
