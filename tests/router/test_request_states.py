"""Any order of events: a request ends once, tells its client once, and leaves nothing behind on either worker."""

import asyncio

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pdserve.errors import Draining, EngineFailed, StaleBlock, WorkerLost
from pdserve.tokens import StopMatcher
from pdserve.types import Finish, FinishReason, ModelInfo, PromptStats, Request, Role, SamplingParams, WorkerInfo
from pdserve.wire.session import Announcement, RouterHello, RouterUpdate, StepColumns
from router.catalog import Record
from router.choice import TextOptions
from router.deadlines import Deadlines
from router.request import ActiveRequest
from router.scheduling.base import Ask, Decision
from router.session import Link
from router.surroundings import Surroundings, Timeouts

STOP_TOKEN, PLAIN_TOKEN = 9, 5


class Clock:
    """An event loop's time and timers, moved by hand."""

    class Timer:
        cancelled = False

        def cancel(self):
            self.cancelled = True

    def __init__(self):
        self.now, self.timers = 100.0, []

    def time(self):
        return self.now

    def call_at(self, when, call):
        timer = self.Timer()
        self.timers.append((when, timer, call))
        return timer

    def advance(self, seconds):
        self.now += seconds
        due = [entry for entry in self.timers if entry[0] <= self.now]
        self.timers = [entry for entry in self.timers if entry[0] > self.now]
        for _, timer, call in sorted(due, key=lambda entry: entry[0]):
            if not timer.cancelled:
                call()


class Text:
    def push(self, token_id):
        return "STOP" if token_id == STOP_TOKEN else "x"

    def push_all(self, token_ids):
        return "".join(map(self.push, token_ids))

    def flush(self):
        return ""


class Stream:
    def cancel(self): ...


class Client:
    """Checks the order of a sink's calls."""

    def __init__(self):
        self.tokens, self.finished, self.done, self.error = {}, set(), False, None

    def on_tokens(self, choice, text, token_ids, logprobs):
        assert not self.done
        assert choice not in self.finished
        self.tokens[choice] = self.tokens.get(choice, 0) + len(token_ids)

    def on_finish(self, choice, reason, stop):
        assert not self.done
        assert choice not in self.finished
        self.finished.add(choice)

    def on_done(self, usage):
        assert not self.done
        assert usage.completion_tokens == sum(self.tokens.values())
        self.done = True

    def on_error(self, error):
        assert not self.done
        assert error.work_done == bool(sum(self.tokens.values()))
        self.done, self.error = True, error


class FakeWorker:
    """What a worker holds of the request, by the messages it would get."""

    def __init__(self, role):
        model = ModelInfo("m", "r", "t", 4096, 100, (0,))
        info = WorkerInfo(role.value, 1, role, "w:1", model, b"f", 16, 1000, 64)
        self.link = Link(info, Stream(), RouterHello("r", 1))
        self.holds, self.index, self.open = False, {}, set()
        self.outputs = None
        self.lost = False

    def read(self):
        """Take what the router has said, as a worker would."""
        update, self.link._pending = self.link._pending, RouterUpdate()
        for submission in update.submissions:
            self.handle, self.n = submission.handle, submission.request.params.n
            self.holds, self.open, self.outputs, self.manifests = True, set(range(self.n)), None, []
            given = submission.request.output_token_ids
            self.base = len(given[0]) if given else 0
            self.index = dict.fromkeys(range(self.n), self.base)
        for relay in update.relays:
            self.manifests += relay.manifests
            if relay.outputs:
                self.outputs = relay.outputs
                self.open -= {i for i, output in enumerate(relay.outputs) if output.finished}
                self.index = dict.fromkeys(self.open, self.base + 1)
        for handle in update.choice_cancels:
            self.open.discard(handle - self.handle)
            self.holds = self.holds and bool(self.open)
        if update.cancels:
            self.holds = False
            self.open = set()

    def give(self, choice, token_id, finish=None):
        handle = self.handle + choice
        finishes = [Finish(handle, finish, self.index[choice] + 1)] if finish else []
        step = StepColumns([handle], [self.index[choice]], (), [token_id], finishes)
        self.index[choice] += 1
        if finish:
            self.open.discard(choice)
        self.link._on_step(step)

    def lose(self):
        self.lost, self.holds, self.open = True, False, set()
        self.link._fail_all("gone")


class Places:
    """Gives a request that lost its workers the same ones again, a tick later."""

    def __init__(self, house):
        self.house, self.due, self.ends = house, [], 0

    def again(self, active):
        self.due.append((self.bind, active))

    def decode_again(self, active):
        self.due.append((self.rebind, active))

    def run(self):
        due, self.due = self.due, []
        for call, active in due:
            if not active.done:
                call(active)

    def rebind(self, active):
        if active.rebinding:
            try:
                active.rebind(Decision(Ask("r", "m", 3, 100), decode=self.house.decode.link))
            except WorkerLost as error:
                active.retry(error)

    def bind(self, active):
        house = self.house
        ask = Ask("r", "m", 3, 100)
        pair = (None if house.alone else house.prefill.link), house.decode.link
        try:
            active.bind(Decision(ask, *pair))
        except WorkerLost as error:
            active.retry(error)

    def prefilled(self, active, stats): ...

    def decoding(self, active): ...

    def failed(self, active, error): ...

    def ended(self, active):
        self.ends += 1


class House:
    def __init__(self, n, alone, stop, retries=0):
        self.clock = Clock()
        self.deadlines = Deadlines(self.clock)
        self.prefill, self.decode = FakeWorker(Role.PREFILL), FakeWorker(Role.DECODE)
        self.workers = (self.prefill, self.decode)
        self.client, self.ends = Client(), []
        params = SamplingParams(n=n, max_tokens=100, seed=1, stop=("STOP",) if stop else ())
        self.places = Places(self)
        timeouts = Timeouts(10, 10, 10)
        around = Surroundings(
            self.clock, self.deadlines, timeouts, self.places, self.ends.append, retries, self.clock.time
        )
        self.active = ActiveRequest(
            Request("r", "m", (1, 2, 3), params), self.client, Text, TextOptions.of(params, False),
            Record("r", "m", "", 0.0), around, self.clock.now,
        )  # fmt: skip
        self.alone = alone
        self.places.bind(self.active)
        self.read()

    def read(self):
        for worker in self.workers:
            worker.read()

    def prefill_gives(self, choice, token_id, finish):
        worker = self.prefill
        if worker.holds and choice in worker.open and worker.index[choice] == worker.base:
            worker.give(choice, token_id, finish)
            if not worker.open:
                worker.holds = False

    def decode_gives(self, choice, token_id, finish):
        worker = self.decode
        if worker.holds and choice in worker.open and (self.alone or worker.outputs):
            self.prefill.holds = False  # it has pulled everything and said so
            worker.give(choice, token_id, finish)
            worker.holds = bool(worker.open)

    def run(self, event):
        kind, choice, flag = event
        choice %= self.active.request.params.n
        token_id = STOP_TOKEN if flag == 1 else PLAIN_TOKEN
        finish = FinishReason.LENGTH if flag == 2 else None
        if kind == "prefill":
            self.prefill_gives(choice, token_id, finish)
        elif kind == "decode":
            self.decode_gives(choice, token_id, finish)
        elif kind == "announce" and self.prefill.holds:
            announcement = Announcement(self.prefill.handle, b"t", (b"m",))
            stats = PromptStats(self.prefill.handle, 3, 1)
            self.prefill.link._on_step(StepColumns([], [], (), [], prompts=[stats], announcements=[announcement]))
        elif kind == "error" and (worker := self.workers[flag % 2]).holds:
            kinds = EngineFailed("broken"), StaleBlock("reused"), Draining("going"), WorkerLost("peer")
            error = Finish(worker.handle + choice, FinishReason.ERROR, 0, error=kinds[(choice + flag) % 4])
            worker.holds, worker.open = False, set()
            worker.link._on_step(StepColumns([], [], (), [], [error]))
        elif kind == "lose" and not (worker := self.workers[flag % 2]).lost:
            worker.lose()
        elif kind == "wait":
            self.clock.advance(11.0)
        elif kind == "cancel":
            self.active.cancel()
        self.read()
        self.places.run()
        self.read()


KINDS = st.sampled_from(["prefill"] * 4 + ["decode"] * 6 + ["announce", "error", "lose", "wait", "cancel"])
EVENTS = st.lists(st.tuples(KINDS, st.integers(0, 2), st.integers(0, 3)), max_size=25)


ONE_STOPS_AT_DECODE = [("prefill", 0, 0), ("prefill", 1, 0), ("decode", 0, 1), ("decode", 1, 2)]
ONE_STOPS_AT_PREFILL = [("prefill", 0, 1), ("prefill", 1, 0), ("decode", 0, 0), ("decode", 1, 2)]


REFUSED_AND_BOUND_ANEW = [("error", 1, 1), ("prefill", 0, 0), ("prefill", 1, 0), ("decode", 0, 2), ("decode", 1, 2)]
LOST_AND_DONE_AGAIN = [("prefill", 0, 0), ("decode", 0, 0), ("error", 0, 1), ("prefill", 0, 0), ("decode", 0, 2)]


@example(n=2, alone=False, stop=True, retries=0, events=ONE_STOPS_AT_DECODE)
@example(n=2, alone=False, stop=True, retries=0, events=ONE_STOPS_AT_PREFILL)
@example(n=2, alone=True, stop=True, retries=0, events=ONE_STOPS_AT_DECODE[2:])
@example(n=1, alone=False, stop=False, retries=2, events=LOST_AND_DONE_AGAIN)
@example(n=2, alone=False, stop=False, retries=2, events=REFUSED_AND_BOUND_ANEW)
@given(n=st.integers(1, 3), alone=st.booleans(), stop=st.booleans(), retries=st.sampled_from([0, 2]), events=EVENTS)
@settings(max_examples=300, deadline=None)
def test_whatever_happens_a_request_ends_once_and_leaves_nothing(n, alone, stop, retries, events):
    async def go():
        house = House(n, alone, stop, retries)
        for event in events:
            house.run(event)
        for _ in range(3):  # silence ends it at the latest
            house.run(("wait", 0, 0))
        return house

    house = asyncio.run(go())
    assert house.active.done
    assert len(house.ends) == house.places.ends == 1
    assert len(house.active.record.attempts) <= retries + 1
    cancelled = house.active.record.outcome == "cancelled"
    assert house.client.done != cancelled
    assert house.client.error is not None or cancelled or len(house.client.finished) == n
    for worker in house.workers:
        assert not worker.holds
        assert worker.link.num_requests == 0
        assert not worker.link._lanes
        own = worker.link.own
        assert (own.num_seqs, own.num_prefill_tokens, own.num_context_tokens) == (0, 0, 0)
    for choice, count in house.client.tokens.items():
        assert count == house.active.choices[choice].num_tokens == len(house.active.choices[choice].token_ids)


def house_without_decode(n=1):
    """Its decode worker is lost, another one is there, and nobody has bound it yet."""
    house = House(n, alone=False, stop=False, retries=1)
    house.decode.lose()
    house.decode = FakeWorker(Role.DECODE)
    house.workers = (house.prefill, house.decode)
    return house


def announce(house):
    announcement = Announcement(house.prefill.handle, b"t", (b"m",))
    house.prefill.link._on_step(StepColumns([], [], (), [], announcements=[announcement]))


def test_what_prefill_says_meanwhile_reaches_the_new_decode_worker():
    async def go():
        house = house_without_decode()
        announce(house)
        house.prefill_gives(0, PLAIN_TOKEN, None)
        announce(house)
        house.places.run()
        house.read()
        assert house.decode.manifests == [b"m", b"m"]
        assert [output.token_ids for output in house.decode.outputs] == [(PLAIN_TOKEN,)]
        announce(house)
        house.read()
        assert len(house.decode.manifests) == 3
        house.decode_gives(0, PLAIN_TOKEN, FinishReason.LENGTH)
        return house

    house = asyncio.run(go())
    assert house.client.done
    assert house.client.error is None
    assert house.client.tokens == {0: 2}
    assert len(house.active.record.attempts) == 1


def test_a_first_token_that_went_to_a_lost_decode_worker_is_told_the_next_one_too():
    """A prompt of one chunk may be through before anything of it is announced."""

    async def go():
        house = House(1, alone=False, stop=False, retries=1)
        house.prefill_gives(0, PLAIN_TOKEN, None)
        house.read()
        house.decode.lose()
        house.decode = FakeWorker(Role.DECODE)
        house.workers = (house.prefill, house.decode)
        assert house.active.rebinding
        house.places.run()
        announce(house)
        house.read()
        assert [output.token_ids for output in house.decode.outputs] == [(PLAIN_TOKEN,)]
        house.decode_gives(0, PLAIN_TOKEN, FinishReason.LENGTH)
        return house

    house = asyncio.run(go())
    assert (house.client.done, house.client.error, house.client.tokens) == (True, None, {0: 2})


def test_a_client_that_cannot_be_told_its_error_costs_nobody_else():
    async def go():
        house, faults = House(1, alone=False, stop=False), []
        house.clock.call_exception_handler = faults.append
        house.client.on_error = lambda error: 1 / 0
        other = House(1, alone=False, stop=False)
        for leg in house.prefill.link._legs.values():
            other.prefill.link._legs = {1000: leg} | other.prefill.link._legs
        other.prefill.lose()
        return house, other, faults

    house, other, faults = asyncio.run(go())
    assert house.active.done
    assert len(house.ends) == 1
    assert other.client.error.reason == "worker_lost"
    assert len(faults) == 1


def test_prefill_may_be_lost_while_a_decode_worker_is_looked_for():
    async def go():
        house = house_without_decode()
        announce(house)
        house.prefill.lose()
        house.prefill = FakeWorker(Role.PREFILL)
        house.workers = (house.prefill, house.decode)
        house.places.run()
        house.read()
        assert house.decode.manifests == []  # those of the lost ticket are void
        announce(house)
        house.prefill_gives(0, PLAIN_TOKEN, None)
        house.read()
        assert house.decode.manifests == [b"m"]
        house.decode_gives(0, PLAIN_TOKEN, FinishReason.LENGTH)
        return house

    house = asyncio.run(go())
    assert house.client.error is None
    assert [attempt.outcome for attempt in house.active.record.attempts] == ["worker_lost", "ok"]


def test_once_something_was_handed_over_a_lost_decode_means_to_start_anew():
    async def go():
        house = House(1, alone=False, stop=False, retries=1)
        announce(house)
        house.read()
        house.decode.lose()
        assert not house.active.rebinding
        assert not house.prefill.link.num_requests
        house.decode = FakeWorker(Role.DECODE)
        house.places.run()
        return house

    house = asyncio.run(go())
    assert len(house.active.record.attempts) == 2


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("last", ["length", "stop"])
def test_a_worker_lost_after_the_last_token_and_before_the_word_of_it_costs_nothing(n, last):
    async def go():
        house = House(n, alone=False, stop=False, retries=2)
        for choice in range(n):
            house.prefill_gives(choice, PLAIN_TOKEN, None)
        house.read()
        for _ in range(98 if last == "length" else 1):
            for choice in range(n):
                house.decode_gives(choice, PLAIN_TOKEN, None)
        for choice in range(n):
            house.decode_gives(choice, 0 if last == "stop" else PLAIN_TOKEN, None)
        assert not house.client.done
        house.decode.lose()
        house.places.run()
        return house

    house = asyncio.run(go())
    assert (house.client.done, house.client.error) == (True, None)
    assert house.client.tokens == dict.fromkeys(range(n), 100 if last == "length" else 3)
    assert [attempt.outcome for attempt in house.active.record.attempts] == ["ok"]
    assert house.active.record.finish_reasons == (last,) * n


def test_a_client_that_cannot_be_told_its_end_keeps_nobody_on_a_lost_worker_waiting():
    async def go():
        house = House(1, alone=False, stop=False, retries=2)
        house.prefill_gives(0, PLAIN_TOKEN, None)
        house.read()

        def broken(usage):
            raise RuntimeError("the client is gone")

        house.client.on_done = broken
        house.decode_gives(0, 0, None)
        house.decode.lose()  # raises nothing: others on it are told as well
        return house

    house = asyncio.run(go())
    assert house.active.done
    assert house.decode.link.own.num_seqs == 0


def test_a_choice_that_is_not_complete_moves_on_when_its_worker_is_lost():
    async def go():
        house = House(1, alone=False, stop=False, retries=2)
        house.prefill_gives(0, PLAIN_TOKEN, None)
        house.read()
        for _ in range(98):
            house.decode_gives(0, PLAIN_TOKEN, None)
        house.decode.lose()
        return house

    house = asyncio.run(go())
    assert not house.active.done
    assert house.active.waiting


def test_a_clock_that_was_put_off_does_not_fire_at_its_old_time():
    clock = Clock()
    deadlines = Deadlines(clock)

    class Timed:
        deadline = 105.0
        fired = ()

        def on_deadline(self, now):
            self.fired += (now,)
            self.deadline = float("inf")

    first, second = Timed(), Timed()
    deadlines.watch(first)
    second.deadline = 103.0
    deadlines.watch(second)
    first.deadline = 120.0
    clock.advance(6)
    assert (first.fired, second.fired) == ((), (106.0,))
    clock.advance(15)
    assert first.fired == (121.0,)
    assert not clock.timers


def test_what_has_ended_does_not_stay_in_memory_until_its_deadline():
    class Timed:
        deadline = 1e6

        def on_deadline(self, now): ...

    deadlines = Deadlines(Clock())
    stays = Timed()
    deadlines.watch(stays)
    for _ in range(10_000):
        timed = Timed()
        deadlines.watch(timed)
        timed.deadline = float("inf")
        deadlines.ended()
    assert len(deadlines._heap) < 300
    assert any(entry[2] is stays for entry in deadlines._heap)


def test_stop_text_here_is_what_the_matcher_finds():
    assert StopMatcher(("STOP",)).push(Text().push(STOP_TOKEN)) == ("", True)
