"""The index for Prometheus: its plain counters are read when scraped, so nothing is counted twice on the hot path."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from kvstore.index.index import KVIndex
from kvstore.index.nodes import State

_TEXTS = {
    "events": "Events applied.",
    "duplicates": "Events that were known already.",
    "stale": "Events of older incarnations.",
    "gaps": "Times that a node's events were not in sequence.",
    "restarts": "New incarnations of known nodes.",
    "snapshots": "Snapshots loaded.",
    "evicted": "Entries that left because the index was full.",
    "expired_nodes": "Nodes whose lease ran out.",
    "distrusted_nodes": "Nodes that the audit aged out.",
    "failures": "Ticks in which Redis failed.",
    "events_written": "Events written to Redis.",
    "publications": "Nodes written to Redis in full.",
    "overflows": "Times that a node's unwritten events were dropped.",
    "nodes_read": "Nodes taken over from Redis.",
    "malformed": "Nodes whose copy in Redis was not in our form.",
}


class IndexCollector(Collector):
    """Register it once: `registry.register(IndexCollector(index))`. `mirror`: a `RedisIndex`, if there is one."""

    def __init__(self, index: KVIndex, mirror: Any = None) -> None:
        # Any: the mirror's module imports redis, which is optional.
        self._index, self._mirror = index, mirror

    def collect(self) -> Iterator[Metric]:
        index, mirror = self._index, self._mirror
        yield _gauge("entries", "Block keys held.", len(index))
        yield _gauge("max_entries", "Block keys that it may hold.", index.max_entries)
        nodes, states = (
            GaugeMetricFamily("pdserve_kvindex_nodes", "Nodes, by state.", labels=["state"]),
            index.num_nodes(),
        )
        for state in State:
            nodes.add_metric([state.value], states[state])
        yield nodes
        yield from _counters("", index.counts)
        if mirror is not None:
            yield _gauge("redis_degraded", "1 while Redis does not answer; the index goes on locally.", mirror.degraded)
            yield from _counters("redis_", mirror.counts)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"pdserve_kvindex_{name}", text, value=float(value))


def _counters(prefix: str, counts: Any) -> Iterator[Metric]:
    for one in fields(counts):
        yield CounterMetricFamily(
            f"pdserve_kvindex_{prefix}{one.name}", _TEXTS[one.name], value=getattr(counts, one.name)
        )
