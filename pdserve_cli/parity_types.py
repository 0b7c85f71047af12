"""What parity's parts share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Case:
    """A prompt, and the seed of its sampled run."""

    prompt: tuple[int, ...]
    seed: int


@dataclass(frozen=True, slots=True)
class Run:
    """What one engine alone made of a case: output ids greedy and seeded, and the greedy ones' logprobs."""

    greedy: tuple[int, ...]
    seeded: tuple[int, ...]
    logprobs: tuple[float, ...]
