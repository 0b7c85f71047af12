"""Decode and prefill speed of the torch engine beside transformers with SDPA: SmolLM2-135M, one thread.

    python benchmarks/engine.py --json          about four minutes
    python benchmarks/engine.py --quick --json  a smoke test: same keys, few steps

The two engines take turns step by step, so that a noisy neighbour disturbs both, and medians of CPU time are
compared (wall time stands beside it). Both hold the same weights, from the same file. Decode: every sequence of the
batch has the context that is named, and gets one token a step, greedy. Prefill: one prompt of that length, whole.

With --json stdout carries one object: bf16 at context 1,024 under `decode_ms_per_step` and `prefill_tokens_per_s`,
everything else that was measured under `others`, ratios (transformers' time over ours) under `ratios`. The table
goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import transformers

from pdserve.engine.core.runner import Scheduled, Sequence
from pdserve.engine.torch.engine import build_runner, use_huge_pages
from pdserve.engine.torch.runner import DTYPES, TorchRunner
from pdserve.models import DEFAULT_MODEL, ResolvedModel, resolve
from pdserve.types import Request, SamplingParams

MAIN_DTYPE, MAIN_CONTEXT = "bf16", 1024
BATCHES = (1, 16)


@dataclass
class Times:
    """Seconds of each step, CPU and wall."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def measure(self, step: Callable[[], None]) -> None:
        cpu, wall = time.process_time(), time.perf_counter()
        step()
        self.cpu.append(time.process_time() - cpu)
        self.wall.append(time.perf_counter() - wall)

    @property
    def cpu_s(self) -> float:
        return statistics.median(self.cpu)

    @property
    def wall_s(self) -> float:
        return statistics.median(self.wall)


class Contender(Protocol):
    def prefill(self, prompts: list[list[int]]) -> None: ...

    def decode(self) -> None: ...


class Ours:
    """A runner driven as the scheduler drives it, with block tables of one run each (as the allocator prefers)."""

    def __init__(self, runner: TorchRunner) -> None:
        self._runner = runner
        self._batch: list[Sequence] = []

    def prefill(self, prompts: list[list[int]]) -> None:
        per_seq = -(-(len(prompts[0]) + 256) // self._runner.layout.block_tokens)
        self._batch = [_sequence(ids, i, per_seq) for i, ids in enumerate(prompts)]
        for seq in self._batch:
            self._run([Scheduled(seq, 0, len(seq.token_ids), (seq,))])

    def decode(self) -> None:
        self._run([Scheduled(seq, len(seq.token_ids) - 1, 1, (seq,)) for seq in self._batch])

    def _run(self, batch: list[Scheduled]) -> None:
        for item, token in zip(batch, self._runner.run(batch), strict=True):
            item.seq.token_ids.append(token.token_id)


def _sequence(token_ids: list[int], index: int, num_blocks: int) -> Sequence:
    request = Request(f"r{index}", "m", tuple(token_ids), SamplingParams(temperature=0.0))
    table = list(range(index * num_blocks, (index + 1) * num_blocks))
    return Sequence(request, index, 0, list(token_ids), len(token_ids), block_table=table)


class Transformers:
    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache: Any = None
        self._last: Any = None

    def prefill(self, prompts: list[list[int]]) -> None:
        self._cache = transformers.DynamicCache(config=self._model.config)
        self._step(torch.tensor(prompts), logits_to_keep=1)

    def decode(self) -> None:
        self._step(self._last)

    def _step(self, token_ids: Any, **options: Any) -> None:
        with torch.inference_mode():
            logits = self._model(token_ids, past_key_values=self._cache, use_cache=True, **options).logits
            self._last = logits[:, -1:].argmax(-1)


def load_pair(resolved: ResolvedModel, dtype: str, max_tokens: int) -> tuple[Ours, Transformers]:
    """Both engines with the model's weights; ours has room for `max_tokens`."""
    runner = build_runner(resolved, dtype=dtype)
    runner.allocate(-(-max_tokens // runner.layout.block_tokens), None)
    model = reference_model(resolved, dtype)
    return Ours(runner), Transformers(model)


def reference_model(resolved: ResolvedModel, dtype: str) -> Any:
    """transformers' own class, filled with the same weights (its GGUF reader needs 13 s and another package)."""
    if resolved.kind == "folder":
        return transformers.AutoModelForCausalLM.from_pretrained(
            resolved.path, dtype=DTYPES[dtype], attn_implementation="sdpa"
        ).eval()
    from pdserve.engine.torch.loader import GGUFSource
    from pdserve.engine.torch.shape import shape_from_gguf
    from pdserve.gguf_metadata import read_gguf

    gguf = read_gguf(resolved.path)
    shape = shape_from_gguf(gguf, 8192)
    source = GGUFSource(gguf, shape)
    config = transformers.LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        max_position_embeddings=shape.max_model_len,
        rms_norm_eps=shape.rms_norm_eps,
        rope_theta=shape.rope.theta,
        tie_word_embeddings=shape.tied,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    names = [name for name in model.state_dict() if name in source]
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict({name: source.get(name) for name in names}, strict=False)
    model.tie_weights()
    return model.to(DTYPES[dtype]).eval()


def prompts_of(batch: int, context: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(100, 40000, (context,), generator=generator).tolist() for _ in range(batch)]


def measure_prefill(pair: dict[str, Contender], context: int, rounds: int) -> dict[str, Times]:
    times = {name: Times() for name in pair}
    for index in range(rounds + 1):
        for name, engine in pair.items():
            found = Times() if index == 0 else times[name]
            found.measure(lambda engine=engine: engine.prefill(prompts_of(1, context)))
    return times


def measure_decode(pair: dict[str, Contender], batch: int, context: int, steps: int) -> dict[str, Times]:
    """The context grows by a token a step; half of the steps lie below the one that is named."""
    times = {name: Times() for name in pair}
    for engine in pair.values():
        engine.prefill(prompts_of(batch, context - steps // 2 - 2))
        engine.decode()
    for _ in range(steps):
        for name, engine in pair.items():
            times[name].measure(engine.decode)
    return times


def measure_all(resolved: ResolvedModel, quick: bool) -> dict[str, dict[str, Times]]:
    """Cell name ("bf16/1024/decode/16") -> engine -> times."""
    cells: dict[str, dict[str, Times]] = {}
    for dtype in DTYPES:
        for context in (MAIN_CONTEXT, 128):
            ours, theirs = load_pair(resolved, dtype, max(BATCHES) * (context + 512))
            pair: dict[str, Contender] = {"pdserve": ours, "transformers": theirs}
            if not quick or (dtype, context) == (MAIN_DTYPE, MAIN_CONTEXT):
                cells[f"{dtype}/{context}/prefill"] = measure_prefill(pair, context, 1 if quick else 5)
                for batch in BATCHES:
                    found = measure_decode(pair, batch, context, 3 if quick else 21)
                    cells[f"{dtype}/{context}/decode/{batch}"] = found
            print(f"measured {dtype} at context {context}", file=sys.stderr, flush=True)
    return cells


def report(cells: dict[str, dict[str, Times]]) -> dict[str, Any]:
    """The object that --json prints; times are CPU time."""
    main = f"{MAIN_DTYPE}/{MAIN_CONTEXT}"
    engines = ("pdserve", "transformers")
    return {
        "decode_ms_per_step": {
            name: {str(b): _ms(cells[f"{main}/decode/{b}"][name].cpu_s) for b in BATCHES} for name in engines
        },
        "prefill_tokens_per_s": {
            name: round(MAIN_CONTEXT / cells[f"{main}/prefill"][name].cpu_s, 1) for name in engines
        },
        "ratios": {
            cell: round(times["transformers"].cpu_s / times["pdserve"].cpu_s, 3) for cell, times in cells.items()
        },
        "others": {
            cell: {name: {"cpu_ms": _ms(t.cpu_s), "wall_ms": _ms(t.wall_s)} for name, t in times.items()}
            for cell, times in cells.items()
        },
    }


def _ratio(times: dict[str, Times]) -> float:
    return times["transformers"].cpu_s / times["pdserve"].cpu_s


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 2)


def print_table(cells: dict[str, dict[str, Times]]) -> None:
    print(f"{'cell':26}{'pdserve cpu ms':>16}{'wall':>9}{'transformers':>15}{'wall':>9}{'ratio':>8}", file=sys.stderr)
    for cell, times in cells.items():
        ours, theirs = times["pdserve"], times["transformers"]
        print(
            f"{cell:26}{_ms(ours.cpu_s):16}{_ms(ours.wall_s):9}{_ms(theirs.cpu_s):15}{_ms(theirs.wall_s):9}"
            f"{_ratio(times):8.2f}",
            file=sys.stderr,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Torch engine against transformers, one thread")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--quick", action="store_true", help="a smoke test: bf16 at context 1,024 only, three steps")
    options = parser.parse_args()
    use_huge_pages()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    cells = measure_all(resolve(options.model), options.quick)
    print_table(cells)
    if options.json:
        print(json.dumps(report(cells)))


if __name__ == "__main__":
    main()
