"""Ours against the Prometheus client's own: equal text for equal observations."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from pdserve.loop_metrics import LoopCounter, LoopHistogram

BOUNDS = (0.001, 0.01, 0.1, 0.5, 1.0, 2.5)
VALUES = st.lists(
    st.tuples(st.sampled_from("ab"), st.one_of(st.sampled_from(BOUNDS), st.floats(0, 10, allow_nan=False))), max_size=50
)


def without_created(text):
    return [line for line in text.decode().splitlines() if "_created" not in line]


@given(VALUES)
@settings(max_examples=100, deadline=None)
def test_the_text_is_what_the_client_writes(values):
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    loop = LoopHistogram("h", "Text.", ("name",), ours, BOUNDS)
    client = Histogram("h", "Text.", ("name",), registry=theirs, buckets=BOUNDS)
    for name, value in values:
        loop.labels(name).observe(value)
        client.labels(name).observe(value)
    assert without_created(generate_latest(ours)) == without_created(generate_latest(theirs))


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 100)), max_size=20))
@settings(max_examples=50, deadline=None)
def test_a_counters_text_is_what_the_client_writes(values):
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    loop, client = LoopCounter("c", "Text.", ("name",), ours), Counter("c", "Text.", ("name",), registry=theirs)
    for name, value in values:
        loop.labels(name).inc(value)
        client.labels(name).inc(value)
    assert without_created(generate_latest(ours)) == without_created(generate_latest(theirs))


def test_labels_must_be_as_many_as_declared():
    histogram = LoopHistogram("h", "Text.", ("one", "two"), CollectorRegistry(), BOUNDS)
    with pytest.raises(ValueError, match="labels"):
        histogram.labels("a")


def test_a_name_is_taken_once():
    registry = CollectorRegistry()
    LoopHistogram("h", "Text.", (), registry, BOUNDS)
    with pytest.raises(ValueError, match="Duplicated"):
        LoopHistogram("h", "Text.", (), registry, BOUNDS)
