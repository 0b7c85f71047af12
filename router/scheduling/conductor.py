"""The default policy: Mooncake's Conductor, bound late.

The whole queue is planned by predicted finish: for every prefill worker the wait until it is free, plus the best of a
prefix that it has, one that it fetches from a store, and computing anew. What can start now is bound; the rest stays in
the queue, each ask counted on the worker that it waits for, so that ten turns of one system prompt don't all wait for
the same warm worker. So a worker never idles while an ask waits, unless that ask is predicted to finish sooner by
waiting for a busy worker with a warm cache. Short prompts are not served one by one where a step has a price of its
own: they are bound together until one step of theirs costs little more a token than a full one.

Decode is chosen with it: transfer (next to our own under way), the time of the tokens to come, and room (NetKV,
arXiv 2606.03910). A short uncached suffix goes to a decode worker alone, as does all when pairs don't pay.
Mooncake: arXiv 2407.00079, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic

from kvstore.index.base import NodeReach
from pdserve.types import Role
from router.scheduling.base import MAX_LOGGED_CANDIDATES, Ask, Decision, Filter, Forecast, Need, Pick, WorkerT
from router.scheduling.desk import Bound, Desk, Surroundings
from router.scheduling.filters import FitsPool, HasBlockSize, HasRole, NotDraining, ServesModel
from router.scheduling.homes import NOWHERE, Home, Homes
from router.scheduling.rules import ConductorRules
from router.scheduling.scheduler import no_worker, refusal
from router.scheduling.stations import EXPECTED_OUTPUT_TOKENS, Station, context_tokens

TICK_S = 0.001
"""Nothing is looked at again sooner than this on a prediction alone."""
PLAN_DEPTH = 64
"""Asks of a queue that are planned at a time: enough to fill any pool, and a bound on the cost of one decision."""
REACH_TTL_S = 0.25
"""How long an ask's look-up in the prefix index is believed while it waits."""
NO_ROOM_S = 1.0
"""What a decode worker without room for the context is charged: it costs about the rest of somebody's answer."""
GAIN_WEIGHT = 0.05
"""Of the latest placement in the estimated gain of disaggregation."""


Work = tuple[float, float, int, int, str]
"""Of a prompt on a worker: seconds to fetch, seconds to compute, tokens cached, of these fetched, other store or ""."""


@dataclass(slots=True, eq=False)
class Option(Generic[WorkerT]):
    """One way to compute a prompt, in seconds from now. Not frozen, which would cost a plan more than all else."""

    station: Station[WorkerT]
    wait_s: float
    fetch_s: float
    prefill_s: float
    num_cached: int
    num_fetched: int
    store: str = ""

    @property
    def finish_s(self) -> float:
        return self.wait_s + self.fetch_s + self.prefill_s


class Conductor(Desk[WorkerT]):
    """See the module. A `router.scheduling.base.Policy`."""

    def __init__(self, around: Surroundings, rules: ConductorRules | None = None) -> None:
        self.rules = rules or ConductorRules()
        standing: tuple[Filter, ...] = (HasRole(), ServesModel(), NotDraining(), HasBlockSize(around.block_tokens))
        super().__init__(around, standing, self.rules.load_half_life_s)
        self._filters: tuple[Filter, ...] = (FitsPool(),)
        self._reaches: dict[Ask, tuple[float, bytes, Mapping[str, NodeReach]]] = {}
        self._works: dict[Ask, dict[Station[WorkerT], tuple[Mapping[str, NodeReach], float, Work]]] = {}
        """Of asks that wait, by (reach, pace): they are planned again and again while neither changes."""
        self._homes = Homes(around.block_tokens)
        self._wakeup: float | None = None
        self.disaggregation_gain_s = 0.0
        """Moving mean over what was placed: how much sooner the first two tokens come by a pair than from a decode
        worker alone, what that would delay the others in its batch included. Below 0: disaggregation does not pay."""

    def next_wakeup(self) -> float | None:
        return self._wakeup if self._queue else None

    def ended(self, ask: Ask, num_output_tokens: int = 0) -> None:
        self._reaches.pop(ask, None)
        self._works.pop(ask, None)
        super().ended(ask, num_output_tokens)

    def _refresh(self, workers: Sequence[WorkerT], version: int) -> None:
        if version != self._version:
            self._works.clear()
        super()._refresh(workers, version)

    def redecide(self, ask: Ask, workers: Sequence[WorkerT], version: int) -> Decision[WorkerT]:
        self._refresh(workers, version)
        bound = self._bound.get(ask)
        if bound is None or bound.prefill is None or bound.decode is None:
            raise ValueError(f"request {ask.request_id} has no pair to change")
        chosen = self._choose_decode(ask, bound.prefill, self._reach(ask, self._around.clock(), bound.prefill))
        if chosen is None:
            need = Need(Role.DECODE, ask.model, ask.num_prompt_tokens, ask.max_tokens, bound.prefill.info)
            return Decision(ask, error=no_worker(self.standing + self._filters, self._stations, need))
        bound.decode.end_decode(ask)
        bound.decode = chosen.station
        chosen.station.begin_decode(ask)
        forecast = Forecast(transfer_s=chosen.transfer_s, itl_s=chosen.itl_s)
        return Decision(ask, bound.prefill.worker, chosen.station.worker, "", forecast, 0.0, (chosen.pick,))

    # ---- the plan ----

    def _plan(self, now: float) -> list[Decision[WorkerT]]:
        self._wakeup = None
        decisions: list[Decision[WorkerT]] = []
        held: dict[str, float] = {}
        """Seconds of work that asks before this one are going to bring, by worker."""
        for entry in self._queue[:PLAN_DEPTH]:
            decision = self._consider(entry[3], now, held)
            if decision is not None:
                decisions.append(decision)
        if self._queue and self._wakeup is None:
            self._wakeup = now  # all that were planned are placed: on with those behind
        return decisions

    def _consider(self, ask: Ask, now: float, held: dict[str, float]) -> Decision[WorkerT] | None:
        """Bind it, refuse it, or let it wait (None)."""
        if not ask.disaggregate:
            return self._place_alone(ask, now, "asked")
        pool = self._passing(Role.PREFILL, ask)
        if ask.max_tokens > 1:
            pool = [each for each in pool if self._partners_of(each)]
        if not pool:
            return self._without_prefill(ask, now)
        options = [self._option(ask, station, now, held) for station in pool]
        options, notes = self._bounded(options, now)
        home = self._homes.find(ask.keys)
        best = min(options, key=lambda option: self._cost(option, home))
        alone = self._alone_pays(ask, best, now)
        if alone is not None:
            return alone
        name = best.station.info.worker_id
        if best.wait_s > self.rules.lead_s + TICK_S / 2 and (name in held or not self._shares_step(ask, best, now)):
            held[name] = held.get(name, 0.0) + best.fetch_s + best.prefill_s
            at = now + max(best.wait_s - self.rules.lead_s, TICK_S)
            self._wakeup = at if self._wakeup is None else min(self._wakeup, at)
            return None
        return self._bind(ask, best, options, notes, now)

    def _shares_step(self, ask: Ask, option: Option[WorkerT], now: float) -> bool:
        """Held back, short prompts would be computed one by one where one step could take them all."""
        num_new = ask.num_prompt_tokens - option.num_cached
        return option.station.shares_step(num_new, now, self.rules.lead_s + TICK_S / 2)

    def _cost(self, option: Option[WorkerT], home: Home = NOWHERE) -> tuple[float, float]:
        """Equals go to who was given least to compute."""
        rules, prefill_s = self.rules, self._around.predictor.prefill_s
        saved = prefill_s(option.num_cached, 0) if option.num_cached else 0.0
        credit = rules.reuse_weight * saved
        if home.num_tokens > option.num_cached and home.worker_id == option.station.info.worker_id:
            credit += rules.home_weight * (prefill_s(home.num_tokens, 0) - saved)
        return option.finish_s - credit, option.station.recent_tokens

    def _passing(self, role: Role, ask: Ask) -> list[Station[WorkerT]]:
        pool = self._pool(role, ask.model)
        if ask.num_prompt_tokens + ask.max_tokens <= self._smallest_room(role, ask.model):
            return pool
        need = Need(role, ask.model, ask.num_prompt_tokens, ask.max_tokens)
        return [each for each in pool if refusal(self._filters, each, need) is None]

    def _option(self, ask: Ask, station: Station[WorkerT], now: float, held: Mapping[str, float]) -> Option[WorkerT]:
        """The best way to compute this prompt there."""
        wait = station.wait_s(now)
        if held:
            wait += held.get(station.info.worker_id, 0.0)
        return Option(station, wait, *self._known_work(ask, station, now))

    def _known_work(self, ask: Ask, station: Station[WorkerT], now: float) -> Work:
        reach, pace = self._reach(ask, now, station), station.prefill_pace.factor
        works = self._works.get(ask)
        if works is None:
            works = self._works[ask] = {}
        known = works.get(station)
        if known is None or known[0] is not reach or known[1] != pace:
            known = works[station] = reach, pace, self._work(ask, station, reach, pace)
        return known[2]

    def _work(self, ask: Ask, station: Station[WorkerT], reach: Mapping[str, NodeReach], pace: float) -> Work:
        info = station.info
        limit = max(ask.num_prompt_tokens - 1, 0) // info.block_tokens
        prefill_s, links = self._around.predictor.prefill_s, self._around.links
        here = reach.get(info.worker_id)
        num_hbm = min(here.hbm, limit) * info.block_tokens if here is not None else 0
        best: Work = 0.0, prefill_s(ask.num_prompt_tokens - num_hbm, num_hbm) * pace, num_hbm, 0, ""
        for name, found in reach.items():
            if name not in self._stores or min(found.disk, limit) * info.block_tokens <= num_hbm:
                continue
            own = name == info.store_address
            num_dram = max(min(found.dram, limit) * info.block_tokens - num_hbm, 0)
            num_disk = min(found.disk, limit) * info.block_tokens - num_hbm - num_dram
            fetch = links.fetch_s(num_dram, num_disk, own_node=own)
            cached = num_hbm + num_dram + num_disk
            compute = prefill_s(ask.num_prompt_tokens - cached, cached) * pace
            if fetch + compute < best[0] + best[1]:
                best = fetch, compute, cached, cached - num_hbm, "" if own else name
        return best

    def _reach(self, ask: Ask, now: float, station: Station[WorkerT]) -> Mapping[str, NodeReach]:
        known = self._reaches.get(ask)
        fingerprint = station.info.fingerprint
        if known is not None and now - known[0] <= REACH_TTL_S and known[1] == fingerprint:
            return known[2]
        reach = self._around.prefixes.match(ask.keys, fingerprint) if ask.keys else {}
        self._reaches[ask] = (now, fingerprint, reach)
        return reach

    def _bounded(self, options: list[Option[WorkerT]], now: float) -> tuple[list[Option[WorkerT]], tuple[str, ...]]:
        """Without those that have been given more than their share to compute, unless only they could start now."""
        if len(options) < 2:
            return options, ()
        loads = [option.station.recent(now) for option in options]
        limit = self.rules.load_bound * sum(loads) / len(loads) + self.rules.load_slack_tokens
        if max(loads) <= limit:
            return options, ()
        within = [option for option, load in zip(options, loads, strict=True) if load <= limit]
        if not within or min(o.wait_s for o in within) > max(self.rules.lead_s, min(o.wait_s for o in options)):
            return options, ()
        notes = tuple(f"load_bound={o.station.info.worker_id}" for o in options if o not in within)
        return within, notes

    # ---- a pair ----

    def _bind(
        self, ask: Ask, best: Option[WorkerT], options: Sequence[Option[WorkerT]], notes: tuple[str, ...], now: float
    ) -> Decision[WorkerT] | None:
        home = self._homes.find(ask.keys)
        costs = [(option.station.info.worker_id, self._cost(option, home)[0]) for option in options]
        station, pick = best.station, _prefill_pick(best, costs, len(self._stations), notes)
        if ask.max_tokens == 1:
            forecast = _forecast(best, 0.0, 0.0)
            return self._placed(ask, station, None, best.store, forecast, (pick,), now)
        decode = self._choose_decode(ask, station, self._reach(ask, now, station))
        if decode is None:
            return self._place_alone(ask, now, "no_link")
        self._learn_gain(ask, best, decode)
        forecast = _forecast(best, decode.transfer_s, decode.itl_s)
        return self._placed(ask, station, decode.station, best.store, forecast, (pick, decode.pick), now)

    def _choose_decode(
        self, ask: Ask, prefill: Station[WorkerT], reach: Mapping[str, NodeReach]
    ) -> _Decode[WorkerT] | None:
        """None: no decode worker can be reached from this prefill worker."""
        links, info = self._around.links, prefill.info
        need = Need(Role.DECODE, ask.model, ask.num_prompt_tokens, ask.max_tokens, info)
        costs: list[tuple[float, float, float, Station[WorkerT]]] = []
        for station in self._partners_of(prefill):
            name = station.info.worker_id
            if links.is_broken(info.worker_id, name) or refusal(self._filters, station, need) is not None:
                continue
            here = reach.get(name)
            cached = here.hbm * station.info.block_tokens if here is not None else 0
            transfer = links.transfer_s(info, station.info, max(ask.num_prompt_tokens - cached, 0))
            itl = station.itl_s(ask.num_choices, context_tokens(ask))
            room = NO_ROOM_S if station.free_tokens < context_tokens(ask) else 0.0
            costs.append((transfer + room + itl * min(ask.max_tokens, EXPECTED_OUTPUT_TOKENS), transfer, itl, station))
        if not costs:
            return None
        costs.sort(key=lambda cost: cost[0])
        cost, transfer, itl, station = costs[0]
        others = tuple((each[3].info.worker_id, each[0]) for each in costs[:MAX_LOGGED_CANDIDATES])
        scores = (("finish_s", cost), ("transfer_s", transfer), ("itl_s", itl))
        pick = Pick("decode", station.info.worker_id, len(costs), len(self._stations), scores, others)
        return _Decode(station, transfer, itl, pick)

    def _placed(
        self,
        ask: Ask,
        prefill: Station[WorkerT] | None,
        decode: Station[WorkerT] | None,
        store: str,
        forecast: Forecast,
        picks: tuple[Pick, ...],
        now: float,
    ) -> Decision[WorkerT]:
        self._take(ask)
        self._reaches.pop(ask, None)
        self._works.pop(ask, None)
        computes = prefill or decode
        if prefill is not None:
            self._homes.moved(ask.keys, prefill.info.worker_id)
        if computes is not None:
            new = ask.num_prompt_tokens - forecast.num_cached_tokens
            computes.begin_prefill(ask, now, forecast.fetch_s + forecast.prefill_s, new)
        last = decode or prefill
        if last is not None:
            last.begin_decode(ask)
        self._bound[ask] = Bound(prefill, decode, itl_s=forecast.itl_s)
        workers = prefill.worker if prefill else None, decode.worker if decode else None
        return Decision(ask, *workers, store, forecast, now - ask.arrived_s, picks)

    # ---- a decode worker alone ----

    def _alone_pays(self, ask: Ask, pair: Option[WorkerT], now: float) -> Decision[WorkerT] | None:
        """A short uncached suffix needs no hand-over; and no pair may be far slower than one worker."""
        if ask.max_tokens == 1 or (pair.finish_s <= self.rules.patience_s and not self._may_be_short(ask)):
            return None
        best = self._best_alone(ask, now)
        if best is None:
            return None
        num_new = ask.num_prompt_tokens - best.num_cached
        if num_new <= self.rules.alone_tokens and best.finish_s <= pair.finish_s:
            return self._bind_alone(ask, best, now, "short_suffix")
        if pair.finish_s > self.rules.patience_s and best.finish_s * self.rules.degrade_ratio < pair.finish_s:
            return self._bind_alone(ask, best, now, "pairs_too_slow")
        return None

    def _may_be_short(self, ask: Ask) -> bool:
        """Somebody holds nearly all of the prompt, or it is short itself. Hot path: most requests are neither."""
        known = self._reaches.get(ask)
        held = max((found.disk for found in known[2].values()), default=0) if known is not None else 0
        return ask.num_prompt_tokens - held * self._around.block_tokens <= self.rules.alone_tokens

    def _best_alone(self, ask: Ask, now: float) -> Option[WorkerT] | None:
        options = [
            self._alone_option(ask, station, now)
            for station in self._passing(Role.DECODE, ask)
            if station.free_tokens >= context_tokens(ask)
        ]
        return min(options, key=_finish) if options else None

    def _alone_option(self, ask: Ask, station: Station[WorkerT], now: float) -> Option[WorkerT]:
        option = self._option(ask, station, now, {})
        if station.num_seqs:
            option.prefill_s += station.itl_s(0, 0)  # it stalls the others for a step
        return option

    def _without_prefill(self, ask: Ask, now: float) -> Decision[WorkerT]:
        """No prefill worker may take it: a decode worker does, if there is one."""
        if self.rules.alone_without_prefill and self._passing(Role.DECODE, ask):
            return self._place_alone(ask, now, "no_prefill")
        return self._refuse(ask, Need(Role.PREFILL, ask.model, ask.num_prompt_tokens, ask.max_tokens), self._filters)

    def _place_alone(self, ask: Ask, now: float, why: str) -> Decision[WorkerT]:
        pool = self._passing(Role.DECODE, ask)
        if not pool:
            need = Need(Role.DECODE, ask.model, ask.num_prompt_tokens, ask.max_tokens)
            return self._refuse(ask, need, self._filters)
        best = self._best_alone(ask, now)
        if best is None:
            best = min((self._alone_option(ask, station, now) for station in pool), key=_finish)
        return self._bind_alone(ask, best, now, why)

    def _bind_alone(self, ask: Ask, best: Option[WorkerT], now: float, why: str) -> Decision[WorkerT]:
        station = best.station
        itl = station.itl_s(ask.num_choices, context_tokens(ask))
        scores = (("finish_s", best.finish_s), ("itl_s", itl))
        pick = Pick("decode", station.info.worker_id, 1, len(self._stations), scores, notes=(f"alone={why}",))
        return self._placed(ask, None, station, best.store, _forecast(best, 0.0, itl), (pick,), now)

    def _learn_gain(self, ask: Ask, pair: Option[WorkerT], decode: _Decode[WorkerT]) -> None:
        """Against the same decode worker doing it alone: its own first two tokens, and the stall of all others there,
        spread over their answers."""
        station = decode.station
        new = self._around.predictor.prefill_s(ask.num_prompt_tokens, 0)
        stall = new * station.num_seqs
        alone = new + stall / max(1, station.info.max_num_seqs)
        gain = alone - (pair.finish_s + decode.transfer_s)
        self.disaggregation_gain_s += GAIN_WEIGHT * (gain - self.disaggregation_gain_s)


@dataclass(frozen=True, slots=True)
class _Decode(Generic[WorkerT]):
    station: Station[WorkerT]
    transfer_s: float
    itl_s: float
    pick: Pick


def _finish(option: Option[WorkerT]) -> float:
    return option.finish_s


def _forecast(option: Option[WorkerT], transfer_s: float, itl_s: float) -> Forecast:
    return Forecast(
        option.wait_s, option.fetch_s, option.prefill_s, transfer_s, itl_s, option.num_cached, option.num_fetched
    )


def _prefill_pick(
    best: Option[WorkerT], costs: Sequence[tuple[str, float]], num_workers: int, notes: tuple[str, ...]
) -> Pick:
    """`costs`: of all candidates, by what one was chosen: seconds to finish, less what its cached prefix counts for."""
    others = tuple(sorted(costs, key=lambda cost: cost[1])[:MAX_LOGGED_CANDIDATES])
    scores = (
        ("ttft_s", best.finish_s),
        ("queue_s", best.wait_s),
        ("fetch_s", best.fetch_s),
        ("prefill_s", best.prefill_s),
        ("cached_tokens", float(best.num_cached)),
    )
    return Pick("prefill", best.station.info.worker_id, len(costs), num_workers, scores, others, notes)
