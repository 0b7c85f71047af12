"""The router in virtual time: the serving policy and prefix index, driven as `router.core` drives them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvstore.index.base import NodeReach
from kvstore.index.index import KVIndex
from pdserve.types import CacheDelta, PromptStats, Request, SamplingParams
from router.caches import WorkerCaches
from router.scheduling.base import Ask, Decision, Policy
from simulator.events import Event, EventQueue
from simulator.report import Outcome
from simulator.store import NodeStore
from simulator.trace import TraceRequest
from simulator.worker import SimWorker

CACHE_TICK_S = 10.0
"""A third of the lease that the index gives a worker's cache."""


class Served:
    """A request on its way: implements `simulator.worker.Listener`."""

    def __init__(self, router: SimRouter, ask: Ask, request: Request, outcome: Outcome) -> None:
        self.ask = ask
        self.request = request
        self.outcome = outcome
        self._router = router

    def on_prompt(self, stats: PromptStats) -> None:
        self.outcome.first_token_s = self._router.queue.now
        self.outcome.num_cached_tokens = stats.num_cached_tokens
        self.outcome.num_fetched_tokens = stats.num_fetched_tokens
        self._router.prefilled(self)
        if self.outcome.num_output_tokens == 1:
            self.on_end(1)

    def on_decoding(self) -> None:
        self.outcome.decoding_s = self._router.queue.now
        self._router.policy.decoding(self.ask)

    def on_end(self, num_output_tokens: int) -> None:
        if self.outcome.ended_s is None:
            self.outcome.ended_s = self._router.queue.now
            self._router.ended(self, num_output_tokens)


class SimRouter:
    """`disaggregate` False: every worker does whole requests. `stores` are kept alive in the index."""

    def __init__(
        self,
        queue: EventQueue,
        index: KVIndex,
        workers: Sequence[SimWorker],
        policy: Policy[SimWorker],
        *,
        disaggregate: bool = True,
        stores: Sequence[NodeStore] = (),
        on_decision: Callable[[Decision[SimWorker]], None] | None = None,
    ) -> None:
        self.queue = queue
        self.policy = policy
        self.workers = list(workers)
        self.outcomes: list[Outcome] = []
        self.num_active = 0
        self._version = 1
        self._disaggregate = disaggregate
        self._stores = stores
        self._caches = WorkerCaches(index, queue.clock, queue.soon)
        self._served: dict[Ask, Served] = {}
        self._planned = False
        self._wakeup: Event | None = None
        self._ticking = False
        self._on_decision = on_decision
        for worker in workers:
            worker.on_cache = self._caches.add(worker.info).take
            worker.on_cache(CacheDelta(reset=True))

    # ---- requests ----

    def arrive(self, number: int, traced: TraceRequest) -> None:
        """A client's request is here now."""
        model = self.workers[0].info.model.name
        request = Request(
            request_id=str(number),
            model=model,
            prompt_token_ids=(0,) * traced.num_prompt_tokens,
            params=SamplingParams(max_tokens=traced.num_output_tokens, ignore_eos=True),
            block_keys=traced.keys,
        )
        ask = Ask(
            request.request_id,
            model,
            traced.num_prompt_tokens,
            traced.num_output_tokens,
            keys=traced.keys,
            session=traced.session,
            disaggregate=self._disaggregate,
        )
        outcome = Outcome(self.queue.now, traced.num_prompt_tokens, traced.num_output_tokens)
        self.outcomes.append(outcome)
        self._served[ask] = Served(self, ask, request, outcome)
        self.num_active += 1
        self._keep_caches_alive()
        self.policy.enqueue(ask)
        self._decide_soon()

    def prefilled(self, served: Served) -> None:
        outcome = served.outcome
        self.policy.prefilled(served.ask, outcome.num_cached_tokens, outcome.num_fetched_tokens)
        self._decide_soon()

    def ended(self, served: Served, num_output_tokens: int) -> None:
        del self._served[served.ask]
        self.num_active -= 1
        self.policy.ended(served.ask, num_output_tokens)
        self._decide_soon()

    # ---- decisions ----

    def change_workers(self, workers: Sequence[SimWorker]) -> None:
        """The fleet has changed, or one of it drains."""
        self.workers = list(workers)
        self._version += 1
        self._decide_soon()

    def _decide_soon(self) -> None:
        """Once for everything that happens in one instant."""
        if not self._planned:
            self._planned = True
            self.queue.soon(self._decide)

    def _decide(self) -> None:
        self._planned = False
        for decision in self.policy.decide(self.workers, self._version):
            self._carry_out(decision)
        if self._wakeup is not None:
            self._wakeup.cancel()
        at_s = self.policy.next_wakeup()
        self._wakeup = None if at_s is None else self.queue.at(at_s, self._decide_soon)

    def _carry_out(self, decision: Decision[SimWorker]) -> None:
        served = self._served[decision.ask]
        if self._on_decision is not None:
            self._on_decision(decision)
        served.outcome.bound_s = self.queue.now
        served.outcome.predicted_ttft_s = decision.forecast.ttft_s
        prefill, decode = decision.prefill, decision.decode
        if prefill is not None and decode is not None:
            served.outcome.prefill_worker = prefill.info.worker_id
            prefill.submit_pair(served.request, decode, served, decision.prefix_store)
        elif (alone := prefill or decode) is not None:
            served.outcome.prefill_worker = alone.info.worker_id
            served.outcome.alone = True
            alone.submit_full(served.request, served, decision.prefix_store)
        else:
            served.outcome.error = decision.error
            served.on_end(0)

    def _keep_caches_alive(self) -> None:
        if not self._ticking:
            self._ticking = True
            self.queue.after(CACHE_TICK_S, self._tick)

    def _tick(self) -> None:
        self._ticking = False
        self._caches.tick()
        for store in self._stores:
            store.renew()
        if self.num_active:
            self._keep_caches_alive()


class IndexView:
    """A `router.scheduling.base.PrefixView`: stores bear their address as name already."""

    def __init__(self, index: KVIndex) -> None:
        self._index = index

    def match(self, keys: bytes, fingerprint: bytes) -> dict[str, NodeReach]:
        return self._index.match(keys, fingerprint)
