"""Workers of one or more nodes, each node with a real store in the test's own loop."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from session_client import RouterSession
from worker_pair import MODEL, running, until

from kvstore.node.process import NodeStore
from pdserve.rpc import Tls
from pdserve.types import Phase, Request, Role, SamplingParams
from pdserve.wire.session import RouterUpdate, Submission
from worker_core.worker import EngineBuilder, Worker

sys.path.insert(0, str(Path(__file__).parent.parent / "kvstore" / "node"))
from node_tools import running_store

BLOCK_TOKENS = 16
SIM_BLOCK_BYTES = 256


def store_of(**overrides: object):
    return running_store(**{"block_bytes": SIM_BLOCK_BYTES, "num_blocks": 1024, **overrides})


@dataclass
class Node:
    """A store, workers that use it, and a router's session with each."""

    store: NodeStore
    workers: list[Worker] = field(default_factory=list)
    routers: list[RouterSession] = field(default_factory=list)

    async def stored(self, num_blocks: int) -> None:
        await until(lambda: len(self.store.parts.dram.entries) >= num_blocks)

    async def run(self, worker: int, request: Request, phase: Phase = Phase.FULL, prefix_store: str = "") -> Answer:
        return await run(self.routers[worker], request, phase, prefix_store)


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    cached: int
    fetched: int


async def run(router: RouterSession, request: Request, phase: Phase = Phase.FULL, prefix_store: str = "") -> Answer:
    reply = router.expect(request.params.n)
    router.send(RouterUpdate(submissions=[Submission(reply.handle, phase, request, prefix_store=prefix_store)]))
    tokens = await reply.result()
    return Answer(tokens, reply.prompt.num_cached_tokens, reply.prompt.num_fetched_tokens)


@asynccontextmanager
async def running_node(
    workers: int = 2, store: dict[str, object] | None = None, **overrides: object
) -> AsyncIterator[Node]:
    async with store_of(**(store or {})) as kvstore, joined(kvstore, workers, **overrides) as node:
        yield node


@asynccontextmanager
async def joined(
    kvstore: NodeStore,
    workers: int = 1,
    build: EngineBuilder | None = None,
    router_tls: Tls | None = None,
    **overrides: object,
) -> AsyncIterator[Node]:
    """Workers that use a store."""
    node = Node(kvstore)
    overrides = {"store": kvstore.address, "store_fetch": "always", "store_timeout_s": 60.0, **overrides}
    async with AsyncExitStack() as stack:
        for _ in range(workers):
            worker = await stack.enter_async_context(running(Role.PREFILL, build, **overrides))
            router = await RouterSession.open(worker.address, tls=router_tls)
            stack.push_async_callback(router.close)
            await worker.store.link.attached.wait()
            node.workers.append(worker)
            node.routers.append(router)
        yield node


def metric(worker: Worker, name: str, **labels: str) -> float:
    return worker.registry.get_sample_value(name, labels) or 0.0


def turn(before: Request, answer: list[int], more: int, max_tokens: int = 8) -> Request:
    """The next turn of a conversation: everything so far, and `more` new tokens."""
    fresh = tuple(9_000 + 13 * i for i in range(more))
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, seed=1)
    return Request("turn", MODEL, (*before.prompt_token_ids, *answer, *fresh), params)
