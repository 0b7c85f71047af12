"""One engine alone: the same model without router, wire, hand-over, batching or chunking."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from pdserve.config import WorkerConfig, from_mapping
from pdserve.engine.base import HandoverEngine
from pdserve.engine.memory import LocalMemory
from pdserve.types import Phase, Request, SamplingParams
from pdserve_cli.parity_types import Case, Run
from worker_core.engines import build_engine


def generate_alone(
    arguments: argparse.Namespace, cases: Sequence[Case], outputs: int, seeded: dict[str, Any]
) -> list[Run]:
    """Each case by itself, greedy then seeded, its prompt in one chunk and with no prefix cache."""
    config = from_mapping(
        WorkerConfig,
        {
            "engine": arguments.engine,
            "model": arguments.model,
            "dtype": arguments.dtype,
            "deterministic": arguments.dtype == "bf16" and arguments.engine == "torch",
            "kv_memory_bytes": 512 << 20,
            "max_num_batched_tokens": 8192,
            "chunk_tokens": 8192,
            "prefix_cache": False,
        },
    )
    engine = build_engine(config, LocalMemory)
    try:
        return [_run_case(engine, case, outputs, seeded) for case in cases]
    finally:
        engine.close()


def _run_case(engine: HandoverEngine, case: Case, outputs: int, seeded: dict[str, Any]) -> Run:
    greedy = SamplingParams(temperature=0.0, max_tokens=outputs, ignore_eos=True, seed=case.seed, logprobs=0)
    drawn = SamplingParams(**seeded, max_tokens=outputs, ignore_eos=True, seed=case.seed)
    tokens, logprobs = _generate(engine, case, greedy)
    return Run(tokens, _generate(engine, case, drawn)[0], logprobs)


def _generate(engine: HandoverEngine, case: Case, params: SamplingParams) -> tuple[tuple[int, ...], tuple[float, ...]]:
    request = Request("parity", engine.model.name, case.prompt, params)
    engine.submit(request, 1, Phase.FULL)
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
