"""`pdserve parity`: are the cluster's tokens those of one engine alone, and of transformers?

Every prompt is run, greedy and seeded, through each cell of the matrix (transports x chunk sizes x batch sizes); it
counts as identical only if each cell gave the tokens of one engine that prefills whole prompts one at a time.
Greedy tokens are compared with `transformers` as well. Each cell runs the prompts twice over, so that the second
round meets prefix hits on both workers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pdserve.errors import PdserveError
from pdserve.models import resolve
from pdserve.tokens import Tokenizer
from pdserve_cli.client import Answer, stream
from pdserve_cli.cluster import Cluster, ClusterSpec
from pdserve_cli.parity_alone import generate_alone
from pdserve_cli.parity_types import Case, Run

MIN_TOKENS, MAX_TOKENS = 1, 4000
"""Prompt lengths are log-uniform between these: mean about 480."""
OUTPUTS = 32
SEEDED = {"temperature": 0.9, "top_p": 0.95, "presence_penalty": 0.3}
_CORPUS_FILES = ("argparse.py", "asyncio/base_events.py", "ast.py", "datetime.py", "decimal.py", "inspect.py")
"""Text that every Python has: the prompts are slices of it."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One configuration of the cluster under test."""

    transport: str
    chunk: int
    batch: int


@dataclass(slots=True)
class Report:
    """What `--json` prints."""

    prompts: int
    identical_single: int
    identical_reference: int | None
    max_logprob_diff: float
    cells: int = 0
    kv_bytes_moved: int = 0
    cached_tokens: int = 0
    mismatches: list[str] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", type=int, default=16, metavar="N")
    parser.add_argument("--engine", choices=("torch", "vllm", "sim"), default="torch")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16 runs deterministic")
    parser.add_argument("--transport", choices=("all", "shm", "tcp"), default="all")
    parser.add_argument("--chunk", type=int, action="append", metavar="N", help="chunk sizes, repeatable (96, 512)")
    parser.add_argument("--batch", type=int, action="append", metavar="N", help="concurrency, repeatable (1, 16)")
    parser.add_argument("--max-prompt", type=int, default=MAX_TOKENS, metavar="N", help="longest prompt in tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-reference", action="store_true", help="leave transformers out")
    parser.add_argument("--json", action="store_true")


def run(arguments: argparse.Namespace) -> int:
    """Exit status 0 when every prompt is identical everywhere, else 1."""
    report = asyncio.run(_run(arguments))
    plain = asdict(report)
    if arguments.json:
        print(json.dumps(plain))
    else:
        print("\n".join(f"{key:<20} {value}" for key, value in plain.items()))
    wanted = report.prompts
    return 0 if report.identical_single == wanted and report.identical_reference in (None, wanted) else 1


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def cells(arguments: argparse.Namespace) -> list[Cell]:
    transports = ("shm", "tcp") if arguments.transport == "all" else (arguments.transport,)
    chunks = arguments.chunk or [96, 512]
    batches = arguments.batch or [1, 16]
    return [Cell(t, c, b) for t in transports for c, b in zip_longest_last(chunks, batches)]


def zip_longest_last(a: Sequence[int], b: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs of the two lists, the shorter one's last value repeated: every value of both is met."""
    size = max(len(a), len(b))
    return [(a[min(i, len(a) - 1)], b[min(i, len(b) - 1)]) for i in range(size)]


def make_cases(count: int, seed: int, model: str, max_prompt: int) -> list[Case]:
    """Prompts of log-uniform length, cut from a fixed text at random places; the longest length is always met."""
    rng = random.Random(seed)
    tokenizer = Tokenizer.load(resolve(model).path)
    text = "\n".join(_corpus())
    tokens = tokenizer.encode(text)
    lengths = [round(math.exp(rng.uniform(math.log(MIN_TOKENS), math.log(max_prompt)))) for _ in range(count)]
    lengths[0] = max_prompt
    starts = [rng.randrange(len(tokens) - length) for length in lengths]
    return [Case(tuple(tokens[s : s + n]), seed=rng.randrange(2**31)) for s, n in zip(starts, lengths, strict=True)]


def _corpus() -> Iterator[str]:
    library = Path(sysconfig.get_paths()["stdlib"])
    for name in _CORPUS_FILES:
        yield (library / name).read_text(encoding="utf-8")


async def _run(arguments: argparse.Namespace) -> Report:
    cases = make_cases(arguments.prompts, arguments.seed, arguments.model, arguments.max_prompt)
    total = sum(len(case.prompt) for case in cases)
    _say(f"{len(cases)} prompts, {total} tokens, seed {arguments.seed}")
    _say("one engine alone ...")
    alone = await asyncio.to_thread(generate_alone, arguments, cases, OUTPUTS, SEEDED)
    wrong: dict[int, str] = {}
    report = Report(len(cases), 0, None, 0.0)
    for cell in cells(arguments):
        _say(f"cell {asdict(cell)} ...")
        await _run_cell(arguments, cell, cases, alone, wrong, report)
        report.cells += 1
        _say(f"{len(cases) - len(wrong)} of {len(cases)} identical so far")
    report.identical_single = len(cases) - len(wrong)
    report.mismatches = [wrong[index] for index in sorted(wrong)][:10]
    if not arguments.no_reference and arguments.engine != "sim":
        _say("transformers ...")
        from pdserve_cli.parity_reference import count_identical

        report.identical_reference = await asyncio.to_thread(count_identical, arguments, cases, alone, OUTPUTS)
    return report


async def _run_cell(
    arguments: argparse.Namespace,
    cell: Cell,
    cases: Sequence[Case],
    alone: Sequence[Run],
    wrong: dict[int, str],
    report: Report,
) -> None:
    spec = ClusterSpec(
        engine=arguments.engine,
        model=arguments.model,
        worker={
            "transports": [cell.transport],
            "chunk_tokens": cell.chunk,
            "dtype": arguments.dtype,
            "deterministic": arguments.dtype == "bf16" and arguments.engine == "torch",
            "kv_memory_bytes": 2 << 30,
        },
        start_timeout_s=600.0,
    )
    async with Cluster(spec) as cluster:
        model = await cluster.model_name()
        for round_ in ("greedy", "seeded"):
            for index, answer in await _answers(cluster, model, cases, round_ == "seeded", cell.batch):
                expected = alone[index].seeded if round_ == "seeded" else alone[index].greedy
                _compare(answer, expected, alone[index], round_, cell, index, len(cases[index].prompt), wrong, report)
        for member in cluster.workers:
            report.kv_bytes_moved += int(await cluster.metric(member, "pdserve_kv_pulled_bytes_total"))


def _compare(
    answer: Answer | PdserveError,
    expected: tuple[int, ...],
    run: Run,
    round_: str,
    cell: Cell,
    index: int,
    length: int,
    wrong: dict[int, str],
    report: Report,
) -> None:
    where = f"prompt {index} ({length} tokens), {round_}, {asdict(cell)}"
    if isinstance(answer, PdserveError):
        wrong.setdefault(index, f"{where}: {answer.reason}: {answer.message}")
        return
    report.cached_tokens += (answer.usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    if tuple(answer.token_ids) != expected:
        wrong.setdefault(index, f"{where}: {answer.token_ids} instead of {list(expected)}")
    elif round_ == "greedy" and answer.logprobs:
        pairs = zip(answer.logprobs, run.logprobs, strict=False)
        report.max_logprob_diff = max(report.max_logprob_diff, *(abs(a - b) for a, b in pairs))


async def _answers(
    cluster: Cluster, model: str, cases: Sequence[Case], seeded: bool, batch: int
) -> list[tuple[int, Answer | PdserveError]]:
    gate = asyncio.Semaphore(batch)

    async def one(index: int, case: Case) -> tuple[int, Answer | PdserveError]:
        body: dict[str, Any] = {
            "model": model,
            "prompt": list(case.prompt),
            "max_tokens": OUTPUTS,
            "ignore_eos": True,
            "return_token_ids": True,
            "logprobs": 0,
        }
        body |= {**SEEDED, "seed": case.seed} if seeded else {"temperature": 0}
        async with gate:
            try:
                return index, await asyncio.to_thread(stream, cluster.http_url, "/v1/completions", body, 600.0)
            except PdserveError as error:
                return index, error

    return await asyncio.gather(*(one(index, case) for index, case in enumerate(cases)))
