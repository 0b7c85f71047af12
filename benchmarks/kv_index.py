"""What the KV index costs: look-ups, hashing and matching a prompt, memory an entry, events.

    python benchmarks/kv_index.py --json

One process, one thread; CPU time, not wall time. A million entries of eight nodes, as chains of 512 blocks of 16
tokens; each round measures ours and the limit in turn, figures are medians. The limit is a plain dict from key to a
tuple of (node, tier): no sequence check, no bound, no lease, no sharing of equal place sets. Memory is what the process
grew by (resident set), keys included, each kind built in a process of its own. The first match of a chain also marks
it as used; it is shown apart (`first_match_keys_per_s`).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from kvstore.index.base import NodeSnapshot
from kvstore.index.index import KVIndex
from kvstore.types import EventKind, StoreEvent, Tier
from pdserve.block_keys import block_keys

CHAIN, NODES, BLOCK_TOKENS, PROMPT_TOKENS = 512, 8, 16, 12_000
FINGERPRINT, ROOT = b"benchmark layout", b"benchmark root.."
PlainDict = dict[bytes, tuple[tuple[str, Tier], ...]]


def chains(number: int) -> list[tuple[bytes, ...]]:
    rng = random.Random(7)
    return [tuple(rng.randbytes(16) for _ in range(CHAIN)) for _ in range(number)]


def fresh_index(entries: int) -> KVIndex:
    index = KVIndex(max_entries=2 * entries, lease_s=1e9)
    for node in range(NODES):
        index.load(NodeSnapshot(f"worker-{node}", 1, 0))
    return index


def fill_ours(index: KVIndex, blocks: list[tuple[bytes, ...]]) -> None:
    """One event a chain, from the nodes in turn."""
    for number, keys in enumerate(blocks):
        event = StoreEvent(number // NODES + 1, EventKind.STORED, Tier.HBM, keys, FINGERPRINT)
        index.apply(f"worker-{number % NODES}", 1, [event])


def fill_plain(table: PlainDict, blocks: list[tuple[bytes, ...]]) -> None:
    for number, keys in enumerate(blocks):
        for key in keys:
            table[key] = (*table.get(key, ()), (f"worker-{number % NODES}", Tier.HBM))


def match_plain(table: PlainDict, packed: bytes) -> dict[str, int]:
    """Longest prefix by node."""
    alive, found = None, {}
    for start in range(0, len(packed), 16):
        here = {node for node, _ in table.get(packed[start : start + 16], ())}
        alive = here if alive is None else alive & here
        if not alive:
            break
        found.update(dict.fromkeys(alive, start // 16 + 1))
    return found


def cpu_s(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def memory(kind: str, entries: int, answer: Any) -> None:
    """Runs in a process of its own: resident bytes and CPU seconds of filling."""
    process = psutil.Process()
    rounds = range(0, entries // CHAIN, 64)
    index, table = fresh_index(entries), PlainDict()
    before, spent, sequence = process.memory_info().rss, 0.0, 0
    rng = random.Random(7)
    for _ in rounds:
        part = [tuple(rng.randbytes(16) for _ in range(CHAIN)) for _ in range(64)]
        if kind == "pdserve":
            events = [
                StoreEvent(sequence + n + 1, EventKind.STORED, Tier.HBM, k, FINGERPRINT) for n, k in enumerate(part)
            ]
            sequence += len(part)
            spent += cpu_s(lambda events=events: index.apply("worker-0", 1, events))
        else:
            spent += cpu_s(lambda part=part: fill_plain(table, part))
    held = len(index) + len(table)
    answer.put(
        {"bytes_per_entry": (process.memory_info().rss - before) / held, "entries": held, "blocks_per_s": held / spent}
    )


def measured_apart(kind: str, entries: int) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=memory, args=(kind, entries, answer))
    process.start()
    result: dict[str, float] = answer.get()
    process.join()
    return result


def lookups(entries: int, rounds: int, sample: int = 64) -> dict[str, dict[str, float]]:
    blocks = chains(entries // CHAIN)
    index, table = fresh_index(entries), PlainDict()
    fill_ours(index, blocks)
    fill_plain(table, blocks)
    chosen = [b"".join(keys) for keys in random.Random(1).sample(blocks, min(sample, len(blocks)))]
    assert all(max(r.hbm for r in index.match(c, FINGERPRINT).values()) == CHAIN for c in chosen[:1])
    assert match_plain(table, chosen[0]) == {n: r.hbm for n, r in index.match(chosen[0], FINGERPRINT).items()}
    keys = len(chosen) * CHAIN
    first = keys / cpu_s(lambda: [index.match(c, FINGERPRINT) for c in chosen])
    ours, plain = [], []
    for _ in range(rounds):
        ours.append(keys / cpu_s(lambda: [index.match(c, FINGERPRINT) for c in chosen]))
        plain.append(keys / cpu_s(lambda: [match_plain(table, c) for c in chosen]))
    prompt = prompt_ms(index, rounds)
    return {
        "pdserve": {"keys_per_s": statistics.median(ours), "first_match_keys_per_s": first, **prompt},
        "dict_of_tuples": {"keys_per_s": statistics.median(plain)},
    }


def prompt_ms(index: KVIndex, rounds: int) -> dict[str, float]:
    """A 12,000-token prompt that one node holds in full: hashed and matched."""
    rng = random.Random(3)
    tokens = tuple(rng.randrange(150_000) for _ in range(PROMPT_TOKENS))
    packed = block_keys(ROOT, tokens, BLOCK_TOKENS)
    keys = tuple(packed[at : at + 16] for at in range(0, len(packed), 16))
    _, sequence, _ = index.position("worker-0") or (1, 0, 0)
    index.apply("worker-0", 1, [StoreEvent(sequence + 1, EventKind.STORED, Tier.HBM, keys, FINGERPRINT)])
    times: dict[str, list[float]] = {"hash_ms": [], "match_ms": [], "hash_and_match_ms": []}
    for _ in range(rounds):
        hashing = cpu_s(lambda: [block_keys(ROOT, tokens, BLOCK_TOKENS) for _ in range(20)]) * 50
        matching = cpu_s(lambda: [index.match(packed, FINGERPRINT) for _ in range(20)]) * 50
        for name, value in zip(times, (hashing, matching, hashing + matching), strict=True):
            times[name].append(value)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=1 << 20)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="a tenth of the entries, 3 rounds")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    entries, rounds = (options.entries // 10, 3) if options.quick else (options.entries, options.rounds)
    result = lookups(entries, rounds)
    for kind in result:
        result[kind] |= measured_apart(kind, entries)
    if options.json:
        print(json.dumps(result))
        return
    for kind, figures in result.items():
        print(kind, *(f"\n  {name:24} {value:14,.2f}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
