"""Request streams to try eviction policies on: a recorded trace, and three seeded ones unlike it and each other.

A stream is a list of (arrival in seconds, block keys of the prompt, first block first). The synthetic ones last about
an hour of virtual time and touch some 300,000 blocks, so that pools of 1M to 30M tokens of 512-token blocks range from
far too small to nearly enough.
"""

from __future__ import annotations

import json
from bisect import bisect
from collections.abc import Callable, Sequence
from itertools import accumulate, count
from pathlib import Path
from random import Random
from typing import NamedTuple

from kvstore.eviction.base import Key
from pdserve.errors import InvalidRequest, NotFound

BLOCK_TOKENS = 512
"""Of the Mooncake traces' `hash_ids`; the synthetic streams use it too."""
_HOUR_S = 3600.0


class Request(NamedTuple):
    arrival_s: float
    keys: list[Key]


def read_trace(path: Path) -> list[Request]:
    """A trace in Mooncake's format: JSON lines with `timestamp` (ms) and `hash_ids` (chained block ids).

    Raises `NotFound` when there is no such file, `InvalidRequest` when a line is not such a record.
    """
    if not path.is_file():
        raise NotFound(f"no trace at {path}: pass --trace PATH (JSON lines with `timestamp` and `hash_ids`)")
    with path.open(encoding="utf-8") as lines:
        return [_record(line, number, path) for number, line in enumerate(lines, start=1) if line.strip()]


def _record(line: str, number: int, path: Path) -> Request:
    try:
        record = json.loads(line)
        keys = [_key(int(block)) for block in record["hash_ids"]]
        if len(set(keys)) < len(keys):
            raise ValueError("a block comes twice in one prompt")
        return Request(record["timestamp"] / 1000, keys)
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise InvalidRequest(
            f"{path}, line {number}: want an object with `timestamp` (ms) and `hash_ids` (integers >= 0): {error!r}"
        ) from error


def _key(number: int) -> Key:
    return number.to_bytes(16, "little")


class _Blocks:
    """New, distinct keys."""

    def __init__(self) -> None:
        self._numbers = count()

    def take(self, amount: int) -> list[Key]:
        return [_key(next(self._numbers)) for _ in range(amount)]


class _Popularity:
    """Draws ranks 0..n-1 with probability proportional to 1 / (rank + 1) ** exponent."""

    def __init__(self, items: int, exponent: float) -> None:
        self._sums = list(accumulate((rank + 1) ** -exponent for rank in range(items)))

    def draw(self, rng: Random) -> int:
        return bisect(self._sums, rng.random() * self._sums[-1])


def scans(seed: int = 1) -> list[Request]:
    """Popular documents asked about all the time, and three kinds of sweeps that would flush them.

    Half of the requests read long prompts that never come back; in bursts, as batch jobs do. One batch job is run
    again and again over the same 6,000 blocks.
    """
    rng, blocks = Random(seed), _Blocks()
    documents = [blocks.take(rng.randint(4, 40)) for _ in range(1500)]
    popularity = _Popularity(len(documents), 0.8)
    stream = [
        Request(rng.uniform(0, _HOUR_S), [*documents[popularity.draw(rng)], *blocks.take(1)]) for _ in range(5000)
    ]
    stream += [Request(rng.uniform(0, _HOUR_S), blocks.take(rng.randint(8, 60))) for _ in range(1500)]
    for burst in range(6):
        stream += [Request(burst * 600 + 300 + i * 0.2, blocks.take(rng.randint(8, 120))) for i in range(200)]
    rerun = [blocks.take(60) for _ in range(100)]
    for start in (200.0, 1100.0, 2000.0, 2900.0):
        stream += [Request(start + i * 2.0, chain) for i, chain in enumerate(rerun)]
    return sorted(stream)


def zipf(seed: int = 2) -> list[Request]:
    """Independent draws of whole documents by popularity: no sessions, no turns; the popular ones change slowly."""
    rng, blocks = Random(seed), _Blocks()
    documents = [blocks.take(rng.randint(1, 24)) for _ in range(12_000)]
    popularity = _Popularity(len(documents), 0.9)
    stream = []
    for number in range(24_000):
        if number % 20 == 0:
            documents[popularity.draw(rng)] = blocks.take(rng.randint(1, 24))
        stream.append(Request(number * _HOUR_S / 24_000, documents[popularity.draw(rng)]))
    return stream


def agents(seed: int = 3) -> list[Request]:
    """Agents with long shared prompts: short gaps between tool calls, many steps, sub-agents that branch off."""
    rng, blocks = Random(seed), _Blocks()
    prompts = [_family(rng, blocks) for _ in range(12)]
    popularity = _Popularity(len(prompts), 1.0)
    stream: list[Request] = []
    for _ in range(1000):
        shared = rng.choice(prompts[popularity.draw(rng)])
        _session(stream, rng, blocks, rng.uniform(0, _HOUR_S), shared, rng.randint(1, 12))
    return sorted(stream)


def _family(rng: Random, blocks: _Blocks) -> list[list[Key]]:
    """An agent's system prompt, with each of its tool sets."""
    system = blocks.take(rng.randint(10, 40))
    return [system + blocks.take(rng.randint(2, 20)) for _ in range(rng.randint(1, 5))]


def _session(stream: list[Request], rng: Random, blocks: _Blocks, now: float, chain: list[Key], steps: int) -> None:
    for step in range(steps):
        chain = chain + blocks.take(rng.randint(1, 12))
        stream.append(Request(now, chain))
        if steps > 6 and step == steps // 2:
            _session(stream, rng, blocks, now + 1.0, chain, rng.randint(2, 6))
        waits_for_a_person = rng.random() < 0.1
        now += rng.lognormvariate(5.0, 0.8) if waits_for_a_person else rng.lognormvariate(1.8, 0.8)


SYNTHETIC: dict[str, Callable[[], list[Request]]] = {"scans": scans, "zipf": zipf, "agents": agents}


def block_count(stream: Sequence[Request]) -> int:
    return sum(len(request.keys) for request in stream)
