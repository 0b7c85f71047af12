"""One engine alone: the same model without router, wire, hand-over, store, batching or chunking."""

from __future__ import annotations

from collections.abc import Sequence

from pdserve.config import WorkerConfig, from_mapping
from pdserve.engine.base import HandoverEngine
from pdserve.engine.memory import LocalMemory
from pdserve.types import Phase, Request, SamplingParams
from pdserve_cli.parity_types import OUTPUTS, SEEDED, Case, Run
from worker_core.engines import build_engine


def generate_alone(engine: str, model: str, dtype: str, cases: Sequence[Case], outputs: int = OUTPUTS) -> list[Run]:
    """Each case by itself, round after round, its prompts in one chunk and with no prefix cache."""
    config = from_mapping(
        WorkerConfig,
        {
            "engine": engine,
            "model": model,
            "dtype": dtype,
            "deterministic": dtype == "bf16" and engine == "torch",
            "kv_memory_bytes": 512 << 20,
            "max_num_batched_tokens": 8192,
            "chunk_tokens": 8192,
            "prefix_cache": False,
        },
    )
    alone = build_engine(config, LocalMemory)
    try:
        return [_run_case(alone, case, outputs) for case in cases]
    finally:
        alone.close()


def _run_case(engine: HandoverEngine, case: Case, outputs: int) -> Run:
    greedy = SamplingParams(temperature=0.0, max_tokens=outputs, ignore_eos=True, seed=case.seed, logprobs=0)
    drawn = SamplingParams(**SEEDED, max_tokens=outputs, ignore_eos=True, seed=case.seed)
    tokens, logprobs = _generate(engine, case.prompt, greedy)
    seeded, _ = _generate(engine, case.prompt, drawn)
    second, _ = _generate(engine, (*case.prompt, *tokens, *case.reply), greedy)
    return Run(tokens, seeded, second, logprobs)


def _generate(
    engine: HandoverEngine, prompt: tuple[int, ...], params: SamplingParams
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    engine.submit(Request("parity", engine.model.name, prompt, params), 1, Phase.FULL)
    tokens: list[int] = []
    logprobs: list[float] = []
    while True:
        output = engine.step().output
        tokens += output.token_ids
        logprobs += [entry.logprob for entry in output.logprobs]
        for finish in output.finishes:
            if finish.error is not None:
                raise finish.error
            return tuple(tokens), tuple(logprobs)
