"""What the KV store is worth to the second turn of a conversation that comes to another prefill worker.

    python benchmarks/second_turn.py --json

Two clusters of two prefill workers and a decode worker with the embedded model stand side by side: one with a store on
the node, one with none. Each round both have a fresh conversation of `--tokens` tokens, prefilled on the first worker;
then its continuation (the answer and some new tokens) goes to the *other* prefill worker, by a router that knows no
other one. Clusters take turns in changing order. `computed_tokens` is the prompt less what the answer's usage says was
cached; `ttft_ms` runs from the request to the first token at the client. The figure is the ratio of the medians.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from pdserve_cli.client import Answer, stream
from pdserve_cli.cluster import Cluster, ClusterSpec, Member
from pdserve_cli.parity_cases import corpus_tokens
from pdserve_cli.store_calls import stat

OUTPUTS = 32
SETTLE_S = 0.05
QUIET_POLLS = 6
"""So many looks at the store without a change: what was to be stored is stored."""


@dataclass(slots=True)
class Side:
    """One of the two clusters: a router for each of its prefill workers, and what was measured."""

    name: str
    cluster: Cluster
    routers: list[Member] = field(default_factory=list)
    ttft_ms: list[float] = field(default_factory=list)
    first_ttft_ms: list[float] = field(default_factory=list)
    computed_tokens: list[int] = field(default_factory=list)

    async def start(self) -> None:
        await self.cluster.start()
        decode = self.cluster.of_role("decode")
        for member in self.cluster.of_role("prefill"):
            self.routers.append(await self.cluster.start_router(f"router-{member.name}", [member, *decode]))

    async def ask(self, router: int, prompt: Sequence[int]) -> Answer:
        url = f"http://127.0.0.1:{self.routers[router].ready['http_port']}"
        body = {"model": "smollm2-135m", "prompt": list(prompt), "max_tokens": OUTPUTS, "temperature": 0}
        body |= {"ignore_eos": True, "return_token_ids": True}
        return await asyncio.to_thread(stream, url, "/v1/completions", body)

    async def settle(self) -> None:
        """Until the store has all of the first turn; without a store nothing is to be waited for."""
        quiet, before = 0, -1
        while self.cluster.stores and quiet < QUIET_POLLS:
            found = await stat(self.cluster.stores[0])
            now = found.sequence + found.reserved_blocks
            quiet = quiet + 1 if now == before else 0
            before = now
            await asyncio.sleep(SETTLE_S)

    async def conversation(self, prompt: Sequence[int], reply: Sequence[int]) -> None:
        first = await self.ask(0, prompt)
        await self.settle()
        second_prompt = [*prompt, *first.token_ids, *reply]
        second = await self.ask(1, second_prompt)
        cached = (second.usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        self.computed_tokens.append(len(second_prompt) - cached)
        self.first_ttft_ms.append(1000 * (first.ttft_s or 0.0))
        self.ttft_ms.append(1000 * (second.ttft_s or 0.0))


def spec(tokens: int, dtype: str, *, store: bool) -> ClusterSpec:
    """Pools for two conversations: the store's must hold one, whatever the workers keep."""
    blocks = -(-(tokens + 512) // 16)
    worker = {"dtype": dtype, "num_blocks": 2 * blocks}
    router = {"disaggregate": "always", "breaker.slow_ms": 60_000.0}
    return ClusterSpec(prefill=2, worker=worker, router=router, store={"num_blocks": 3 * blocks} if store else None)


async def measure(rounds: int, tokens: int, new_tokens: int, dtype: str, seed: int) -> dict[str, object]:
    rng = random.Random(seed)
    text = corpus_tokens("embedded")
    sides = [Side(name, Cluster(spec(tokens, dtype, store=name == "store"))) for name in ("store", "none")]
    try:
        for side in sides:
            await side.start()
        for number in range(rounds):
            start = rng.randrange(len(text) - tokens)
            reply = [rng.choice(text) for _ in range(new_tokens)]
            for side in sides if number % 2 else sides[::-1]:
                await side.conversation(text[start : start + tokens], reply)
            print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    finally:
        for side in sides:
            await side.cluster.stop()
    return report(sides, rounds, tokens, new_tokens, dtype)


def report(sides: Sequence[Side], rounds: int, tokens: int, new_tokens: int, dtype: str) -> dict[str, object]:
    median = {side.name: statistics.median(side.ttft_ms) for side in sides}
    return {
        "rounds": rounds,
        "first_turn_tokens": tokens,
        "new_tokens": new_tokens,
        "dtype": dtype,
        "load": os.getloadavg()[0],
        "ttft_ms": {name: round(value, 1) for name, value in median.items()},
        "ttft_ms_all": {side.name: [round(value, 1) for value in side.ttft_ms] for side in sides},
        "first_turn_ttft_ms": {side.name: round(statistics.median(side.first_ttft_ms), 1) for side in sides},
        "computed_tokens": {side.name: side.computed_tokens for side in sides},
        "ratio": round(median["none"] / median["store"], 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=4000, help="of the first turn's prompt")
    parser.add_argument("--new-tokens", type=int, default=32, help="that the user adds in the second turn")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = asyncio.run(
        measure(arguments.rounds, arguments.tokens, arguments.new_tokens, arguments.dtype, arguments.seed)
    )
    print(json.dumps(found) if arguments.json else "\n".join(f"{key:<20} {value}" for key, value in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
