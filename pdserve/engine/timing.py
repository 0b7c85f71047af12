"""How long an engine step takes on hardware that isn't here.

A `TimingModel` maps what a step computes (`StepWork`) to milliseconds. Two kinds: a linear law with few coefficients,
and a table of measured or estimated points with interpolation. Both share one rule for mixed steps: the step's fixed
part (reading the weights, launching kernels) is paid once, since prompt tokens and decodes go through the same
matrix products; the work of both is added, since attention and arithmetic are done for each.
"""

from __future__ import annotations

import csv
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from itertools import accumulate
from pathlib import Path
from typing import Protocol

from pdserve.engine.core.runner import Scheduled
from pdserve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class StepWork:
    """What one step computes. A single token costs the same whether it ends a prompt or is decoded, and counts as a
    decode."""

    prefill_tokens: int = 0
    prefill_pairs: int = 0
    """(new token, token that it attends to) pairs of the prompt chunks."""
    decodes: int = 0
    decode_context: int = 0
    """Tokens that the decodes attend to, all together."""

    @classmethod
    def of(cls, batch: Iterable[Scheduled]) -> StepWork:
        tokens = pairs = decodes = context = 0
        for item in batch:
            if item.num_tokens == 1:
                decodes += 1
                context += item.start + 1
            else:
                tokens += item.num_tokens
                pairs += chunk_pairs(item.start, item.num_tokens)
        return cls(tokens, pairs, decodes, context)

    @classmethod
    def prefill(cls, *prompts: int) -> StepWork:
        """Whole prompts of these lengths, nothing cached."""
        return cls(sum(prompts), sum(chunk_pairs(0, tokens) for tokens in prompts))

    @classmethod
    def decode(cls, *contexts: int) -> StepWork:
        """One token for each sequence of these lengths."""
        return cls(decodes=len(contexts), decode_context=sum(contexts))


def chunk_pairs(start: int, tokens: int) -> int:
    """A chunk's tokens each attend to the `start` tokens before it and to the chunk up to themselves."""
    return tokens * start + tokens * (tokens + 1) // 2


class TimingModel(Protocol):
    """Deterministic: equal work takes equal time."""

    def step_ms(self, work: StepWork) -> float: ...


@dataclass(frozen=True, slots=True)
class LinearTiming:
    """prefill = fixed + per_token * tokens + per_pair * pairs; decode = fixed + per_sequence * batch + per_context *
    context tokens; a mixed step pays the larger fixed part once. All in ms. A fixed part below 0 comes from a fit
    over long prompts; no step takes less than nothing."""

    prefill_fixed: float
    prefill_per_token: float
    prefill_per_pair: float
    decode_fixed: float
    decode_per_sequence: float
    decode_per_context: float

    def step_ms(self, work: StepWork) -> float:
        if not work.prefill_tokens:
            fixed = self.decode_fixed if work.decodes else 0.0
        else:
            fixed = max(self.prefill_fixed, self.decode_fixed) if work.decodes else self.prefill_fixed
        prefill = self.prefill_per_token * work.prefill_tokens + self.prefill_per_pair * work.prefill_pairs
        decode = self.decode_per_sequence * work.decodes + self.decode_per_context * work.decode_context
        return max(fixed + prefill + decode, 0.0)


Points = Mapping[tuple[int, int], float]
"""ms by (batch, tokens): of each prompt, or of each sequence's context."""


class TableTiming:
    """Interpolates points. `prefill` needs batch 1 at three lengths or more, `decode` a full grid.

    A prompt's time is split into attention, quadratic in its length (fitted to the three longest prompts), and the
    rest, which depends on the step's number of tokens alone: so chunks, prefix hits and several prompts in a step
    need no points of their own. Beyond the points lines go on with the last slope; shorter contexts cost as the
    shortest. The fixed part is a decode at the smallest batch and context: nearly only the weights are read.
    """

    def __init__(self, prefill: Points, decode: Points) -> None:
        self._batches = sorted({batch for batch, _ in decode})
        self._contexts = sorted({tokens for _, tokens in decode})
        single = sorted((tokens, ms) for (batch, tokens), ms in prefill.items() if batch == 1)
        if len(single) < 3 or len(decode) != len(self._batches) * len(self._contexts) or len(decode) < 4:
            raise ConfigError("a timing table needs 3 prefill points at batch 1 and a full decode grid", key="timing")
        self._decode = _never_less([[decode[batch, context] for context in self._contexts] for batch in self._batches])
        self._fixed = self._decode[0][0]
        self._per_pair = _quadratic_part(single[-3:])
        self._lengths = [0, *(tokens for tokens, _ in single)]
        self._linear = [self._fixed, *(ms - self._per_pair * chunk_pairs(0, tokens) for tokens, ms in single)]

    def step_ms(self, work: StepWork) -> float:
        prefill = decode = 0.0
        if work.prefill_tokens:
            prefill = _on_line(self._lengths, self._linear, work.prefill_tokens) - self._fixed
            prefill += self._per_pair * work.prefill_pairs
        if work.decodes:
            decode = self._decode_ms(work.decodes, work.decode_context / work.decodes) - self._fixed
        return max(self._fixed + prefill + decode, 0.0) if work.prefill_tokens or work.decodes else 0.0

    def _decode_ms(self, batch: int, context: float) -> float:
        context = max(context, self._contexts[0])
        low = _segment(self._batches, batch)
        pair = [_on_line(self._contexts, self._decode[low + i], context) for i in (0, 1)]
        return _on_line(self._batches[low : low + 2], pair, batch)


def _never_less(grid: Sequence[Sequence[float]]) -> list[list[float]]:
    """Rows and columns made to rise: where an estimate falls as the work grows, it is noise."""
    rows: list[list[float]] = []
    for row in grid:
        risen = list(accumulate(row, max))
        rows.append([max(pair) for pair in zip(risen, rows[-1], strict=True)] if rows else risen)
    return rows


def _segment(xs: Sequence[int], x: float) -> int:
    """Index of the point that the line through x starts at; the outer lines reach to infinity."""
    return min(max(bisect_right(xs, x) - 1, 0), len(xs) - 2)


def _on_line(xs: Sequence[int], ys: Sequence[float], x: float) -> float:
    low = _segment(xs, x)
    return ys[low] + (ys[low + 1] - ys[low]) * (x - xs[low]) / (xs[low + 1] - xs[low])


def _quadratic_part(points: Sequence[tuple[int, float]]) -> float:
    """ms a pair: twice the second divided difference of three (tokens, ms) points; 0 where they don't bend up."""
    (a, at_a), (b, at_b), (c, at_c) = points
    return max(2 * ((at_c - at_b) / (c - b) - (at_b - at_a) / (b - a)) / (c - a), 0.0)


# --- presets ---

_TABLE = "aiconfigurator.csv"
_LINEAR = {
    "instant": LinearTiming(0, 0, 0, 0, 0, 0),
    "smollm2-135m-cpu": LinearTiming(0, 1.73, 0, 39, 5.2, 0.03),
    "opt-13b-a100-tp1": LinearTiming(18.10, 0.1019, 2 * 7.12e-6, 19.93, 0.0385, 6.27e-4),
    "opt-66b-a100-tp4": LinearTiming(29.44, 0.1514, 2 * 8.32e-6, 30.76, 0.0633, 4.52e-4),
    "llama-3.1-8b-fp8-h200-dynamo": LinearTiming(
        -1.6052173948657709, 0.022118130615323812, 0, 6.0904352718140125, 0.02032727557313175, 2.9340454713255832e-05
    ),
}
"""smollm2-135m-cpu: bf16 on one AVX512-bf16 core, a fit over contexts of 128 and 512 and batches of 1 to 16. The OPT
fits are those of DistServe's simulator (github.com/LLMServe/DistServe, simdistserve; A100-80G, batches below 95);
its prefill term is per squared length, which is two pairs. llama-3.1-8b-fp8-h200-dynamo: what NVIDIA Dynamo's replay
makes of the profile H200_TP1P_TP1D that its wheel carries (github.com/ai-dynamo/dynamo, Apache-2.0, version 1.4.2): its
converter fits these very laws, so the coefficients are its table to 11 digits. It has no term for attention."""


def load_table(source: Path | Traversable, model: str, system: str, tp: int) -> TableTiming:
    """Points of one deployment from a CSV with columns model, system, tp, phase (prefill or decode), batch, tokens, ms;
    lines that start with # are comments. Raises `ConfigError` (key "timing")."""
    points: dict[str, dict[tuple[int, int], float]] = {"prefill": {}, "decode": {}}
    wanted = (model, system, str(tp))
    try:
        for row in _rows(source):
            if (row["model"], row["system"], row["tp"]) == wanted:
                points[row["phase"]][int(row["batch"]), int(row["tokens"])] = float(row["ms"])
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise ConfigError(f"{source} is not a readable timing table: {error}", key="timing") from error
    return TableTiming(points["prefill"], points["decode"])


def _rows(source: Path | Traversable) -> list[dict[str, str]]:
    lines = source.read_text("utf-8").splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


def _builtin_table() -> Traversable:
    return files("pdserve.engine").joinpath("data", _TABLE)


def _table_presets() -> dict[str, tuple[str, str, int]]:
    deployments = {(row["model"], row["system"], int(row["tp"])) for row in _rows(_builtin_table())}
    return {f"{model}-{system}-tp{tp}": (model, system, tp) for model, system, tp in sorted(deployments)}


def preset_names() -> list[str]:
    """What `timing_preset` accepts."""
    return [*_LINEAR, *_table_presets()]


def timing_preset(name: str) -> TimingModel:
    """A ready timing model, such as "instant" or "llama-3.1-8b-h100-tp1". Raises `ConfigError` (key "timing")."""
    if name in _LINEAR:
        return _LINEAR[name]
    presets = _table_presets()
    if name not in presets:
        raise ConfigError(f"no timing preset {name!r}; known: {', '.join(preset_names())}", key="timing")
    return load_table(_builtin_table(), *presets[name])
