"""The prompts of parity and chaos: slices of a text that every Python has."""

from __future__ import annotations

import math
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from pdserve.models import resolve
from pdserve.tokens import Tokenizer
from pdserve_cli.parity_types import Case

MIN_TOKENS, MAX_TOKENS = 1, 4000
"""Prompt lengths are log-uniform between these: mean about 480."""
MAX_REPLY = 64
_CORPUS_FILES = ("argparse.py", "asyncio/base_events.py", "ast.py", "datetime.py", "decimal.py", "inspect.py")


def corpus_tokens(model: str) -> list[int]:
    """Some 100,000 tokens of the embedded model's tokenizer."""
    return Tokenizer.load(resolve(model).path).encode("\n".join(_corpus()))


def make_cases(count: int, seed: int, model: str, max_prompt: int, *, min_prompt: int = MIN_TOKENS) -> list[Case]:
    """Prompts of log-uniform length, cut at random places; the longest length is always met."""
    rng = random.Random(seed)
    tokens = corpus_tokens(model)
    lengths = [round(math.exp(rng.uniform(math.log(min_prompt), math.log(max_prompt)))) for _ in range(count)]
    lengths[0] = max_prompt
    starts = [rng.randrange(len(tokens) - length) for length in lengths]
    seeds = [rng.randrange(2**31) for _ in range(count)]
    replies = [_slice(tokens, rng.randrange(len(tokens) - MAX_REPLY), rng.randint(1, MAX_REPLY)) for _ in range(count)]
    prompts = [_slice(tokens, start, length) for start, length in zip(starts, lengths, strict=True)]
    return [Case(prompt, seed, reply) for prompt, seed, reply in zip(prompts, seeds, replies, strict=True)]


def _slice(tokens: list[int], start: int, length: int) -> tuple[int, ...]:
    return tuple(tokens[start : start + length])


def _corpus() -> Iterator[str]:
    library = Path(sysconfig.get_paths()["stdlib"])
    for name in _CORPUS_FILES:
        yield (library / name).read_text(encoding="utf-8")
