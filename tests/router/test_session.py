"""The link to one worker: handles, coalescing, splitting, greetings."""

import asyncio

import pytest

from pdserve.errors import WorkerLost
from pdserve.rpc import RpcServer
from pdserve.types import EngineLoad, Finish, FinishReason, ModelInfo, Phase, Request, Role, SamplingParams, WorkerInfo
from pdserve.wire.session import (
    SESSION,
    Relay,
    RouterHello,
    RouterUpdate,
    StepColumns,
    Submission,
    WorkerHello,
    WorkerUpdate,
)
from router.discovery import StaticDiscovery
from router.fleet import Fleet
from router.session import MAX_HANDLE, MAX_MESSAGE_BYTES, HandleSpace, Link, relay_bytes, split, submission_bytes

INFO = WorkerInfo("w", 1, Role.DECODE, "127.0.0.1:1", ModelInfo("m", "r", "t", 4096, 1000, (0,)), b"f", 16, 1000, 64)


class Leg:
    """Keeps what it is told."""

    def __init__(self):
        self.tokens, self.finishes, self.lost = [], [], None

    def lane(self, choice):
        return self

    def take(self, first_index, token_ids, logprobs, finish):
        assert not self.finishes
        self.tokens += token_ids
        if finish:
            self.finishes.append(finish)

    def end(self, finish):
        self.finishes.append(finish)

    def on_prompt(self, stats): ...

    def on_announcement(self, announcement): ...

    def on_lost(self, error):
        self.lost = error


class Script:
    """A worker that greets and then does what the test says, over the real wire."""

    def __init__(self, hello=None):
        self.hello = hello or WorkerHello(INFO)
        self.received: list[RouterUpdate] = []
        self.streams = []
        self.opened = asyncio.Event()
        self.arrived = asyncio.Event()
        self.server = RpcServer("127.0.0.1:0")
        self.server.add(SESSION, self.serve)

    async def start(self):
        self.address = f"127.0.0.1:{await self.server.start()}"
        return self

    async def serve(self, stream):
        self.streams.append(stream)
        await stream.write(WorkerUpdate(hello=self.hello))
        while (update := await stream.read()) is not None:
            self.received.append(update)
            self.opened.set()
            if update.submissions or update.cancels:
                self.arrived.set()


@pytest.fixture
async def script():
    worker = await Script().start()
    yield worker
    await worker.server.stop(0)


@pytest.fixture
async def fleet(script, wait_until):
    fleet = Fleet(StaticDiscovery([script.address]), RouterHello("r", 7), tls=None, max_backoff_s=0.1)
    fleet.start()
    await wait_until(lambda: bool(fleet.links))
    yield fleet
    await fleet.close()


def request(num_tokens=3, n=1):
    return Request("x", "m", (1,) * num_tokens, SamplingParams(n=n, max_tokens=4, seed=1))


def lanes(*handles):
    return dict.fromkeys(handles)


def test_handles_are_consecutive_and_never_zero():
    space = HandleSpace()
    assert [space.take(n, {}) for n in (1, 3, 1)] == [1, 2, 5]


def test_handles_wrap_without_splitting_a_request_and_step_over_those_in_use():
    space = HandleSpace(MAX_HANDLE - 1)
    assert space.take(2, {}) == MAX_HANDLE - 1
    assert space.take(2, lanes(1, 2, 6)) == 3
    assert space.take(2, lanes(6)) == 7
    space = HandleSpace(MAX_HANDLE)
    assert space.take(2, {}) == 1


async def test_what_one_tick_says_is_one_message(fleet, script):
    link = fleet.links[0]
    handles = [link.submit(request(), Phase.DECODE, Leg()) for _ in range(5)]
    for handle in handles[:2]:
        link.relay(handle, ticket=b"t", manifests=(b"m",))
    await asyncio.wait_for(script.arrived.wait(), 60)
    told = [update for update in script.received if not update.hello]
    assert len(told) == 1
    assert [each.handle for each in told[0].submissions] == handles
    assert [each.handle for each in told[0].relays] == handles[:2]
    assert script.received[0].hello.router_id == "r"


async def test_a_request_cancelled_before_it_was_sent_is_never_sent(fleet, script):
    link = fleet.links[0]
    gone, stays = (link.submit(request(), Phase.DECODE, Leg()) for _ in range(2))
    link.relay(gone, ticket=b"t")
    link.cancel(gone)
    await asyncio.wait_for(script.arrived.wait(), 60)
    told = script.received[-1]
    assert [each.handle for each in told.submissions] == [stays]
    assert not told.cancels
    assert not told.relays


async def test_a_cancel_of_a_sent_request_is_told_once(fleet, script):
    link = fleet.links[0]
    handle = link.submit(request(), Phase.DECODE, Leg())
    await asyncio.wait_for(script.arrived.wait(), 60)
    script.arrived.clear()
    link.cancel(handle)
    link.cancel(handle)
    await asyncio.wait_for(script.arrived.wait(), 60)
    assert script.received[-1].cancels == [handle]


async def test_late_messages_for_what_is_gone_are_ignored(fleet, script):
    link, leg = fleet.links[0], Leg()
    handle = link.submit(request(), Phase.DECODE, leg)
    link.cancel(handle)
    link._on_step(StepColumns([handle], [0], (), [5], [Finish(handle, FinishReason.STOP, 1)]))
    assert not leg.tokens
    assert not leg.finishes


async def test_merged_steps_give_the_end_with_the_last_tokens(fleet, script):
    link, leg = fleet.links[0], Leg()
    handle = link.submit(request(), Phase.DECODE, leg)
    finish = Finish(handle, FinishReason.STOP, 4, 8)
    link._on_step(StepColumns([handle, handle], [0, 2], [2, 2], [5, 6, 7, 8], [finish]))
    assert leg.tokens == [5, 6, 7, 8]
    assert leg.finishes == [finish]


async def test_a_lost_stream_fails_its_requests_and_a_new_one_takes_its_place(fleet, script, wait_until):
    link, leg = fleet.links[0], Leg()
    link.submit(request(), Phase.DECODE, leg)
    await asyncio.wait_for(script.arrived.wait(), 60)
    link._stream.cancel()
    await wait_until(lambda: leg.lost is not None)
    assert isinstance(leg.lost, WorkerLost)
    with pytest.raises(WorkerLost):
        link.submit(request(), Phase.DECODE, Leg())
    await wait_until(lambda: bool(fleet.links) and fleet.links[0] is not link)


async def test_what_cannot_be_written_ends_the_stream_and_not_the_session(fleet, script, wait_until):
    link, leg = fleet.links[0], Leg()
    link.submit(request(), Phase.DECODE, leg)
    link._pending.cancels.append(2**40)  # no uint32: the message can't be encoded
    await wait_until(lambda: leg.lost is not None)
    await wait_until(lambda: bool(fleet.links) and fleet.links[0] is not link)


async def test_a_worker_of_a_newer_protocol_only_is_not_used(wait_until):
    script = await Script(WorkerHello(INFO, protocol_min=9, protocol_max=9)).start()
    fleet = Fleet(StaticDiscovery([script.address]), RouterHello("r", 7), tls=None, max_backoff_s=0.05)
    fleet.start()
    await wait_until(lambda: len(script.streams) >= 2)
    assert fleet.links == []
    await fleet.close()
    await script.server.stop(0)


async def test_reports_count_only_what_others_have_put_there():
    link = Link(INFO, None, RouterHello("r", 1))
    link.submit(request(n=2), Phase.DECODE, Leg())
    link.own.num_seqs, link.own.num_context_tokens = 1, 100
    link._on_load(EngineLoad(num_running=3, num_waiting=1, num_free_blocks=900, num_total_blocks=1000))
    assert link.foreign.num_seqs == 3
    assert link.foreign.num_context_tokens == 100 * 16 - 100
    link._on_load(EngineLoad(num_free_blocks=1000, num_total_blocks=1000))
    assert (link.foreign.num_seqs, link.foreign.num_context_tokens) == (0, 0)


def test_a_tick_with_long_prompts_becomes_several_messages():
    submissions = [Submission(i, Phase.PREFILL, request(100_000)) for i in range(7)]
    parts = split(RouterUpdate(submissions=submissions, cancels=[99]))
    assert [each.handle for part in parts for each in part.submissions] == list(range(7))
    assert all(sum(map(submission_bytes, part.submissions)) <= MAX_MESSAGE_BYTES for part in parts)
    assert [part.cancels for part in parts] == [[]] * (len(parts) - 1) + [[99]]


def test_a_prompt_larger_than_a_message_goes_alone():
    submissions = [Submission(i, Phase.PREFILL, request(size)) for i, size in enumerate((10, 400_000, 10))]
    assert [len(part.submissions) for part in split(RouterUpdate(submissions=submissions))] == [1, 1, 1]


class Moving:
    """A discovery whose answer the test changes."""

    def __init__(self, *addresses):
        self.news = asyncio.Queue()
        self.say(*addresses)

    def say(self, *addresses):
        self.news.put_nowait(frozenset(addresses))

    async def watch(self):
        while True:
            yield await self.news.get()


async def test_a_worker_that_discovery_drops_finishes_what_it_has(script, wait_until):
    discovery = Moving(script.address)
    fleet = Fleet(discovery, RouterHello("r", 7), tls=None, max_backoff_s=0.1)
    fleet.start()
    await wait_until(lambda: bool(fleet.links))
    link, leg = fleet.links[0], Leg()
    handle = link.submit(request(), Phase.DECODE, leg)
    discovery.say()
    await wait_until(lambda: link.draining)
    assert fleet.links == [link]
    assert fleet.of_model("m", Role.DECODE) == []
    link.forget(handle)
    await wait_until(lambda: not fleet.links)
    assert leg.lost is None
    discovery.say(script.address)
    await wait_until(lambda: bool(fleet.links))
    assert fleet.links[0] is not link
    await fleet.close()


async def test_an_address_dropped_before_anybody_answered_there_is_forgotten(wait_until):
    discovery = Moving("127.0.0.1:9")
    fleet = Fleet(discovery, RouterHello("r", 7), tls=None, max_backoff_s=0.1)
    fleet.start()
    await wait_until(lambda: bool(fleet._keepers))
    discovery.say()
    await wait_until(lambda: not fleet._keepers and not fleet._retired)
    await fleet.close()


def test_relays_count_towards_a_messages_size():
    relays = [Relay(i, manifests=(bytes(300_000),)) for i in range(7)]
    parts = split(RouterUpdate(submissions=[Submission(0, Phase.DECODE, request())], relays=relays, cancels=[9]))
    assert [each.handle for part in parts for each in part.relays] == list(range(7))
    assert max(sum(map(relay_bytes, part.relays)) for part in parts) <= MAX_MESSAGE_BYTES
    assert parts[0].submissions
    assert parts[-1].cancels == [9]
