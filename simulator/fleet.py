"""A fleet in virtual time, from a description: workers, network, stores, index, policy; and a trace run through it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvstore.eviction import POLICIES
from kvstore.index.index import KVIndex
from pdserve.engine.core.config import CoreConfig
from pdserve.engine.timing import TimingModel
from pdserve.types import ModelInfo, Role, WorkerInfo
from router.scheduling.base import Decision
from router.scheduling.desk import Surroundings
from router.scheduling.forecasts import Predictor
from router.scheduling.links import LinkRates, Links
from router.scheduling.policies import make_policy
from router.scheduling.rules import ConductorRules
from simulator.events import EventQueue
from simulator.network import Network
from simulator.report import Slo, Summary, summarise
from simulator.router import IndexView, SimRouter
from simulator.store import NodeStore
from simulator.trace import BLOCK_TOKENS, TraceRequest
from simulator.worker import Around, SimWorker

MODEL = ModelInfo("simulated", "1", "none", max_model_len=1_000_000, vocab_size=1, eos_token_ids=())
FINGERPRINT = b"simulated-layout"
FREE = 1e15
"""Bytes a second of a link that costs nothing."""
GPUS_A_NODE = 8


@dataclass(frozen=True, slots=True)
class FleetSpec:
    """`num_prefill` 0: aggregated workers, as many as `num_decode`. Rates in bytes a second, in one direction of one
    worker's port. `dram_blocks`: of one prefill worker's share of its node's store; 0: no stores."""

    num_prefill: int
    num_decode: int
    timing: TimingModel
    policy: str = "conductor"
    rules: ConductorRules = field(default_factory=lambda: ConductorRules(lead_s=0.0))
    """No round trip here: an ask is bound when its worker is free."""
    seed: int = 0
    num_blocks: int = 2000
    block_tokens: int = BLOCK_TOKENS
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    cache_policy: str = "hazard"
    dram_blocks: int = 0
    network_rate: float = 50e9
    host_rate: float = 50e9
    num_kv_bytes: int = 131_072
    late_release: bool = False

    @property
    def name(self) -> str:
        return f"{self.num_prefill}P{self.num_decode}D" if self.num_prefill else f"{self.num_decode}A"


class Fleet:
    """Deterministic: the same description and trace give the same outcomes."""

    def __init__(self, spec: FleetSpec, on_decision: Callable[[Decision[SimWorker]], None] | None = None) -> None:
        self.spec = spec
        self.queue = EventQueue()
        self.index = KVIndex(lease_s=30.0, clock=self.queue.clock)
        self.stores: dict[str, NodeStore] = {}
        self._around = Around(
            self.queue,
            Network(self.queue, spec.network_rate),
            Network(self.queue, spec.host_rate),
            self.stores,
            spec.num_kv_bytes,
        )
        self.workers = self._make_workers()
        self._add_stores()
        self.router = SimRouter(
            self.queue,
            self.index,
            self.workers,
            make_policy(spec.policy, self._surroundings(), seed=spec.seed, rules=spec.rules),
            disaggregate=spec.num_prefill > 0,
            stores=list(self.stores.values()),
            on_decision=on_decision,
        )

    def run(self, trace: Sequence[TraceRequest], slo: Slo | None = None) -> Summary:
        """All requests to their end."""
        for number, traced in enumerate(trace):
            self.queue.at(traced.at_s, lambda number=number, traced=traced: self.router.arrive(number, traced))  # type: ignore[misc]
        self.queue.run()
        span_s = max(trace[-1].at_s - trace[0].at_s, 1e-9)
        return summarise(self.router.outcomes, slo or Slo(), span_s, self.spec.num_prefill or self.spec.num_decode)

    def _make_workers(self) -> list[SimWorker]:
        spec = self.spec
        roles = [Role.PREFILL] * spec.num_prefill + [Role.DECODE] * spec.num_decode
        return [self._make_worker(number, role) for number, role in enumerate(roles)]

    def _make_worker(self, number: int, role: Role) -> SimWorker:
        spec, node = self.spec, number // GPUS_A_NODE
        has_store = spec.dram_blocks > 0
        info = WorkerInfo(
            worker_id=f"{role.value[0]}{number}",
            incarnation=1,
            role=role,
            address=f"node{node}:{number}",
            model=MODEL,
            fingerprint=FINGERPRINT,
            block_tokens=spec.block_tokens,
            num_blocks=spec.num_blocks,
            max_num_seqs=spec.max_num_seqs,
            labels=(("rdma", "0"),),
            store_address=f"node{node}:store" if has_store else "",
        )
        config = CoreConfig(
            num_blocks=spec.num_blocks,
            max_num_seqs=spec.max_num_seqs,
            max_num_batched_tokens=spec.max_num_batched_tokens,
            chunk_tokens=spec.max_num_batched_tokens,
            watermark=0.0 if role is Role.PREFILL else 0.01,
        )
        cache_policy = None if spec.cache_policy == "lru" else POLICIES[spec.cache_policy]()
        late = spec.late_release and role is Role.PREFILL
        return SimWorker(info, self._around, config, spec.timing, cache_policy=cache_policy, late_release=late)

    def _add_stores(self) -> None:
        """One a node, of as much DRAM as its prefill workers bring."""
        for worker in self.workers:
            address = worker.info.store_address
            if address and address not in self.stores:
                mine = [each for each in self.workers if each.info.store_address == address]
                num_computing = sum(each.info.role is Role.PREFILL for each in mine) or len(mine)
                blocks = self.spec.dram_blocks * num_computing
                self.stores[address] = NodeStore(address, address, blocks, POLICIES["hazard"](), self.queue, self.index)
                self._around.host_links.set_rate(address, FREE)

    def _surroundings(self) -> Surroundings:
        spec = self.spec
        rates = LinkRates(
            host=spec.network_rate,
            near=spec.network_rate,
            far=spec.network_rate,
            dram=spec.host_rate,
            kv_bytes_per_token=spec.num_kv_bytes,
            latency_s=0.0,
        )
        predictor = Predictor(spec.timing, spec.max_num_batched_tokens)
        return Surroundings(self.queue.clock, predictor, IndexView(self.index), Links(rates), spec.block_tokens)
