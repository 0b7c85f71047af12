"""Keeps a seeded request from killing vLLM on CPU.

vLLM samples for every row of a batch, also for a prompt that is not complete yet, and then takes back the draw of such
rows by moving their generator's offset. CPU generators have no offset: in vLLM 0.32 one seeded prompt of more than one
chunk ends the engine ("CPU Generator does not use offset"). Here those rows' generators are put aside while vLLM
samples: nothing is drawn from them, so nothing has to be taken back. Runs in vLLM's worker process.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np


def protect_cpu_generators() -> None:
    """Wrap the CPU runner's sampling. Idempotent."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    if "sample_tokens" in vars(CPUModelRunner):
        return
    original = CPUModelRunner.sample_tokens

    @functools.wraps(original)
    def sample_tokens(self: Any, *arguments: Any, **options: Any) -> Any:
        generators = self.input_batch.generators
        unfinished = np.flatnonzero(self.discard_request_mask.np[: self.input_batch.num_reqs]).tolist()
        aside = {row: generators.pop(row) for row in unfinished if row in generators}
        try:
            return original(self, *arguments, **options)
        finally:
            generators.update(aside)

    CPUModelRunner.sample_tokens = sample_tokens
