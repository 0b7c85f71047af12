"""Tiny models of every supported shape, saved by transformers, and ways to drive a runner by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from pdserve.engine.core.runner import Sampled, Scheduled
from pdserve.engine.core.runner import Sequence as Choice
from pdserve.engine.torch.plan import fast_plan, tiled_plan
from pdserve.engine.torch.runner import TorchRunner
from pdserve.models import ResolvedModel
from pdserve.types import Request, SamplingParams

SIZES = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "llama_biases": ("Llama", {"attention_bias": True}),
    "llama_wide_heads": ("Llama", {"head_dim": 32}),
    "llama_llama3_rope": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama_yarn_rope": ("Llama", {"rope_parameters": YARN_ROPE}),
    "llama_linear_rope": ("Llama", {"rope_parameters": LINEAR_ROPE}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "mistral_unused_window": ("Mistral", {"sliding_window": 512, "head_dim": 16}),
}


def make_reference(name: str) -> Any:
    """A transformers model with fixed random weights, norms and biases included."""
    family, extra = SHAPES[name]
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **extra})
    torch.manual_seed(7)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name or "bias" in parameter_name:
            parameter.data.uniform_(0.5, 1.5)
    return model


def resolved(path: Path) -> ResolvedModel:
    return ResolvedModel("gguf" if path.is_file() else "folder", path, "revision", path.name, "tokenizer")


class Driver:
    """Plays the scheduler for a runner: hands out blocks (shuffled, so that no table is contiguous) and remembers how
    far each sequence has come."""

    def __init__(self, runner: TorchRunner, num_blocks: int = 96, seed: int = 3) -> None:
        self.runner = runner
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed)).tolist()
        self._free: list[int] = order
        self._next_handle = 0

    def start(self, prompt: Sequence[int], *, deterministic: bool = False, **params: Any) -> Choice:
        self._next_handle += 1
        request = Request(
            f"r{self._next_handle}",
            "m",
            tuple(prompt),
            SamplingParams(**{"temperature": 0.0, **params}),
            deterministic=deterministic,
        )
        seq = Choice(request, self._next_handle, 0, list(prompt), len(prompt))
        self.runner.open(seq)
        return seq

    def item(self, seq: Choice, num_tokens: int | None = None) -> Scheduled:
        """The next `num_tokens` (None: all that are left) of `seq`, with room made for them."""
        left = len(seq.token_ids) - seq.num_computed_tokens
        count = left if num_tokens is None else min(num_tokens, left)
        end = seq.num_computed_tokens + count
        while len(seq.block_table) * self.runner.layout.block_tokens < end:
            seq.block_table.append(self._free.pop())
        return Scheduled(seq, seq.num_computed_tokens, count, (seq,) if count == left else ())

    def step(self, items: Sequence[Scheduled]) -> list[Sampled]:
        """Run, and append what was sampled."""
        sampled = self.runner.run(items)
        choices = [seq for item in items for seq in item.choices]
        for item in items:
            item.seq.num_computed_tokens += item.num_tokens
        for seq, token in zip(choices, sampled, strict=True):
            assert token.error is None, token.error
            seq.token_ids.append(token.token_id)
        return sampled

    def finish_prompt(self, seq: Choice, chunk: int | None = None) -> list[Sampled]:
        while True:
            sampled = self.step([self.item(seq, chunk)])
            if sampled:
                return sampled

    def generate(self, seq: Choice, num_tokens: int, chunk: int | None = None) -> list[int]:
        self.finish_prompt(seq, chunk)
        while seq.num_output_tokens < num_tokens:
            self.step([self.item(seq)])
        return outputs(seq)

    def all_logits(self, items: Sequence[Scheduled], *, tiled: bool = False) -> torch.Tensor:
        """[rows, vocab]: of every row of the step, in the items' order; the fast plan's order must be the items'."""
        kv, decoder = self.runner.kv, self.runner.decoder
        plan = (tiled_plan if tiled else fast_plan)(kv, items)
        hidden = decoder.forward(plan.tiles, kv)
        logits = torch.cat([decoder.logits(rows) for rows in hidden])
        for item in items:
            item.seq.num_computed_tokens += item.num_tokens
        return logits[: sum(item.num_tokens for item in items)]


def outputs(seq: Choice) -> list[int]:
    return seq.token_ids[seq.num_prompt_tokens :]


def prompt(length: int, seed: int = 0, vocab_size: int = 160) -> list[int]:
    return torch.randint(3, vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
