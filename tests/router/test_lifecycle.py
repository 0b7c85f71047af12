"""Ways in which a request can end, and what must be free afterwards. Real workers, sim engine."""

import asyncio
from dataclasses import replace

import pytest

from pdserve.engine.core.config import CoreConfig
from pdserve.engine.sim import SimEngineConfig, expected_tokens
from pdserve.engine.timing import LinearTiming
from pdserve.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    Draining,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    RequestError,
)
from pdserve.types import FinishReason, Grammar, GrammarKind, Role
from router.base import ChatMessage

SLOW_DECODE = LinearTiming(0, 0, 0, 5.0, 0, 0)
"""5 ms a step."""


async def test_every_choice_has_its_own_tokens(house, sink, incoming):
    await house.pair()
    core, got = await house.core(), sink()
    handle = core.submit(incoming("abc" * 30, n=3, max_tokens=12, temperature=1.0, seed=7), got)
    await got.result()
    for choice in range(3):
        assert got.token_ids[choice] == expected_tokens(house.sim, handle.request, choice)
        assert got.finishes[choice] == (FinishReason.LENGTH, None)
    assert len({tuple(ids) for ids in got.token_ids.values()}) == 3
    assert got.usage.completion_tokens == 36
    await house.wait_idle()


async def test_many_requests_at_once_get_their_own_tokens(house, sink, incoming):
    await house.pair()
    await house.worker(Role.PREFILL, "p1")
    await house.worker(Role.DECODE, "d1")
    core = await house.core()
    sinks = [sink() for _ in range(40)]
    handles = [
        core.submit(incoming(f"prompt {i} " * (1 + i % 9), n=1 + i % 3, max_tokens=1 + i % 17, temperature=0.7), got)
        for i, got in enumerate(sinks)
    ]
    for handle, got in zip(handles, sinks, strict=True):
        await got.result()
        assert got.error is None
        for choice in range(handle.request.params.n):
            assert got.token_ids[choice] == expected_tokens(house.sim, handle.request, choice)
    used = {core.catalog.find(handle.request_id).decode_worker for handle in handles}
    assert used == {"d0", "d1", None}
    await house.wait_idle()
    assert all(link.own.num_seqs == link.own.num_context_tokens == 0 for link in house.fleets[0].links)


async def test_one_token_is_prefills_alone(house, sink, incoming):
    await house.pair()
    core, got = await house.core(), sink()
    handle = core.submit(incoming(n=2, max_tokens=1), got)
    await got.result()
    assert got.token_ids[0] == expected_tokens(house.sim, handle.request, 0)
    record = core.catalog.find(handle.request_id)
    assert (record.prefill_worker, record.decode_worker) == ("p0", None)
    await house.wait_idle()


async def test_a_choice_that_prefill_ends_never_reaches_decode(house, sink, incoming):
    """The first token is a stop token: decode's reservation and prefill's exports go at once."""
    await house.pair()
    core, probe = await house.core(), sink()
    core.submit(incoming("stop here", max_tokens=1), probe)
    await probe.result()
    first = probe.token_ids[0][0]
    got = sink()
    core.submit(incoming("stop here", max_tokens=50, stop_token_ids=(first,)), got)
    await got.result()
    assert got.finishes[0] == (FinishReason.STOP, first)
    assert got.texts.get(0, "") == ""
    assert got.usage.completion_tokens == 1
    await house.wait_idle()


async def test_a_choice_that_prefill_ends_does_not_run_on_while_the_others_decode(house, sink, incoming):
    await house.pair()
    core, probe = await house.core(), sink()
    ask = {"n": 2, "temperature": 1.0, "seed": 5}
    core.submit(incoming("abc", max_tokens=1, **ask), probe)
    await probe.result()
    stop = probe.token_ids[0][0]
    assert probe.token_ids[1][0] != stop
    got = sink()
    handle = core.submit(incoming("abc", max_tokens=20, stop_token_ids=(stop,), **ask), got)
    await got.result()
    assert got.token_ids[0] == [stop]
    assert got.token_ids[1] == expected_tokens(house.sim, handle.request, 1)
    decode = house.workers[1].registry
    assert decode.get_sample_value("vllm:generation_tokens_total", {"model_name": "tiny"}) == len(got.token_ids[1]) - 1


async def test_a_stop_string_ends_the_request_on_both_workers(house, sink, incoming):
    await house.pair(SLOW_DECODE)
    core, probe = await house.core(), sink()
    core.submit(incoming("abc", max_tokens=12), probe)
    await probe.result()
    words = probe.texts[0]
    stop = words[len(words) // 2 : len(words) // 2 + 4]
    got = sink()
    core.submit(incoming("abc", max_tokens=1000, stop=(stop,)), got)
    await got.result()
    assert got.texts[0] == words[: words.index(stop)]
    assert got.finishes[0] == (FinishReason.STOP, stop)
    await house.wait_idle()


async def test_a_stop_string_ends_one_choice_and_the_others_go_on(house, sink, incoming):
    await house.pair(SLOW_DECODE)
    core, probe = await house.core(), sink()
    ask = {"n": 2, "max_tokens": 30, "temperature": 1.0, "seed": 5}
    core.submit(incoming("abc", **ask), probe)
    await probe.result()
    stop = probe.texts[0][20:28]
    assert stop not in probe.texts[1]
    got = sink()
    core.submit(incoming("abc", stop=(stop,), **ask), got)
    await got.result()
    assert got.finishes == {0: (FinishReason.STOP, stop), 1: (FinishReason.LENGTH, None)}
    assert got.token_ids[1] == probe.token_ids[1]
    await house.wait_idle()


@pytest.mark.parametrize("when", ["at once", "mid-stream"])
async def test_cancel_frees_both_workers(house, sink, incoming, when):
    await house.pair(SLOW_DECODE)
    core, got = await house.core(), sink()
    handle = core.submit(incoming("x" * 200, n=2, max_tokens=1000), got)
    if when == "mid-stream":
        got.wanted = 5
        await asyncio.wait_for(got.some.wait(), 60)
    handle.cancel()
    handle.cancel()
    await house.wait_idle()
    assert not got.over.is_set()
    assert not got.finishes
    assert core.catalog.find(handle.request_id).outcome == "cancelled"
    assert core.admission.num_inflight == 0


async def test_a_sink_may_cancel_from_within_its_calls(house, sink, incoming):
    class Fickle(sink):
        handle = None

        def on_tokens(self, choice, text, token_ids, logprobs):
            super().on_tokens(choice, text, token_ids, logprobs)
            if len(self.token_ids[choice]) == self.limit:
                self.handle.cancel()
                self.over.set()

    await house.pair()
    core = await house.core()
    for limit in (1, 4):
        got = Fickle()
        got.limit = limit
        got.handle = core.submit(incoming("fickle", max_tokens=50, stop=("zzz",)), got)
        await got.result()
        assert len(got.token_ids[0]) == limit
    await house.wait_idle()


async def test_a_faulty_sink_costs_only_its_own_request(house, sink, incoming):
    class Faulty(sink):
        def on_tokens(self, choice, text, token_ids, logprobs):
            raise RuntimeError("oops")

    await house.pair()
    core, bad, good = await house.core(), Faulty(), sink()
    core.submit(incoming(max_tokens=5), bad)
    handle = core.submit(incoming(max_tokens=5), good)
    await bad.result()
    await good.result()
    assert bad.error.reason == "engine_failed"
    assert bad.error.leg == "router"
    assert good.token_ids[0] == expected_tokens(house.sim, handle.request)


async def test_the_clients_own_timeout_ends_a_request_that_makes_progress(house, sink, incoming):
    await house.pair(SLOW_DECODE)
    core = await house.core()
    for timeout_ms in (150, 1500, 10_000):  # a busy machine may need longer to begin
        got = sink()
        core.submit(incoming(max_tokens=3900, timeout_ms=timeout_ms), got)
        await got.result()
        assert isinstance(got.error, DeadlineExceeded)
        if got.error.work_done:
            break
    assert got.error.work_done
    assert got.token_ids
    await house.wait_idle()


async def test_one_request_too_many_is_told_when_to_come_back(house, sink, incoming):
    await house.pair(SLOW_DECODE)
    core, first = await house.core(max_inflight=1), sink()
    handle = core.submit(incoming(max_tokens=500), first)
    with pytest.raises(Overloaded) as caught:
        core.submit(incoming(), sink())
    assert caught.value.retry_after_s > 0
    handle.cancel()
    got = sink()
    core.submit(incoming(max_tokens=2), got)
    await got.result()
    assert got.error is None


async def test_what_can_be_known_at_once_is_refused_at_once(house, sink, incoming):
    await house.pair()
    core = await house.core(models={"tiny": ("other",)})
    cases = [
        (incoming(model="nope"), ModelNotFound, "model"),
        (incoming("x" * 4096), ContextLengthExceeded, "prompt"),
        (incoming("x" * 4000, max_tokens=97), ContextLengthExceeded, "max_tokens"),
        (incoming("x" * 4000, max_tokens=None, min_tokens=97), InvalidRequest, "min_tokens"),
        (incoming(""), InvalidRequest, "prompt"),
        (incoming(token_ids=()), InvalidRequest, "prompt"),
        (incoming(token_ids=(5, 1024)), InvalidRequest, "prompt"),
        (incoming(token_ids=(5, -1)), InvalidRequest, "prompt"),
        (incoming(logit_bias=((1024, 1.0),)), InvalidRequest, "logit_bias"),
        (incoming(stop_token_ids=(1024,)), InvalidRequest, "stop_token_ids"),
        (incoming(messages=()), InvalidRequest, "messages"),
    ]
    for bad, error, param in cases:
        with pytest.raises(error) as caught:
            core.submit(bad, sink())
        assert caught.value.param == param
    assert core.admission.num_inflight == 0
    with pytest.raises(ContextLengthExceeded, match=r"4096 tokens; 4097 were requested \(4000 in the prompt, 97"):
        core.submit(incoming("x" * 4000, max_tokens=97), sink())


async def test_max_tokens_and_seed_are_filled_in(house, sink, incoming):
    await house.pair()
    core = await house.core(models={"tiny": ("other",)})
    handles = [core.submit(incoming("x" * 4090, max_tokens=None, model="other"), sink()) for _ in range(2)]
    assert [handle.request.params.max_tokens for handle in handles] == [6, 6]
    assert handles[0].request.params.seed != handles[1].request.params.seed
    assert handles[0].request.model == "tiny"
    assert {model.name for model in core.models()} == {"tiny", "other"}


async def test_a_small_kv_pool_bounds_the_context(house, sink, incoming):
    small = SimEngineConfig(core=CoreConfig(num_blocks=8, max_num_seqs=4), model=house.sim.model)
    await house.worker(Role.PREFILL, "p0")
    await house.worker(Role.DECODE, "d0", sim=small)
    core = await house.core()
    with pytest.raises(ContextLengthExceeded, match="128 tokens"):
        core.submit(incoming("x" * 120, max_tokens=9), sink())


async def test_a_request_id_in_use_is_refused(house, sink, incoming):
    await house.pair(SLOW_DECODE)
    core = await house.core()
    handle = core.submit(incoming(max_tokens=500, request_id="same"), sink())
    with pytest.raises(InvalidRequest, match="same") as caught:
        core.submit(incoming(request_id="same"), sink())
    assert caught.value.param == "request_id"
    handle.cancel()
    core.submit(incoming(request_id="same"), sink())


async def test_what_the_engine_refuses_reaches_the_client_typed(house, sink, incoming):
    await house.pair()
    core, got = await house.core(), sink()
    core.submit(incoming(grammar=Grammar(GrammarKind.REGEX, "(")), got)
    await got.result()
    assert isinstance(got.error, RequestError)
    await house.wait_idle()


async def test_without_disaggregation_decode_does_everything(house, sink, incoming):
    await house.worker(Role.DECODE, "d0")
    core, got = await house.core(placement={"disaggregate": "never"}), sink()
    handle = core.submit(incoming("abc" * 40, n=2, max_tokens=9), got)
    await got.result()
    assert got.token_ids[1] == expected_tokens(house.sim, handle.request, 1)
    record = core.catalog.find(handle.request_id)
    assert (record.prefill_worker, record.decode_worker) == (None, "d0")
    await house.wait_idle()


async def test_logprobs_belong_to_their_tokens(house, sink, incoming):
    await house.pair()
    core, got = await house.core(), sink()
    core.submit(incoming("abc" * 20, n=2, max_tokens=10, logprobs=3), got)
    await got.result()
    for choice in range(2):
        assert [entry.index for entry in got.logprobs[choice]] == list(range(10))
        assert [entry.top_ids[0] for entry in got.logprobs[choice]] == got.token_ids[choice]  # greedy


async def test_the_next_turn_reports_cached_tokens(house, sink, incoming):
    await house.pair()
    core = await house.core()
    cached = []
    for _ in range(2):
        got = sink()
        core.submit(incoming("y" * 160, max_tokens=4), got)
        cached.append((await got.result()).usage.cached_tokens)
    assert cached[0] == 0
    assert cached[1] >= 144


async def test_another_tenant_shares_no_cache(house, sink, incoming):
    await house.pair()
    core = await house.core()
    for salt, expected in (("a", 0), ("b", 0), ("a", 144)):
        got = sink()
        core.submit(incoming("y" * 160, max_tokens=4, cache_salt=salt), got)
        assert (await got.result()).usage.cached_tokens >= expected
        assert bool(got.usage.cached_tokens) == bool(expected)


async def test_chat_messages_go_through_the_template(house, sink, incoming):
    await house.pair()
    core, got = await house.core(), sink()
    handle = core.submit(incoming(messages=(ChatMessage("u", "hi"),), max_tokens=2), got)
    await got.result()
    assert house.tokenizer.decode(handle.prompt_token_ids) == "<u>hi<a>"


async def test_drain_refuses_new_requests_and_waits_for_the_old(house, sink, incoming):
    await house.pair(SLOW_DECODE)
    core, got = await house.core(), sink()
    core.submit(incoming(max_tokens=20), got)
    draining = asyncio.ensure_future(core.drain(10))
    await asyncio.sleep(0)
    assert core.ready() == "draining"
    with pytest.raises(Draining):
        core.submit(incoming(), sink())
    assert await draining
    assert got.usage is not None


async def test_what_outlives_the_drain_fails_with_draining(house, sink, incoming):
    await house.pair(SLOW_DECODE)
    core, got = await house.core(), sink()
    core.submit(incoming(max_tokens=3000), got)
    assert not await core.drain(0.02)
    core.close(Draining("gone"))
    assert isinstance(got.error, Draining)
    await house.wait_idle()


async def test_special_tokens_are_text_only_when_asked_for(house, sink, incoming):
    house.sim = replace(house.sim, eos_period=1)
    await house.pair()
    core = await house.core()
    for skip, text in ((True, ""), (False, "<eos>")):
        got = sink()
        core.submit(incoming(skip_special_tokens=skip, include_stop_str_in_output=True), got)
        await got.result()
        assert got.token_ids[0] == [0]
        assert got.texts.get(0, "") == text


async def test_eos_ends_a_choice_without_being_text(house, sink, incoming):
    house.sim = replace(house.sim, eos_period=6)
    await house.pair()
    core, got = await house.core(), sink()
    handle = core.submit(incoming("abc", max_tokens=500, skip_special_tokens=False), got)
    await got.result()
    assert got.token_ids[0] == expected_tokens(house.sim, handle.request)
    assert got.token_ids[0][-1] == 0
    assert "<eos>" not in got.texts[0]
    assert got.finishes[0] == (FinishReason.STOP, None)
