"""What parity's parts share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

OUTPUTS = 32
"""Tokens of each answer."""
SEEDED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "presence_penalty": 0.3}
ROUNDS = ("greedy", "seeded", "second turn")


@dataclass(frozen=True, slots=True)
class Case:
    """A prompt, the seed of its sampled run, and what the user says after the greedy answer."""

    prompt: tuple[int, ...]
    seed: int
    reply: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """What one engine alone made of a case: output ids of each round, and the greedy ones' logprobs."""

    greedy: tuple[int, ...]
    seeded: tuple[int, ...]
    second: tuple[int, ...]
    logprobs: tuple[float, ...]

    def outputs(self, round_: str) -> tuple[int, ...]:
        return {"greedy": self.greedy, "seeded": self.seeded, "second turn": self.second}[round_]


def prompt_of(case: Case, run: Run, round_: str) -> tuple[int, ...]:
    """The second turn continues the greedy answer."""
    return (*case.prompt, *run.greedy, *case.reply) if round_ == "second turn" else case.prompt
