"""A real engine core in virtual time: scheduler, block manager, prefix cache and hand-over as served, nothing computed.

`NullRunner` stands for the model: no weights, no KV bytes, every token is 0. `VirtualEngine` asks the core for a batch,
lets the clock run for as long as the timing model says, and then finishes it.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pdserve.engine.base import KVMemory, StepResult
from pdserve.engine.core.batch import Batch
from pdserve.engine.core.blocks import CachePolicy
from pdserve.engine.core.config import CoreConfig
from pdserve.engine.core.engine import LocalEngine
from pdserve.engine.core.runner import Sampled, Scheduled, Sequence
from pdserve.engine.timing import StepWork, TimingModel
from pdserve.types import KVLayout, ModelInfo
from simulator.events import EventQueue

_TOKEN = Sampled(0)


class NullRunner:
    """A `pdserve.engine.core.runner.ModelRunner` that computes nothing."""

    pool_is_host_memory = True

    def __init__(self, model: ModelInfo, block_tokens: int) -> None:
        self.model = model
        self.layout = KVLayout(model.revision, "none", block_tokens, 1, 1, 1, block_bytes=1)

    def allocate(self, num_blocks: int, host_blocks: NDArray[np.uint8] | None) -> None:
        """There is nothing to hold."""

    def open(self, seq: Sequence) -> None:
        """No state."""

    def drop(self, seq: Sequence) -> None:
        """No state."""

    def run(self, batch: Seq[Scheduled]) -> list[Sampled]:
        return [_TOKEN for item in batch for _ in item.choices]

    def copy_blocks(self, sources: Seq[int], targets: Seq[int]) -> None:
        """No bytes."""

    def stage_out(self, pool_blocks: Seq[int], staging: NDArray[np.uint8], staging_blocks: Seq[int]) -> None:
        """No bytes."""

    def stage_in(self, staging: NDArray[np.uint8], staging_blocks: Seq[int], pool_blocks: Seq[int]) -> None:
        """No bytes."""

    def close(self) -> None:
        """Nothing to give back."""


@dataclass(frozen=True, slots=True)
class _Memory:
    blocks: NDArray[np.uint8]
    generations: NDArray[np.uint64]


def null_memory(num_blocks: int, block_bytes: int) -> KVMemory:
    """One byte a block."""
    return _Memory(np.zeros((num_blocks, block_bytes), np.uint8), np.zeros(num_blocks, np.uint64))


class VirtualEngine:
    """Steps `core` whenever it has work. `on_step` gets each step's result at the instant at which it ends; call `wake`
    after anything that may have given it work."""

    def __init__(
        self,
        queue: EventQueue,
        model: ModelInfo,
        block_tokens: int,
        config: CoreConfig,
        timing: TimingModel,
        on_step: Callable[[StepResult], None],
        cache_policy: CachePolicy | None = None,
    ) -> None:
        runner = NullRunner(model, block_tokens)
        self.core = LocalEngine(runner, null_memory, config, cache_policy=cache_policy, clock=queue.clock)
        self.busy_s = 0.0
        self.num_steps = 0
        self._queue = queue
        self._timing = timing
        self._on_step = on_step
        self._planned = False
        """A step is under way, or about to be looked for."""

    def wake(self) -> None:
        if not self._planned:
            self._planned = True
            self._queue.soon(self._begin)

    def _begin(self) -> None:
        if not self.core.has_work():
            self._planned = False
            return
        batch = self.core.schedule()
        duration = self._timing.step_ms(StepWork.of(batch.items)) / 1000
        self.busy_s += duration
        self.num_steps += 1
        self._queue.after(duration, lambda: self._end(batch))

    def _end(self, batch: Batch) -> None:
        result = self.core.finish(batch)
        self._planned = False
        self.wake()
        self._on_step(result)
