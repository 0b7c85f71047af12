"""Many requests that end in all the ways at once, over real workers: the right tokens, and nothing left."""

import asyncio
import random

from pdserve.engine.sim import expected_tokens
from pdserve.engine.timing import LinearTiming
from pdserve.types import Role

QUICK = LinearTiming(0.2, 0, 0, 0.5, 0, 0)


async def test_a_storm_of_requests_cancels_and_stop_strings_leaves_nothing(house, sink, incoming):
    class Leaver(sink):
        limit = None
        handle = None

        def on_tokens(self, choice, text, token_ids, logprobs):
            super().on_tokens(choice, text, token_ids, logprobs)
            if self.limit is not None and sum(map(len, self.token_ids.values())) >= self.limit:
                self.handle.cancel()
                self.over.set()

    rng = random.Random(4)
    for name, role in (("p0", Role.PREFILL), ("p1", Role.PREFILL), ("d0", Role.DECODE), ("d1", Role.DECODE)):
        await house.worker(role, name, timing=QUICK)
    core = await house.core(max_inflight=1000)
    running = []
    for i in range(150):
        got = Leaver()
        got.limit = rng.choice([None, None, 0, 1, 3, 9])
        ask = incoming(
            f"{i} " * rng.randint(1, 120), n=rng.randint(1, 3), max_tokens=rng.randint(1, 24), temperature=1.0,
            stop=(f"w{rng.randint(100, 999)}",) if rng.random() < 0.3 else (), seed=i,
        )  # fmt: skip
        got.handle = core.submit(ask, got)
        if got.limit == 0:
            got.handle.cancel()
            got.over.set()
        running.append(got)
        if i % 7 == 0:
            await asyncio.sleep(0.002)
    for got in running:
        await got.result()
        assert got.error is None
        for choice, token_ids in got.token_ids.items():
            want = expected_tokens(house.sim, got.handle.request, choice)
            assert token_ids == want[: len(token_ids)]
            if choice in got.finishes and not got.handle.request.params.stop:
                assert len(token_ids) == len(want)
    await house.wait_idle()
    assert core.admission.num_inflight == 0
    for link in house.fleets[0].links:
        assert link.num_requests == link.own.num_seqs == link.own.num_context_tokens == 0
        assert not link._lanes
