"""Workers and their node's store: what one computed, another one need not. The sim engine's tokens follow from every
byte of KV, so a wrong, stale or missing block would show as a wrong token."""

from __future__ import annotations

from store_tools import metric, running_node, turn
from worker_pair import expected, make_request, until_free


async def test_another_worker_computes_only_what_is_new() -> None:
    async with running_node(workers=2) as node:
        first = make_request("a", length=4000, max_tokens=32)
        answer = await node.run(0, first)
        assert (answer.tokens, answer.cached) == (expected(first), 0)
        await node.stored((4000 + len(answer.tokens) - 1) // 16)

        second = turn(first, answer.tokens, more=20)
        again = await node.run(1, second)
        assert again.tokens == expected(second)
        known = (4000 + len(answer.tokens) - 1) // 16 * 16
        assert (again.cached, again.fetched) == (known, known)
        assert metric(node.workers[1], "pdserve_prefix_tokens_total", tier="dram") == known
        assert metric(node.workers[1], "pdserve_store_bytes_total", tier="dram", direction="read") == known * 16
        await until_free(*node.workers)
