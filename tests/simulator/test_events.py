"""The clock and the network of virtual time."""

import pytest

from simulator.events import EventQueue
from simulator.network import Network


def test_events_run_in_order_of_time_then_of_planning():
    queue, seen = EventQueue(), []
    queue.at(2.0, lambda: seen.append(("b", queue.now)))
    queue.at(1.0, lambda: seen.append(("a", queue.now)))
    queue.at(2.0, lambda: seen.append(("c", queue.now)))
    queue.run()
    assert seen == [("a", 1.0), ("b", 2.0), ("c", 2.0)]


def test_a_past_time_counts_as_now_and_soon_runs_within_the_instant():
    queue, seen = EventQueue(), []
    queue.at(3.0, lambda: (queue.at(1.0, lambda: seen.append(queue.now)), queue.soon(lambda: seen.append("soon"))))
    queue.at(3.0, lambda: seen.append("same instant"))
    queue.run()
    assert seen == ["same instant", 3.0, "soon"]


def test_a_cancelled_event_does_not_run_and_run_until_stops_the_clock():
    queue, seen = EventQueue(), []
    queue.at(1.0, lambda: seen.append(1)).cancel()
    queue.at(5.0, lambda: seen.append(5))
    queue.run(until_s=2.0)
    assert (seen, queue.now) == ([], 2.0)
    queue.run()
    assert seen == [5]


def arrivals(network, queue, transfers):
    """When each of (start, source, target, bytes) is there."""
    ends = {}
    for name, (start, source, target, size) in transfers.items():
        queue.at(
            start,
            lambda name=name, source=source, target=target, size=size: network.send(
                source, target, size, lambda: ends.__setitem__(name, queue.now)
            ),
        )
    queue.run()
    return ends


def test_transfers_share_a_port_and_speed_up_when_one_has_ended():
    queue = EventQueue()
    ends = arrivals(Network(queue, rate=10.0), queue, {"a": (0.0, "p", "d", 20.0), "b": (0.0, "q", "d", 40.0)})
    assert ends == {"a": pytest.approx(4.0), "b": pytest.approx(6.0)}  # 5 a second each, then 10


def test_transfers_between_other_ports_do_not_disturb_each_other():
    queue = EventQueue()
    ends = arrivals(Network(queue, 10.0), queue, {"a": (0.0, "p", "d", 20.0), "b": (0.0, "q", "e", 20.0)})
    assert ends == {"a": pytest.approx(2.0), "b": pytest.approx(2.0)}


def test_a_late_comer_slows_down_what_is_under_way():
    queue = EventQueue()
    ends = arrivals(Network(queue, 10.0), queue, {"a": (0.0, "p", "d", 20.0), "b": (1.0, "p", "e", 10.0)})
    assert ends == {"a": pytest.approx(3.0), "b": pytest.approx(3.0)}


def test_latency_is_paid_once_and_a_slow_port_binds():
    queue = EventQueue()
    network = Network(queue, 10.0, latency_s=0.5, ports={"slow": 1.0})
    assert arrivals(network, queue, {"a": (0.0, "p", "slow", 4.0), "none": (0.0, "p", "d", 0.0)})["a"] == 4.5


def test_bytes_are_conserved_whatever_the_order():
    queue = EventQueue()
    network = Network(queue, 7.0)
    transfers = {i: (i * 0.3, f"p{i % 3}", f"d{i % 2}", 5.0 + i) for i in range(30)}
    ends = arrivals(network, queue, transfers)
    assert len(ends) == 30
    assert network.bytes_moved == sum(each[3] for each in transfers.values())
    busiest = sum(each[3] for each in transfers.values() if each[2] == "d0")
    assert max(ends.values()) >= busiest / 7.0 - 1e-9
