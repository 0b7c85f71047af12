"""A link that does not pay is left alone for a while, then tried by one request. Time is moved by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from pdserve.metrics import RouterMetrics
from router.breakers import BreakerRules, LinkBreakers, State
from router.scheduling.links import Links


class Bench:
    def __init__(self, **rules):
        self.now = 0.0
        self.registry = CollectorRegistry()
        self.links = Links()
        given = {"failures": 3, "slow_s": 0.25, "rest_s": 5.0, **rules}
        metrics = RouterMetrics(self.registry)
        self.breakers = LinkBreakers(self.links, BreakerRules(**given), metrics, "m", lambda: self.now)

    def good(self, seconds=0.01):
        self.breakers.arrived("p", "d", 100, seconds, alone_s=0.5)

    def slow(self):
        self.good(seconds=0.8)

    def rest(self, seconds):
        self.now += seconds
        self.breakers.tick()

    @property
    def state(self):
        return self.breakers.state("p", "d")

    @property
    def broken(self):
        return self.links.is_broken("p", "d")


@pytest.mark.parametrize("bad", ["slow", "failed"])
def test_bad_hand_overs_in_a_row_open_the_link(bad):
    bench = Bench()
    for _ in range(3):
        assert not bench.broken
        bench.slow() if bad == "slow" else bench.breakers.failed("p", "d")
    assert bench.broken
    assert not bench.links.is_broken("p", "other")
    labels = {"model_name": "m", "reason": bad}
    assert bench.registry.get_sample_value("pdserve_link_trips_total", labels) == 1
    assert bench.registry.get_sample_value("pdserve_links_open", {"model_name": "m"}) == 1


def test_a_good_one_between_forgives():
    bench = Bench()
    for _ in range(4):
        bench.slow()
        bench.slow()
        bench.good()
    assert not bench.broken


def test_what_computing_would_have_taken_is_not_slow():
    bench = Bench(failures=1)
    bench.good(seconds=0.74)
    assert not bench.broken
    bench.good(seconds=0.76)
    assert bench.broken


def test_a_decode_worker_without_room_is_not_the_links_fault():
    bench = Bench(failures=1)
    bench.breakers.arrived("p", "d", 100, 9.0, alone_s=0.5, queued=True)
    assert not bench.broken
    assert bench.breakers.num_open() == 0


def test_after_a_rest_one_request_tries_it():
    bench = Bench()
    for _ in range(3):
        bench.slow()
    bench.rest(4.9)
    assert bench.broken
    bench.rest(0.2)
    assert not bench.broken
    bench.breakers.bound("p", "d")
    assert bench.broken
    bench.good()
    assert not bench.broken
    assert bench.state is State.CLOSED


def test_a_trial_that_fails_doubles_the_rest():
    bench = Bench()
    for _ in range(3):
        bench.slow()
    for rest in (5, 10, 20, 40, 60, 60):
        bench.rest(rest - 0.1)
        assert bench.broken
        bench.rest(0.2)
        bench.breakers.bound("p", "d")
        bench.slow()
    assert bench.broken


def test_a_trial_that_says_nothing_leaves_the_trial_to_the_next():
    bench = Bench()
    for _ in range(3):
        bench.slow()
    bench.rest(5.1)
    bench.breakers.bound("p", "d")
    bench.breakers.unbound("p", "d")
    assert not bench.broken
    assert bench.state is State.HALF_OPEN


def test_one_that_was_under_way_does_not_close_an_open_link():
    bench = Bench()
    for _ in range(3):
        bench.slow()
    bench.good()
    assert bench.broken


def test_a_worker_that_is_gone_takes_its_links_along():
    bench = Bench()
    for _ in range(3):
        bench.slow()
    bench.breakers.keep({"p"})
    assert not bench.broken
    assert bench.breakers.num_open() == 0


EVENTS = st.lists(st.sampled_from(["good", "slow", "failed", "bound", "unbound", "rest", "keep", "gone"]), max_size=40)


@given(EVENTS)
@settings(max_examples=200, deadline=None)
def test_the_policy_sees_what_the_breaker_means(events):
    bench = Bench()
    for event in events:
        if event in ("good", "slow"):
            getattr(bench, event)()
        elif event == "rest":
            bench.rest(3.0)
        elif event in ("keep", "gone"):
            bench.breakers.keep({"p", "d"} if event == "keep" else {"p"})
        else:
            getattr(bench.breakers, event)("p", "d")
        assert bench.broken == (bench.state in (State.OPEN, State.ON_TRIAL))
    for _ in range(30):
        bench.rest(3.0)
    assert bench.state is not State.OPEN
