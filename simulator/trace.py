"""Requests to replay: Mooncake's published traces (github.com/kvcache-ai/Mooncake, Apache-2.0), and made-up ones alike.

A trace line has `timestamp` (ms), `input_length`, `output_length` and `hash_ids`, one for each block of the prompt, the
last one partial; equal ids mean equal prefixes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pdserve.block_keys import KEY_BYTES

BLOCK_TOKENS = 512
"""Of Mooncake's traces."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request. `keys`: packed, one for each full block of the prompt."""

    at_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    keys: bytes
    session: str = ""


def read_mooncake(path: Path, limit: int | None = None) -> list[TraceRequest]:
    """The first `limit` requests (None: all) of a trace file. Raises `OSError`, `ValueError`, `KeyError`."""
    with path.open(encoding="utf-8") as lines:
        return [_request(json.loads(line)) for line in islice(lines, limit)]


def _request(line: dict[str, object]) -> TraceRequest:
    prompt, output, hashes = line["input_length"], line["output_length"], line["hash_ids"]
    at_ms = line["timestamp"]
    if not (isinstance(prompt, int) and isinstance(output, int) and isinstance(hashes, list)):
        raise ValueError("a trace line needs input_length, output_length and hash_ids")
    if not isinstance(at_ms, int | float):
        raise ValueError("a trace line needs a timestamp in ms")
    return TraceRequest(at_ms / 1000, prompt, output, pack(hashes[: prompt // BLOCK_TOKENS]))


def pack(hash_ids: Sequence[int]) -> bytes:
    """A trace's ids as block keys."""
    return b"".join(number.to_bytes(KEY_BYTES, "big") for number in hash_ids)


def conversations(seed: int, num_requests: int, *, rate: float = 3.4, again: float = 0.45) -> list[TraceRequest]:
    """Made-up traffic of the same kind: bursts every three seconds; a request is the next turn of an earlier
    conversation with probability `again`, some minutes after it; block 0 is common to all."""
    rng = random.Random(seed)
    return list(_conversations(rng, num_requests, rate, again))


def _conversations(rng: random.Random, count: int, rate: float, again: float) -> Iterator[TraceRequest]:
    histories: list[tuple[float, list[int], int]] = []
    next_id, at_s = 1, 0.0
    for _ in range(count):
        if rng.random() < 1 / (3 * rate):
            at_s += 3.0
        ready = [index for index, (ended, _, _) in enumerate(histories) if ended + 30 < at_s]
        blocks, length, turn = [0], BLOCK_TOKENS, 0
        if ready and rng.random() < again:
            turn = rng.choice(ready[-64:])
            _, blocks, length = histories.pop(turn)
            blocks = list(blocks)
        length += rng.randint(200, 12_000)
        output = rng.randint(5, 600)
        num_new = length // BLOCK_TOKENS - len(blocks)
        blocks += range(next_id, next_id + num_new)
        next_id += num_new
        yield TraceRequest(at_s, length, output, pack(blocks))
        histories.append((at_s, blocks, length + output))
