"""The embedded model, SmolLM2-135M from its GGUF: our weights and tokens against transformers' own GGUF reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch_engine_tools import Driver, outputs, resolved

from pdserve.engine.torch.engine import build_runner
from pdserve.engine.torch.loader import GGUFSource
from pdserve.engine.torch.runner import TorchRunner
from pdserve.engine.torch.shape import shape_from_gguf
from pdserve.gguf_metadata import read_gguf
from pdserve.models import resolve
from pdserve.tokens import Tokenizer

pytestmark = pytest.mark.torch_model

QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "Write a Python function that adds two numbers.",
    "List three animals, and say why each of them is well adapted to the place where it lives. " * 6,
)


@pytest.fixture(scope="module")
def reference(embedded: Path) -> Any:
    """Read by transformers, without any code of ours."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        embedded.parent, gguf_file=embedded.name, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def tokenizer(embedded: Path) -> Tokenizer:
    return Tokenizer.load(embedded)


def runner_of(path: Path, **options: Any) -> TorchRunner:
    runner = build_runner(resolve(str(path)), max_model_len=2048, **options)
    runner.allocate(256, None)
    return runner


def test_every_tensor_equals_what_transformers_reads(embedded: Path, reference: Any) -> None:
    gguf = read_gguf(embedded)
    source = GGUFSource(gguf, shape_from_gguf(gguf, 2048))
    state = {name: tensor for name, tensor in reference.state_dict().items() if name != "lm_head.weight"}
    assert len(state) == len(gguf.tensors)
    for name, tensor in state.items():
        assert torch.equal(source.get(name), tensor), name


@pytest.mark.parametrize("question", QUESTIONS)
def test_greedy_tokens_equal_those_of_transformers(
    question: str, embedded: Path, reference: Any, tokenizer: Tokenizer
) -> None:
    token_ids = tokenizer.encode_chat([{"role": "user", "content": question}])
    # The mask is given because transformers would guess one that hides <|im_end|>, which is the padding token too.
    given = {"input_ids": torch.tensor([token_ids]), "attention_mask": torch.ones(1, len(token_ids))}
    wanted = reference.generate(**given, do_sample=False, max_new_tokens=32, eos_token_id=None)
    driver = Driver(runner_of(embedded, dtype="fp32"), 256)
    assert driver.generate(driver.start(token_ids), 32, chunk=50) == wanted[0, len(token_ids) :].tolist()


def test_logprobs_agree_with_transformers(embedded: Path, reference: Any, tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode(QUESTIONS[3])
    driver = Driver(runner_of(embedded, dtype="fp32"), 256)
    seq = driver.start(token_ids, logprobs=5)
    found = driver.finish_prompt(seq, chunk=64)[0].logprobs
    expected = torch.log_softmax(reference(torch.tensor([token_ids])).logits[0, -1], -1)
    assert found is not None
    np.testing.assert_allclose(found.top_logprobs, expected[list(found.top_ids)].tolist(), atol=1e-3)


def test_bf16_answers_sensibly(embedded: Path, tokenizer: Tokenizer) -> None:
    driver = Driver(runner_of(embedded), 256)
    seq = driver.start(tokenizer.encode_chat([{"role": "user", "content": QUESTIONS[0]}]))
    assert tokenizer.decode(driver.generate(seq, 8)) == "The capital of France is Paris."


def test_bf16_is_bit_identical_when_deterministic(embedded: Path, tokenizer: Tokenizer) -> None:
    driver = Driver(runner_of(embedded), 256)
    token_ids = tokenizer.encode_chat([{"role": "user", "content": QUESTIONS[3]}])
    runs = []
    for chunk in (len(token_ids), 16, 37):
        seq = driver.start(token_ids, deterministic=True, logprobs=3)
        sampled = [driver.finish_prompt(seq, chunk)[0], driver.step([driver.item(seq)])[0]]
        runs.append([(token.token_id, token.logprobs.top_logprobs) for token in sampled if token.logprobs])
    company = [driver.start(tokenizer.encode(question), deterministic=True) for question in QUESTIONS[:3]]
    seq = driver.start(token_ids, deterministic=True, logprobs=3)
    for other in company:
        driver.finish_prompt(other)
    driver.step([driver.item(seq, 40), *(driver.item(other) for other in company)])
    while seq.num_output_tokens < 2:
        driver.step([*(driver.item(other) for other in company), driver.item(seq, 40)])
    assert runs[0] == runs[1] == runs[2]
    assert outputs(seq) == [token_id for token_id, _ in runs[0]]


def test_one_resolved_model_has_one_revision_and_layout(embedded: Path) -> None:
    first, second = runner_of(embedded), build_runner(resolved(embedded), max_model_len=2048)
    assert first.layout.block_bytes == second.layout.block_bytes == 30 * 2 * 3 * 16 * 64 * 2
    assert first.layout.model_revision == resolve(str(embedded)).revision
