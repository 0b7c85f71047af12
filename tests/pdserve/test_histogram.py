"""Ours against the Prometheus client's own: equal text for equal observations."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from pdserve.histogram import LoopHistogram

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


def test_labels_must_be_as_many_as_declared():
    histogram = LoopHistogram("h", "Text.", ("one", "two"), CollectorRegistry(), BOUNDS)
    with pytest.raises(ValueError, match="labels"):
        histogram.labels("a")


def test_a_name_is_taken_once():
    registry = CollectorRegistry()
    LoopHistogram("h", "Text.", (), registry, BOUNDS)
    with pytest.raises(ValueError, match="Duplicated"):
        LoopHistogram("h", "Text.", (), registry, BOUNDS)
