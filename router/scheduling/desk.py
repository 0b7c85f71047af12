"""What all policies share: the queue of asks, one `Station` a worker, and the account of what was placed.

A policy that inherits from `Desk` only says what to do with the queue (`_plan`) and which decode worker suits
(`_choose_decode`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic

from pdserve.errors import NoWorker
from pdserve.types import Role
from router.scheduling.base import Ask, Decision, Filter, Need, PrefixView, WorkerT
from router.scheduling.filters import compatible
from router.scheduling.forecasts import Predictor
from router.scheduling.links import Links
from router.scheduling.scheduler import no_worker, refusal
from router.scheduling.stations import Station


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a policy is made from. `clock` is any clock in seconds."""

    clock: Callable[[], float]
    predictor: Predictor
    prefixes: PrefixView
    links: Links
    block_tokens: int


@dataclass(slots=True)
class Bound(Generic[WorkerT]):
    """An ask that was placed and has not ended."""

    prefill: Station[WorkerT] | None
    decode: Station[WorkerT] | None
    prefilled_s: float | None = None
    decoding_s: float | None = None
    itl_s: float = 0.0
    """Predicted, at the worker's pace of then."""


class Desk(ABC, Generic[WorkerT]):
    """Base of the policies; most of `router.scheduling.base.Policy`."""

    standing: tuple[Filter, ...] = ()
    """Filters that look at worker, role and model only."""

    def __init__(self, around: Surroundings, standing: tuple[Filter, ...], half_life_s: float) -> None:
        self.standing = standing
        self._around = around
        self._half_life_s = half_life_s
        self._queue: list[tuple[int, float, int, Ask]] = []
        """(priority, rank, arrival number, ask), the first to be served first."""
        self._queued: dict[Ask, tuple[int, float, int, Ask]] = {}
        self._arrivals = 0
        self._bound: dict[Ask, Bound[WorkerT]] = {}
        self._stations: list[Station[WorkerT]] = []
        self._pools: dict[tuple[Role, str], list[Station[WorkerT]]] = {}
        self._rooms: dict[tuple[Role, str], int] = {}
        self._partners: dict[str, list[Station[WorkerT]]] = {}
        self._stores: frozenset[str] = frozenset()
        self._version = -1

    # ---- the contract ----

    def enqueue(self, ask: Ask) -> None:
        ask.arrived_s = self._around.clock()
        self._arrivals += 1
        entry = (ask.priority, self._rank(ask), self._arrivals, ask)
        insort(self._queue, entry, key=lambda each: each[:3])
        self._queued[ask] = entry

    def decide(self, workers: Sequence[WorkerT], version: int) -> list[Decision[WorkerT]]:
        self._refresh(workers, version)
        return self._plan(self._around.clock()) if self._queue else []

    def next_wakeup(self) -> float | None:
        return None

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    @property
    def stations(self) -> Sequence[Station[WorkerT]]:
        """One a connected worker, as of the last `decide`."""
        return self._stations

    def prefilled(self, ask: Ask, num_cached_tokens: int, num_fetched_tokens: int = 0) -> None:
        bound = self._bound.get(ask)
        if bound is None or bound.prefilled_s is not None:
            return
        now = bound.prefilled_s = self._around.clock()
        station = bound.prefill or bound.decode
        if station is None:
            return
        station.end_prefill(ask, now, self._work_s(ask, num_cached_tokens, num_fetched_tokens))
        if bound.prefill is not None and bound.decode is not None:
            self._around.links.begin(bound.prefill.info.worker_id, bound.decode.info.worker_id)

    def decoding(self, ask: Ask) -> None:
        bound = self._bound.get(ask)
        if bound is None or bound.decoding_s is not None or bound.prefilled_s is None:
            return
        bound.decoding_s = self._around.clock()
        if bound.prefill is not None and bound.decode is not None:
            source, target = bound.prefill.info.worker_id, bound.decode.info.worker_id
            self._around.links.end(source, target)

    def ended(self, ask: Ask, num_output_tokens: int = 0) -> None:
        if (entry := self._queued.pop(ask, None)) is not None:
            self._queue.remove(entry)
            return
        bound = self._bound.pop(ask, None)
        if bound is None:
            return
        now = self._around.clock()
        self._end_legs(ask, bound, now)
        if bound.decode is not None and bound.decoding_s is not None and num_output_tokens > 1:
            observed = (now - bound.decoding_s) / max(num_output_tokens / ask.num_choices - 1, 1)
            bound.decode.decode_pace.observe(bound.itl_s, observed)

    def _end_legs(self, ask: Ask, bound: Bound[WorkerT], now: float) -> None:
        for station in (bound.prefill, bound.decode):
            if station is not None:
                station.end_prefill(ask, now)
        moving = bound.prefilled_s is not None and bound.decoding_s is None
        if moving and bound.prefill is not None and bound.decode is not None:
            self._around.links.end(bound.prefill.info.worker_id, bound.decode.info.worker_id)
        last = bound.decode or bound.prefill
        if last is not None:
            last.end_decode(ask)

    # ---- what a policy says ----

    def _rank(self, ask: Ask) -> float:
        return ask.arrived_s

    @abstractmethod
    def _plan(self, now: float) -> list[Decision[WorkerT]]: ...

    # ---- helpers ----

    def _refresh(self, workers: Sequence[WorkerT], version: int) -> None:
        if version == self._version:
            return
        self._version = version
        known = {id(station.worker): station for station in self._stations}
        self._stations = [
            known.get(id(worker)) or Station(worker, self._around.predictor, self._half_life_s) for worker in workers
        ]
        self._stores = frozenset(worker.info.store_address for worker in workers) - {""}
        self._pools.clear()
        self._rooms.clear()
        self._partners.clear()

    def _pool(self, role: Role, model: str) -> list[Station[WorkerT]]:
        """Those that pass the standing filters."""
        pool = self._pools.get((role, model))
        if pool is None:
            need = Need(role, model, 0, 0)
            pool = [each for each in self._stations if refusal(self.standing, each, need) is None]
            self._pools[role, model] = pool
        return pool

    def _smallest_room(self, role: Role, model: str) -> int:
        """Tokens that the KV pool of every one of them holds: less than that fits wherever."""
        room = self._rooms.get((role, model))
        if room is None:
            rooms = [each.info.num_blocks * each.info.block_tokens for each in self._pool(role, model)]
            room = self._rooms[role, model] = min(rooms, default=0)
        return room

    def _partners_of(self, prefill: Station[WorkerT]) -> list[Station[WorkerT]]:
        """Decode workers that can take its KV."""
        info = prefill.info
        partners = self._partners.get(info.worker_id)
        if partners is None:
            pool = self._pool(Role.DECODE, info.model.name)
            partners = self._partners[info.worker_id] = [each for each in pool if compatible(info, each.info)]
        return partners

    def _work_s(self, ask: Ask, num_cached: int, num_fetched: int) -> float:
        """Of a prompt on a worker, fetching included."""
        fetch = self._around.links.fetch_s(num_fetched) if num_fetched else 0.0
        return fetch + self._around.predictor.prefill_s(ask.num_prompt_tokens - num_cached, num_cached)

    def _take(self, ask: Ask) -> None:
        """Out of the queue."""
        self._queue.remove(self._queued.pop(ask))

    def _refuse(self, ask: Ask, need: Need, filters: tuple[Filter, ...]) -> Decision[WorkerT]:
        self._take(ask)
        error: NoWorker = no_worker(self.standing + filters, self._stations, need)
        return Decision(ask, waited_s=self._around.clock() - ask.arrived_s, error=error)
