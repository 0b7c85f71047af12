"""The embedded model's KV through a real store: a prefix that another process computed gives the same tokens."""

from __future__ import annotations

import pytest
from session_client import PairRequest, RouterSession
from worker_pair import until
from worker_process import worker_process
from worker_stores import run, store_of

from pdserve.types import Phase, Request, SamplingParams

pytestmark = pytest.mark.torch_model
BLOCK_BYTES = 16 * 30 * 2 * 3 * 64 * 4
"""fp32: tokens, layers, K and V, heads, their size."""


async def test_torch_workers_go_on_from_what_another_one_stored() -> None:
    async with store_of(block_bytes=BLOCK_BYTES, num_blocks=256) as store:
        config = {"engine": "torch", "dtype": "fp32", "num_blocks": 128, "chunk_tokens": 100, "store": store.address}
        config["store_fetch"] = "always"
        async with worker_process("prefill", **config) as p, worker_process("decode", **config) as d:
            prefill, decode = await RouterSession.open(p.address), await RouterSession.open(d.address)
            await until(lambda: len(store.parts.sessions) == 2)
            name = prefill.hello.worker.model.name
            prompt = tuple(1000 + (37 * i) % 9000 for i in range(250))
            params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
            first = Request("first", name, prompt, params)
            tokens = await PairRequest(prefill, decode, first).start().result()
            await until(lambda: len(store.parts.dram.entries) == 289 // 16)

            second = Request(
                "second", name, (*prompt, *tokens, 77, 78, 79), SamplingParams(temperature=0.0, max_tokens=8)
            )
            answer = await run(prefill, second)
            assert answer.cached == 288
            assert answer.fetched == 288 - 240, "what decode generated"
            fresh_root = Request("alone", name, second.prompt_token_ids, second.params, cache_root=b"no such cache..!")
            alone = await run(decode, fresh_root, Phase.FULL)
            assert alone.cached == 0
            assert answer.tokens == alone.tokens
            await prefill.close()
            await decode.close()
