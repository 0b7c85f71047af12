"""The engine without weights: the real scheduler, blocks, prefix cache and hand-over around made-up KV and time.

Its KV makes every token depend on every byte held (`sim_runner.py`), so hand-over bugs show as wrong tokens in
milliseconds; `expected_tokens` tells what the tokens must be with no engine at all. A timing model says how long each
step takes. A worker calls `step`, which lasts that long; virtual-time callers call `schedule`, read `duration_s`, let
their clock run and call `finish`, without any sleep.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from pdserve.engine.base import KVMemoryFactory, StepResult
from pdserve.engine.core.batch import Batch
from pdserve.engine.core.blocks import CachePolicy
from pdserve.engine.core.config import CoreConfig
from pdserve.engine.core.engine import LocalEngine
from pdserve.engine.sim_kv import chain, digest, initial_state
from pdserve.engine.sim_runner import SimRunner
from pdserve.engine.sim_sampling import NUM_CANDIDATES, Vocabulary, sample
from pdserve.engine.timing import StepWork, TimingModel, timing_preset
from pdserve.errors import ConfigError
from pdserve.types import ModelInfo, Request

DEFAULT_MODEL = ModelInfo(
    name="smollm2-135m",
    revision="sim",
    tokenizer_id="sim",
    max_model_len=131_072,
    vocab_size=49_152,
    eos_token_ids=(2,),
)
"""Vocabulary and EOS of the embedded model, so that its tokenizer reads what comes out."""


DEFAULT_CORE = CoreConfig(num_blocks=4096, max_num_seqs=256)
"""65,536 tokens of KV in blocks of 16: 1 MiB."""


@dataclass(frozen=True, slots=True)
class SimEngineConfig:
    """Raises `ConfigError` naming the key that is out of range."""

    core: CoreConfig = DEFAULT_CORE
    model: ModelInfo = DEFAULT_MODEL
    block_tokens: int = 16
    timing: str = "instant"
    """Preset of `pdserve.engine.timing`."""
    speedup: float = 1.0
    """Divides every duration."""
    model_seed: int = 0
    """Stands for the weights: another seed, other KV and other tokens."""
    first_token: int = 17
    """Ids below are special in the embedded vocabulary and never drawn (but for EOS)."""
    eos_period: int = 256
    """EOS is the likeliest next token once in so many steps: about the mean answer in tokens. 0: never."""
    host_memory: bool = True
    """Off: the pool is a device's and hand-over is staged, as on a GPU."""

    def __post_init__(self) -> None:
        _check(self.block_tokens >= 1, "block_tokens", "must be at least 1")
        _check(self.speedup > 0, "speedup", "must be above 0")
        _check(self.first_token >= 0, "first_token", "must be 0 or more")
        _check(self.eos_period >= 0, "eos_period", "must be 0 or more")
        room = self.first_token + 2 * NUM_CANDIDATES
        _check(self.model.vocab_size >= room, "vocab_size", f"must be at least {room}")

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.model.vocab_size, self.first_token, self.model.eos_token_ids, self.eos_period)


def _check(ok: bool, key: str, rule: str) -> None:
    if not ok:
        raise ConfigError(f"sim.{key} {rule}", key=f"sim.{key}")


class SimEngine(LocalEngine):
    """A `pdserve.engine.base.HandoverEngine`. `timing` overrides the config's preset; clock and sleep take seconds."""

    def __init__(
        self,
        config: SimEngineConfig,
        memory_factory: KVMemoryFactory,
        *,
        timing: TimingModel | None = None,
        cache_policy: CachePolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        runner = SimRunner(config.model, config.vocabulary, config.block_tokens, config.model_seed, config.host_memory)
        super().__init__(runner, memory_factory, config.core, cache_policy=cache_policy, clock=clock)
        self._timing = timing or timing_preset(config.timing)
        self._speedup = config.speedup
        self._clock = clock
        self._sleep = sleep

    def duration_s(self, batch: Batch) -> float:
        """What this batch would take on the simulated hardware, by its clock."""
        return self._timing.step_ms(StepWork.of(batch.items)) / 1000 / self._speedup

    def step(self) -> StepResult:
        """One step in real time: what computing it here took is part of its duration."""
        started = self._clock()
        batch = self.schedule()
        duration = self.duration_s(batch)
        result = self.finish(batch)
        left = duration - (self._clock() - started)
        if left > 0:
            self._sleep(left)
        return result


def expected_tokens(config: SimEngineConfig, request: Request, choice: int = 0) -> list[int]:
    """All outputs that a choice must have, computed from the request alone: those it came with, then new ones up to
    EOS, a stop token, `max_tokens` or the context's end."""
    prompt, params = request.prompt_token_ids, request.params
    outputs = list(request.output_token_ids[choice]) if request.output_token_ids else []
    first_state = initial_state(config.model_seed, request.lora)
    max_tokens = params.max_tokens or config.model.max_model_len
    while len(outputs) < max_tokens and len(prompt) + len(outputs) < config.model.max_model_len:
        tokens = [*prompt, *outputs]
        found = digest(chain(first_state, 0, tokens))
        token = sample(config.vocabulary, found, params, choice, tokens, len(prompt))
        outputs.append(token)
        is_eos = token in config.model.eos_token_ids and not params.ignore_eos
        if len(outputs) >= params.min_tokens and (is_eos or token in params.stop_token_ids):
            break
    return outputs
