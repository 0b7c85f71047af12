"""Gives requests of one model their workers, and tells the policy what became of them.

A request stands in the policy's queue until it is bound; whatever may let it be bound (a prompt that is through, a
request that ended, a worker that came, a time the policy named) has the policy asked again, once a loop tick. Here
meet: the policy, the fleet, the prefix index and its audit, and the breakers of links.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from msgspec.structs import replace

from pdserve.errors import HandoverError, PdserveError, WorkerLost
from pdserve.rpc import guard
from pdserve.types import PromptStats, Role
from router.breakers import LinkBreakers
from router.fleet import Fleet
from router.grace import Grace
from router.prefixes import PrefixIndex
from router.request import ActiveRequest
from router.scheduling.base import Ask, Decision, Pick, Policy
from router.scheduling.forecasts import Predictor
from router.session import Link

SMOOTHING = 0.1
"""Of the latest interval in the mean time between two placements while requests wait."""
PLAN_SHARE = 0.25
"""Of the loop's time that planning the queue may take, so that streams go on under overload. A plan of 64 requests took
0.9 ms on a busy machine: a worker that gets free waits less than 3 ms for its next one."""
MIN_PLAN_PAUSE_S = 0.001
"""Finer than this the loop's timers are not."""
FIRST_INTERVAL_S = 0.1
"""Assumed before any request had to wait."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PlacerOptions:
    """`grace_s`: a request may wait so long for a worker that is known but not there."""

    model: str
    block_tokens: int
    disaggregate: bool
    grace_s: float = 0.0


class Placer:
    """Implements `router.surroundings.Placing`."""

    def __init__(
        self,
        options: PlacerOptions,
        policy: Policy[Link],
        fleet: Fleet,
        prefixes: PrefixIndex,
        breakers: LinkBreakers,
        predictor: Predictor,
        loop: asyncio.AbstractEventLoop,
        count_grace: Callable[[str], None] = lambda outcome: None,
    ) -> None:
        self.policy = policy
        self.breakers = breakers
        self._options = options
        self._fleet = fleet
        self._prefixes = prefixes
        self._predictor = predictor
        self._loop = loop
        self._waiting: dict[Ask, ActiveRequest] = {}
        self._asks: dict[ActiveRequest, Ask] = {}
        self._poked = False
        self._next_plan_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._workers: list[Link] = []
        self._version = -1
        self._interval_s = FIRST_INTERVAL_S
        self._last_bound_s: float | None = None
        self._grace = Grace(options.grace_s, loop, expects=self.expects, again=self._seek_again, count=count_grace)

    # ---- what the core asks ----

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def place(self, active: ActiveRequest) -> None:
        """Bind it, or let it wait. Raises what keeps it from being served at all. Behind others that wait it is looked
        at with them, once a tick: to plan the whole queue anew for each arrival would cost more than all else."""
        ask = self._ask(active)
        self._asks[active] = ask
        behind_others = bool(self._waiting)
        self._waiting[ask] = active
        self.policy.enqueue(ask)
        if behind_others:
            active.wait()
            self._poke()
            return
        try:
            self._decide_on(ask)
        except BaseException:
            self._waiting.pop(ask, None)
            self._grace.end(ask, "not_found")
            del self._asks[active]
            self.policy.ended(ask)
            raise
        if ask in self._waiting:
            active.wait()

    def _decide_on(self, ask: Ask) -> None:
        """Raises its refusal; others are told theirs."""
        refusal: PdserveError | None = None
        for decision in self._decide():
            if decision.ask is ask and decision.error is not None:
                refusal = None if self._grace.takes(ask, decision.error) else decision.error
            else:
                self._carry_out(decision)
        self._arm()
        if refusal is not None:
            raise refusal

    def wait_s(self, priority: int) -> float:
        """How long a request of this priority would stand in the queue, at the present pace."""
        if not self._waiting:
            return 0.0
        return self._interval_s * sum([ask.priority <= priority for ask in self._waiting])

    def least_important(self, priority: int) -> ActiveRequest | None:
        """The one that waits and should give way to a request of this priority: the newest of the least important;
        None: all are as important."""
        ask = max(self._waiting, key=lambda each: (each.priority, each.arrived_s), default=None)
        return self._waiting[ask] if ask is not None and ask.priority > priority else None

    def changed(self) -> None:
        """The fleet."""
        self.breakers.keep({link.info.worker_id for link in self._links()})
        self._seek_again()
        self._poke()

    def tick(self) -> None:
        self.breakers.tick()
        self._poke()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._grace.close()

    def expects(self, role: Role) -> bool:
        """A worker of this model may come soon, and requests may wait for it."""
        return self._options.grace_s > 0 and self._fleet.awaits(self._options.model, role)

    # ---- what requests tell ----

    def again(self, active: ActiveRequest) -> None:
        self._forget(active)
        self._loop.call_soon(self._place_again, active)

    def _place_again(self, active: ActiveRequest) -> None:
        """In the next tick: then the fleet knows that a worker is gone."""
        if active.done:
            return
        try:
            self.place(active)
        except PdserveError as error:
            active.not_placed(error)

    def decode_again(self, active: ActiveRequest) -> None:
        self._loop.call_soon(self._redecide, active)

    def _redecide(self, active: ActiveRequest) -> None:
        ask = self._asks.get(active)
        if ask is None or not active.rebinding:
            return
        decision = self.policy.redecide(ask, self._links(), self._fleet.version)
        if decision.error is not None:
            active.retry(decision.error)
            return
        try:
            active.rebind(decision)
        except WorkerLost as error:
            active.retry(error)

    def prefilled(self, active: ActiveRequest, stats: PromptStats | None) -> None:
        ask = self._asks.get(active)
        if ask is None:
            return
        if stats is None:
            self.policy.prefilled(ask, 0)
        else:
            self.policy.prefilled(ask, stats.num_cached_tokens, stats.num_fetched_tokens)
            self._check(active, stats)
        self._prefixes.computed(active.attempt.computes[0], ask.keys)
        self._poke()

    def decoding(self, active: ActiveRequest) -> None:
        ask = self._asks.get(active)
        if ask is None:
            return
        self.policy.decoding(ask)
        attempt = active.attempt
        link, arrived = attempt.link, attempt.kv_arrived_s or attempt.decode_started_s
        if link is None or arrived is None or attempt.first_token_s is None:
            return
        self._prefixes.computed(link[1], ask.keys)
        alone_s = self._predictor.prefill_s(ask.num_prompt_tokens, 0)
        seconds = max(arrived - attempt.first_token_s, 0.0)
        self.breakers.arrived(*link, ask.num_prompt_tokens, seconds, alone_s, queued=active.decode_is_full)

    def failed(self, active: ActiveRequest, error: PdserveError) -> None:
        attempt = active.record.last
        if isinstance(error, HandoverError) and attempt is not None and attempt.link is not None:
            attempt.handover_failed = True
            self.breakers.failed(*attempt.link)

    def ended(self, active: ActiveRequest) -> None:
        self._forget(active)
        self._poke()

    def _forget(self, active: ActiveRequest) -> None:
        ask = self._asks.pop(active, None)
        if ask is None:
            return
        self._grace.end(ask, "ended")
        last = active.record.last
        if self._waiting.pop(ask, None) is None and last is not None and last.link is not None:
            self.breakers.unbound(*last.link)
        self.policy.ended(ask, active.num_output_tokens - (last.num_prior_tokens if last is not None else 0))

    # ---- the policy ----

    def _ask(self, active: ActiveRequest) -> Ask:
        """After a hand-over that failed, one worker does it all."""
        request, last = active.request, active.record.last
        handed_over = last is None or not last.handover_failed
        given = active.num_output_tokens
        return Ask(
            request.request_id,
            request.model,
            len(request.prompt_token_ids) + given,
            max(1, (request.params.max_tokens or 0) - given),
            request.block_keys,
            request.params.n,
            request.priority,
            session=active.session,
            disaggregate=self._options.disaggregate and handed_over,
        )

    def _links(self) -> list[Link]:
        """This model's workers."""
        if self._version != self._fleet.version:
            self._version = self._fleet.version
            self._workers = [link for link in self._fleet.links if link.info.model.name == self._options.model]
        return self._workers

    def _decide(self) -> list[Decision[Link]]:
        return self.policy.decide(self._links(), self._fleet.version)

    def _run(self) -> None:
        self._poked = False
        began = time.monotonic()
        for decision in self._decide():
            self._carry_out(decision)
        self._arm()
        now = time.monotonic()
        self._next_plan_s = now + (now - began) * (1 / PLAN_SHARE - 1)

    def _carry_out(self, decision: Decision[Link]) -> None:
        """What goes wrong with one decision of a plan is its own request's misfortune: the others are carried out."""
        active = self._waiting.get(decision.ask)
        if active is None:
            return  # it ended while an earlier decision of this plan was carried out
        if decision.error is not None and self._grace.takes(decision.ask, decision.error):
            return
        del self._waiting[decision.ask]
        self._grace.end(decision.ask, "found" if decision.error is None else "not_found")
        try:
            if decision.error is not None:
                active.not_placed(decision.error)
            else:
                self._bind(active, decision)
        except WorkerLost as error:
            self._loop.call_soon(active.retry, error)
        except Exception as error:
            log.exception("a placement failed", extra={"request_id": active.request_id})
            self._loop.call_soon(active.fail, guard(error))

    def _bind(self, active: ActiveRequest, decision: Decision[Link]) -> None:
        self._count_bound()
        decision = self._over_whole_links(decision)
        active.bind(decision)
        if decision.prefill is not None and decision.decode is not None:
            self.breakers.bound(decision.prefill.info.worker_id, decision.decode.info.worker_id)
        computes = decision.prefill or decision.decode
        assert computes is not None, "a decision without an error has a worker"
        active.record.revision = computes.info.model.revision
        if decision.forecast.num_cached_tokens:
            active.attempt.prefix_source = self._prefixes.source(computes.info)

    def _seek_again(self) -> None:
        """Put those that found no worker back into the queue; since when they wait stays known."""
        for ask in self._grace.wake():
            since = ask.arrived_s
            self.policy.enqueue(ask)
            ask.arrived_s = since
        self._poke()

    def _over_whole_links(self, decision: Decision[Link]) -> Decision[Link]:
        """A policy that knows nothing of breakers may choose a link that is closed: then decode does it all."""
        if decision.prefill is None or decision.decode is None:
            return decision
        if not self.breakers.rests(decision.prefill.info.worker_id, decision.decode.info.worker_id):
            return decision
        pick = Pick("decode", decision.decode.info.worker_id, 1, len(self._workers), (), notes=("alone=no_link",))
        return replace(decision, prefill=None, picks=(*decision.picks, pick))

    def _count_bound(self) -> None:
        now = time.monotonic()
        if self._waiting and self._last_bound_s is not None:
            self._interval_s += SMOOTHING * (now - self._last_bound_s - self._interval_s)
        self._last_bound_s = now

    def _poke(self) -> None:
        """Have the queue planned soon: at the end of this tick, or when it is its turn again."""
        if not self._waiting or self._poked:
            return
        self._poked = True
        wait_s = self._next_plan_s - time.monotonic()
        if wait_s > MIN_PLAN_PAUSE_S:
            self._loop.call_later(wait_s, self._run)
        else:
            self._loop.call_soon(self._run)

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiting and (at := self.policy.next_wakeup()) is not None:
            self._timer = self._loop.call_at(max(at, self._next_plan_s), self._poke)

    # ---- the audit ----

    def _check(self, active: ActiveRequest, stats: PromptStats) -> None:
        """An engine always computes the last token, so a prompt of whole blocks is found without its last one."""
        attempt, forecast = active.attempt, active.attempt.forecast
        believed = forecast.num_cached_tokens - forecast.num_fetched_tokens
        if believed > 0:
            block = self._options.block_tokens
            limit = (stats.num_prompt_tokens - 1) // block * block
            self._prefixes.check(*attempt.computes, min(believed, limit), stats)
