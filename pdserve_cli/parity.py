"""`pdserve parity`: are the cluster's tokens those of one engine alone, and of transformers?

Every case is run through each cell of the matrix (transports x chunk sizes x batch sizes): its prompt greedy, then
seeded, then a second turn that continues the greedy answer. It counts as identical only if each cell gave the tokens
of one engine that prefills whole prompts one at a time. Greedy tokens are compared with `transformers` as well. With
the KV store on, pools are so small that KV comes back from every tier; a tier that gave nothing fails the run.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from kvstore.transports.registry import NAMES, OPTIONAL
from pdserve_cli.parity_alone import generate_alone
from pdserve_cli.parity_cases import MAX_TOKENS, make_cases
from pdserve_cli.parity_cell import Cell, Findings, Setting, run_cell
from pdserve_cli.parity_types import OUTPUTS, Case, Run
from pdserve_cli.tiers import TIERS
from pdserve_cli.verdict import judged, say

_MAX_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Report:
    """What `--json` prints. `hits`: blocks found, by tier, over all cells; `unused_tiers` gave none."""

    prompts: int
    identical_single: int
    identical_reference: int | None
    max_logprob_diff: float
    cells: int
    kv_bytes_moved: int
    cached_tokens: int
    store: bool
    hits: dict[str, int]
    unused_tiers: list[str]
    corrupted: int = 0
    """Blocks on disk that `--corrupt` struck; `caught`: how many wrong blocks the stores found there."""
    caught: int = 0
    uncaught: list[str] = field(default_factory=list)
    mismatches: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        identical = self.identical_single == self.prompts and self.identical_reference in (None, self.prompts)
        return identical and not self.unused_tiers and not self.uncaught


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", type=int, default=16, metavar="N")
    parser.add_argument("--engine", choices=("torch", "vllm", "sim"), default="torch")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16 runs deterministic")
    parser.add_argument("--store", choices=("on", "off"), help="the KV store (on; off with --engine vllm)")
    parser.add_argument("--tiers", default=",".join(TIERS), help="with the store: must have given blocks (all four)")
    parser.add_argument("--corrupt", type=int, default=0, metavar="N", help="corrupt every Nth block on disk meanwhile")
    parser.add_argument("--transport", choices=("all", *NAMES, *OPTIONAL), default="all")
    parser.add_argument("--chunk", type=int, action="append", metavar="N", help="chunk sizes, repeatable (96, 512)")
    parser.add_argument("--batch", type=int, action="append", metavar="N", help="concurrency, repeatable (1, 16)")
    parser.add_argument("--max-prompt", type=int, default=MAX_TOKENS, metavar="N", help="longest prompt in tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-reference", action="store_true", help="leave transformers out")
    parser.add_argument("--json", action="store_true")


def run(arguments: argparse.Namespace) -> int:
    """Exit status 0 when every prompt is identical everywhere and every claimed tier was used, else 1."""
    return judged(_run(arguments), arguments.json)


def cells(arguments: argparse.Namespace) -> list[Cell]:
    transports = ("shm", "tcp") if arguments.transport == "all" else (arguments.transport,)
    chunks = arguments.chunk or [96, 512]
    batches = arguments.batch or [1, 16]
    return [Cell(t, c, b) for t in transports for c, b in zip_longest_last(chunks, batches)]


def zip_longest_last(a: Sequence[int], b: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs of the two lists, the shorter one's last value repeated: every value of both is met."""
    size = max(len(a), len(b))
    return [(a[min(i, len(a) - 1)], b[min(i, len(b) - 1)]) for i in range(size)]


async def _run(arguments: argparse.Namespace) -> Report:
    store = (arguments.store or ("off" if arguments.engine == "vllm" else "on")) == "on"
    setting = Setting(
        arguments.engine, arguments.model, arguments.dtype, store, arguments.corrupt if store else 0, arguments.seed
    )
    cases = make_cases(arguments.prompts, arguments.seed, arguments.model, arguments.max_prompt)
    tokens = sum(len(case.prompt) for case in cases)
    say(f"{len(cases)} prompts, {tokens} tokens, seed {arguments.seed}, store {'on' if store else 'off'}")
    say("one engine alone ...")
    alone = await asyncio.to_thread(generate_alone, setting.engine, setting.model, setting.dtype, cases)
    found = Findings()
    for cell in cells(arguments):
        say(f"cell {asdict(cell)} ...")
        await run_cell(setting, cell, cases, alone, found)
        hits = f"; blocks found so far: {found.hits}" if store else ""
        say(f"{len(cases) - len(found.wrong)} of {len(cases)} identical so far{hits}")
    return _report(arguments, cases, found, store, await _count_identical(arguments, cases, alone))


async def _count_identical(arguments: argparse.Namespace, cases: Sequence[Case], alone: Sequence[Run]) -> int | None:
    """With transformers; None when it is left out."""
    if arguments.no_reference or arguments.engine == "sim":
        return None
    say("transformers ...")
    from pdserve_cli.parity_reference import count_identical

    return await asyncio.to_thread(count_identical, arguments, cases, alone, OUTPUTS)


def _report(
    arguments: argparse.Namespace, cases: Sequence[Case], found: Findings, store: bool, identical: int | None
) -> Report:
    claimed = [tier for tier in arguments.tiers.split(",") if tier] if store else []
    return Report(
        prompts=len(cases),
        identical_single=len(cases) - len(found.wrong),
        identical_reference=identical,
        max_logprob_diff=found.max_logprob_diff,
        cells=found.cells,
        kv_bytes_moved=found.kv_bytes_moved,
        cached_tokens=found.cached_tokens,
        store=store,
        hits=found.hits,
        unused_tiers=[tier for tier in claimed if not found.hits.get(tier)],
        corrupted=found.corrupted,
        caught=found.caught,
        uncaught=found.uncaught,
        mismatches=[found.wrong[index] for index in sorted(found.wrong)][:_MAX_SHOWN],
    )
