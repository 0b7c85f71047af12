"""Bytes between nodes: every port has a rate in each direction, and the transfers that share a port share its rate.

A transfer runs at the smaller of its two ports' fair shares, looked at anew whenever one begins or ends. That is
max-min fairness but for what a transfer leaves unused at one port because the other binds it: never too fast.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from simulator.events import Event, EventQueue


class Transfer:
    """Under way from `source` to `target`."""

    __slots__ = ("at_s", "done", "event", "left", "rate", "source", "target")

    def __init__(self, source: str, target: str, num_bytes: float, done: Callable[[], None]) -> None:
        self.source = source
        self.target = target
        self.left = num_bytes
        self.rate = 0.0
        self.at_s = 0.0
        self.done = done
        self.event: Event | None = None


class Network:
    """`rate`: bytes a second of a port in one direction; `ports` overrides it by name. `latency_s` is paid once."""

    def __init__(
        self, queue: EventQueue, rate: float, latency_s: float = 0.0, ports: dict[str, float] | None = None
    ) -> None:
        self._queue = queue
        self._rate = rate
        self._latency_s = latency_s
        self._ports = ports or {}
        self._sending: Counter[str] = Counter()
        self._receiving: Counter[str] = Counter()
        self._transfers: dict[Transfer, None] = {}
        self.bytes_moved = 0.0

    def set_rate(self, port: str, rate: float) -> None:
        """A port that got slower or faster."""
        self._ports[port] = rate
        self._share_out()

    def send(self, source: str, target: str, num_bytes: float, done: Callable[[], None]) -> None:
        """Calls `done` when all bytes are there."""
        self.bytes_moved += num_bytes
        if self._latency_s:
            self._queue.after(self._latency_s, lambda: self._begin(Transfer(source, target, num_bytes, done)))
        else:
            self._begin(Transfer(source, target, num_bytes, done))

    def _begin(self, transfer: Transfer) -> None:
        self._transfers[transfer] = None
        self._sending[transfer.source] += 1
        self._receiving[transfer.target] += 1
        transfer.at_s = self._queue.now
        self._share_out()

    def _end(self, transfer: Transfer) -> None:
        del self._transfers[transfer]
        self._sending[transfer.source] -= 1
        self._receiving[transfer.target] -= 1
        self._share_out()
        transfer.done()

    def _share_out(self) -> None:
        now = self._queue.now
        for transfer in self._transfers:
            rate = min(
                self._ports.get(transfer.source, self._rate) / self._sending[transfer.source],
                self._ports.get(transfer.target, self._rate) / self._receiving[transfer.target],
            )
            if rate == transfer.rate:
                continue
            transfer.left = max(transfer.left - transfer.rate * (now - transfer.at_s), 0.0)
            transfer.rate, transfer.at_s = rate, now
            if transfer.event is not None:
                transfer.event.cancel()
            delay = transfer.left / rate if transfer.left else 0.0
            transfer.event = self._queue.after(delay, lambda ended=transfer: self._end(ended))  # type: ignore[misc]
