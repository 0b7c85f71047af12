"""What moving KV between two workers costs, as far as this router knows.

Static tiers by topology (same host, same rack or RDMA group, else), corrected by observed transfers, shared among the
transfers that this router has under way on either end, and closed where a breaker has tripped.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from pdserve.types import WorkerInfo

RATE_WEIGHT = 0.2
"""Of the latest transfer in a link's observed rate."""
MAX_LINKS = 65_536
"""Links remembered; workers come and go, so the oldest is forgotten."""


@dataclass(frozen=True, slots=True)
class LinkRates:
    """Bytes a second by tier: one host's shared memory, one rack or RDMA group, anything else; and from a node's DRAM
    or disk to its own device. Defaults: memcpy as measured on a common server, 200 and 100 Gbit/s, PCIe 5, one NVMe."""

    host: float = 10e9
    near: float = 25e9
    far: float = 12.5e9
    dram: float = 50e9
    disk: float = 2e9
    kv_bytes_per_token: int = 131_072
    """Llama-3.1-8B in bf16: 32 layers, 8 KV heads of 128, K and V."""
    latency_s: float = 0.001


Link = tuple[str, str]


class Links:
    """Keyed by (source, target) worker ids; not thread-safe."""

    def __init__(self, rates: LinkRates | None = None) -> None:
        self.rates = rates or LinkRates()
        self._observed: dict[Link, float] = {}
        self._broken: set[Link] = set()
        self._sending: Counter[str] = Counter()
        self._receiving: Counter[str] = Counter()

    # ---- what a breaker says ----

    def trip(self, source: str, target: str) -> None:
        """Nothing is sent over this link until `heal`."""
        self._broken.add((source, target))

    def heal(self, source: str, target: str) -> None:
        self._broken.discard((source, target))

    def is_broken(self, source: str, target: str) -> bool:
        return (source, target) in self._broken

    # ---- what is observed ----

    def observe(self, source: str, target: str, num_tokens: int, seconds: float) -> None:
        """A transfer took so long."""
        if num_tokens <= 0 or seconds <= 0:
            return
        rate = num_tokens * self.rates.kv_bytes_per_token / seconds
        known = self._observed.pop((source, target), rate)
        self._observed[source, target] = known + RATE_WEIGHT * (rate - known)
        while len(self._observed) > MAX_LINKS:
            del self._observed[next(iter(self._observed))]

    def begin(self, source: str, target: str) -> None:
        """A transfer of ours is under way."""
        self._sending[source] += 1
        self._receiving[target] += 1

    def end(self, source: str, target: str) -> None:
        self._sending[source] -= 1
        self._receiving[target] -= 1
        if not self._sending[source]:
            del self._sending[source]
        if not self._receiving[target]:
            del self._receiving[target]

    # ---- what it would cost ----

    def transfer_s(self, source: WorkerInfo, target: WorkerInfo, num_tokens: int) -> float:
        """One more transfer between two workers, next to those of ours that share either end."""
        rate = self._observed.get((source.worker_id, target.worker_id)) or self._static(source, target)
        flows = 1 + max(self._sending[source.worker_id], self._receiving[target.worker_id])
        return self.rates.latency_s + num_tokens * self.rates.kv_bytes_per_token * flows / rate

    def fetch_s(self, num_dram: int, num_disk: int = 0, *, own_node: bool = True) -> float:
        """So many tokens from a store's DRAM and disk: the worker's own node's, or a peer's over the network."""
        rates = self.rates
        dram = rates.dram if own_node else min(rates.far, rates.dram)
        latency = 0.0 if own_node else rates.latency_s
        return latency + (num_dram / dram + num_disk / min(dram, rates.disk)) * rates.kv_bytes_per_token

    def _static(self, source: WorkerInfo, target: WorkerInfo) -> float:
        if source.host_id and source.host_id == target.host_id:
            return self.rates.host
        return self.rates.near if near(source, target) else self.rates.far


NEAR_LABELS = ("node", "rdma", "rack")
"""Labels that put two workers close together when they share the value of one."""


def near(a: WorkerInfo, b: WorkerInfo) -> bool:
    mine = dict(a.labels)
    return any(key in NEAR_LABELS and mine.get(key) == value for key, value in b.labels)
