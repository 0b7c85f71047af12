"""Greedy tokens of `transformers` on the same weights: the reference that shares no code with ours."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from pdserve.errors import NotSupported
from pdserve.models import resolve
from pdserve_cli.parity_types import Case, Run


def count_identical(arguments: argparse.Namespace, cases: Sequence[Case], alone: Sequence[Run], outputs: int) -> int:
    """How many cases' greedy tokens are those of transformers. In bf16 that is told, not asserted: rounding differs."""
    torch.set_num_threads(2)
    model = _load(arguments.model, torch.float32 if arguments.dtype == "fp32" else torch.bfloat16)
    identical = 0
    for index, (case, run) in enumerate(zip(cases, alone, strict=True)):
        tokens = _greedy(model, case.prompt, outputs)
        identical += tokens == run.greedy
        if tokens != run.greedy:
            print(f"prompt {index}: transformers {tokens}, ours {run.greedy}", file=sys.stderr)
    return identical


def _load(name: str, dtype: torch.dtype) -> AutoModelForCausalLM:
    resolved = resolve(name)
    path = Path(resolved.path)
    if resolved.kind == "gguf":
        loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    elif resolved.kind == "folder":
        loaded = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    else:
        raise NotSupported(f"transformers cannot load a {resolved.kind}", param="model")
    return loaded.eval()


def _greedy(model: AutoModelForCausalLM, prompt: Sequence[int], outputs: int) -> tuple[int, ...]:
    """A plain greedy loop over the cache: `generate` would add stopping rules and warpers of its own."""
    tokens: list[int] = []
    ids = torch.tensor([list(prompt)])
    cache = None
    with torch.inference_mode():
        for _ in range(outputs):
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            tokens.append(int(out.logits[0, -1].argmax()))
            ids = torch.tensor([[tokens[-1]]])
    return tuple(tokens)
