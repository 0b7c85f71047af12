"""Baselines: a request is placed the moment it arrives, by filter -> score -> pick alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvstore.index.base import NodeReach
from pdserve.errors import NoWorker
from pdserve.types import Role
from router.scheduling.base import Ask, Decision, Forecast, Need, Profile, WorkerT
from router.scheduling.desk import Bound, Desk, Surroundings
from router.scheduling.scheduler import Scheduler
from router.scheduling.stations import Station


class Immediate(Desk[WorkerT]):
    """A `router.scheduling.base.Policy` over one profile a role."""

    def __init__(self, around: Surroundings, profiles: dict[Role, Profile], half_life_s: float = 300.0) -> None:
        super().__init__(around, profiles[Role.PREFILL].standing, half_life_s)
        self._profiles = profiles
        self._scheduler: Scheduler[Station[WorkerT]] = Scheduler(profiles)

    def redecide(self, ask: Ask, workers: Sequence[WorkerT], version: int) -> Decision[WorkerT]:
        self._refresh(workers, version)
        bound = self._bound.get(ask)
        if bound is None or bound.prefill is None or bound.decode is None:
            raise ValueError(f"request {ask.request_id} has no pair to change")
        need = Need(Role.DECODE, ask.model, ask.num_prompt_tokens, ask.max_tokens, bound.prefill.info, ask.session)
        try:
            placed = self._scheduler.place_one(self._stations, self._version, need)
        except NoWorker as error:
            return Decision(ask, error=error)
        assert placed.decode is not None, "a need for decode places decode"
        bound.decode.end_decode(ask)
        bound.decode = placed.decode
        placed.decode.begin_decode(ask)
        return Decision(ask, bound.prefill.worker, placed.decode.worker, picks=placed.picks)

    def _plan(self, now: float) -> list[Decision[WorkerT]]:
        return [self._place(entry[3], now) for entry in tuple(self._queue)]

    def _place(self, ask: Ask, now: float) -> Decision[WorkerT]:
        alone = not ask.disaggregate or ask.max_tokens == 1
        role = Role.PREFILL if ask.disaggregate and alone else Role.DECODE
        need = Need(role, ask.model, ask.num_prompt_tokens, ask.max_tokens, None, ask.session, self._reach(ask, role))
        place = self._scheduler.place_one if alone else self._scheduler.place_pair
        self._take(ask)
        try:
            placed = place(self._stations, self._version, need)
        except NoWorker as error:
            return Decision(ask, waited_s=now - ask.arrived_s, error=error)
        cached = self._begin(ask, placed.prefill, placed.decode, need, now)
        prefill, decode = (each.worker if each else None for each in (placed.prefill, placed.decode))
        return Decision(ask, prefill, decode, forecast=Forecast(num_cached_tokens=cached), picks=placed.picks)

    def _reach(self, ask: Ask, role: Role) -> Mapping[str, NodeReach]:
        pool = self._pool(role, ask.model)
        return self._around.prefixes.match(ask.keys, pool[0].info.fingerprint) if pool and ask.keys else {}

    def _begin(
        self,
        ask: Ask,
        prefill: Station[WorkerT] | None,
        decode: Station[WorkerT] | None,
        need: Need,
        now: float,
    ) -> int:
        """Count it; returns the prompt's tokens that are believed to be cached where it is computed."""
        computes, last = prefill or decode, decode or prefill
        assert computes is not None, "a placement has a worker"
        assert last is not None, "a placement has a worker"
        found = need.reach.get(computes.info.worker_id)
        cached = min(found.hbm * computes.info.block_tokens, ask.num_prompt_tokens - 1) if found else 0
        computes.begin_prefill(ask, now, self._work_s(ask, cached, 0), ask.num_prompt_tokens - cached)
        last.begin_decode(ask)
        self._bound[ask] = Bound(prefill, decode, itl_s=last.itl_s(0, 0))
        return cached
