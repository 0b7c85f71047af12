"""Makes vLLM take outputs that were sampled elsewhere: a V1 logits processor, loaded into its worker processes.

vLLM has no "start with these outputs". Appending them to the prompt would be wrong: penalties, min_tokens and the
grammar count outputs only, and a seeded generator would be one draw behind. So the request starts with no outputs,
and as long as it has fewer than were forced, all logits but the forced token's are masked. The step still samples:
generator, grammar and counters advance just as they did where the token was first drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality

from pdserve.engine.vllm.cpu_seeds import protect_cpu_generators

if TYPE_CHECKING:
    from vllm.config import VllmConfig

FORCED_KEY = "pdserve_forced"
"""Key of the token ids in `SamplingParams.extra_args`."""

Row = tuple[Sequence[int], Sequence[int]]
"""(forced tokens, the request's outputs so far: vLLM's own growing list)."""


class ForcedOutputs(LogitsProcessor):  # type: ignore[misc]  # vllm has no types
    """Rows of the batch that still have outputs to take over."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, Row] = {}
        if device.type == "cpu":
            protect_cpu_generators()

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is not None:
            self._follow(batch_update)
        done = [row for row, (forced, outputs) in self._rows.items() if len(outputs) >= len(forced)]
        for row in done:
            del self._rows[row]

    def _follow(self, update: Any) -> None:
        """In vLLM's order: removed, added, moved."""
        for row in update.removed:
            self._rows.pop(row, None)
        for row, params, _, outputs in update.added:
            forced = (params.extra_args or {}).get(FORCED_KEY)
            if forced:
                self._rows[row] = (forced, outputs)
            else:
                self._rows.pop(row, None)
        for source, target, direction in update.moved:
            self._move(source, target, swap=direction == MoveDirectionality.SWAP)

    def _move(self, source: int, target: int, swap: bool) -> None:
        moved, other = self._rows.pop(source, None), self._rows.pop(target, None)
        if moved is not None:
            self._rows[target] = moved
        if swap and other is not None:
            self._rows[source] = other

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for row, (forced, outputs) in self._rows.items():
            if len(outputs) < len(forced):
                token = forced[len(outputs)]
                kept = logits[row, token].clone()
                logits[row] = -float("inf")
                logits[row, token] = kept
        return logits
