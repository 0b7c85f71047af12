"""Requests through real prefill and decode workers with the sim engine."""

from pdserve.engine.sim import expected_tokens
from pdserve.types import FinishReason


async def test_tokens_through_prefill_and_decode_are_those_of_the_model(house, sink, incoming):
    await house.pair()
    core = await house.core()
    got = sink()
    handle = core.submit(incoming("x" * 150, max_tokens=20), got)
    await got.result()
    assert got.error is None
    assert got.token_ids[0] == expected_tokens(house.sim, handle.request)
    assert got.texts[0] == house.tokenizer.decode(got.token_ids[0])
    assert got.finishes[0] == (FinishReason.LENGTH, None)
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (150, 20)
