"""Conversations that wander between workers of two nodes whose pools are far too small, with stores that restart and
requests that are cancelled: every token right, and in the end nothing is held."""

from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from session_client import PairRequest
from worker_pair import expected, make_request, sim_builder, until_free
from worker_stores import Node, joined, metric, run, store_of

from kvstore.node.process import NodeStore
from pdserve.engine.core.config import CoreConfig
from pdserve.engine.sim import SimEngineConfig
from pdserve.types import Phase, Request

TINY = SimEngineConfig(core=CoreConfig(num_blocks=96, chunk_tokens=64, max_num_batched_tokens=256, max_num_seqs=8))
DEVICE = SimEngineConfig(core=TINY.core, host_memory=False)
TURNS = 6


@dataclass
class Places:
    """Two nodes; the store of the first one can be restarted."""

    nodes: list[Node]
    stack: AsyncExitStack
    listen: str
    disk: Path
    dice: random.Random

    async def restart_store(self) -> None:
        node = self.nodes[0]
        await node.store.stop()
        node.store = await self.stack.enter_async_context(tiny_store(self.disk, listen=self.listen))

    async def talk(self, number: int) -> None:
        """One conversation: each turn somewhere else, and now and then one that is given up."""
        request = make_request(f"c{number % 3}", length=90 + 7 * (number % 3), max_tokens=20)
        for _ in range(TURNS):
            tokens = await self.answer(request)
            assert tokens == expected(request)
            more = tuple(500 + self.dice.randrange(2) for _ in range(self.dice.choice((3, 20, 40))))
            request = Request("t", request.model, (*request.prompt_token_ids, *tokens, *more), request.params)
            if self.dice.random() < 0.3:
                await self.give_up(request)

    async def answer(self, request: Request) -> list[int]:
        here, there = self.dice.sample(self.nodes, 2)
        router = self.dice.choice(here.routers)
        if self.dice.random() < 0.4:
            decode = self.dice.choice([r for node in self.nodes for r in node.routers if r is not router])
            return await PairRequest(router, decode, request).start().result()
        return (await run(router, request, prefix_store=self.dice.choice(("", there.store.address)))).tokens

    async def give_up(self, request: Request) -> None:
        router = self.dice.choice(self.dice.choice(self.nodes).routers)
        reply = router.submit(request, self.dice.choice((Phase.FULL, Phase.PREFILL)))
        for _ in range(self.dice.randrange(12)):
            await asyncio.sleep(0)
        router.cancel(reply)


def tiny_store(disk: Path, **overrides: object):
    return store_of(num_blocks=48, high_watermark=0.9, low_watermark=0.8, disk={"path": str(disk)}, **overrides)


async def test_conversations_that_wander_over_tiny_pools_stay_right(tmp_path: Path) -> None:
    dice = random.Random(5)
    async with AsyncExitStack() as stack:
        stores: list[NodeStore] = [
            await stack.enter_async_context(tiny_store(tmp_path / str(i), node_id=f"n{i}")) for i in range(2)
        ]
        listen = stores[0].address
        nodes = [
            await stack.enter_async_context(joined(store, 2, build=sim_builder(sim)))
            for store, sim in zip(stores, (TINY, DEVICE), strict=True)
        ]
        places = Places(nodes, stack, listen, tmp_path / "0", dice)
        for _ in range(3):
            talks = asyncio.gather(*(places.talk(number) for number in range(8)))
            await asyncio.sleep(0)
            await places.restart_store()
            await talks
        workers = [worker for node in nodes for worker in node.workers]
        await until_free(*workers)
        fetched = sum(
            metric(worker, "pdserve_prefix_tokens_total", tier=tier) for worker in workers for tier in ("dram", "peer")
        )
        assert fetched > 0
        for node in nodes:
            node.store.parts.dram.check_integrity()
