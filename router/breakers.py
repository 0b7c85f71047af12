"""When a link between a prefill and a decode worker does not pay: a breaker for each pair that hands KV over.

A hand-over is bad if it fails, or if it takes longer than the decode worker would have needed to compute the prompt
itself. After a few bad ones in a row the link is closed to placement (`Links.trip`), so requests go over other links
or run on the decode worker alone; after a rest one request tries it again, and its outcome decides.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from pdserve.metrics import RouterMetrics
from router.scheduling.links import Links

MAX_REST_S = 60.0
"""The rest doubles with each trial that fails, up to this: Dynamo and Envoy's outlier detection rest about as long."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BreakerRules:
    """`failures`: bad hand-overs in a row. `slow_s`: added to what computing would take. `rest_s`: before a trial."""

    failures: int = 3
    slow_s: float = 0.25
    rest_s: float = 5.0


class State(Enum):
    CLOSED = "closed"
    """All is well."""
    OPEN = "open"
    """Nothing is sent."""
    HALF_OPEN = "half_open"
    """One request may try."""
    ON_TRIAL = "on_trial"
    """It is under way; nothing else is sent."""


@dataclass(slots=True)
class _Breaker:
    state: State = State.CLOSED
    num_bad: int = 0
    rest_s: float = 0.0
    until_s: float = 0.0


class LinkBreakers:
    """Of one model's workers, by (prefill, decode) worker id. Links without a blemish are not kept."""

    def __init__(
        self, links: Links, rules: BreakerRules, metrics: RouterMetrics, model: str, clock: Callable[[], float]
    ) -> None:
        self._links = links
        self._rules = rules
        self._trips = metrics.link_trips
        self._model = model
        self._clock = clock
        self._breakers: dict[tuple[str, str], _Breaker] = {}
        metrics.links_open.labels(model).set_function(self.num_open)

    def state(self, source: str, target: str) -> State:
        breaker = self._breakers.get((source, target))
        return breaker.state if breaker is not None else State.CLOSED

    def rests(self, source: str, target: str) -> bool:
        """Nothing may be sent over it now."""
        return bool(self._breakers) and self._links.is_broken(source, target)

    def num_open(self) -> int:
        return sum(breaker.state is not State.CLOSED for breaker in self._breakers.values())

    def bound(self, source: str, target: str) -> None:
        """A request goes over this link."""
        if self._breakers and self.state(source, target) is State.HALF_OPEN:
            self._breakers[source, target].state = State.ON_TRIAL
            self._links.trip(source, target)

    def unbound(self, source: str, target: str) -> None:
        """It ended and said nothing of the link."""
        if self._breakers and self.state(source, target) is State.ON_TRIAL:
            self._open_half(source, target, self._breakers[source, target])

    def arrived(
        self, source: str, target: str, num_tokens: int, seconds: float, alone_s: float, *, queued: bool = False
    ) -> None:
        """A hand-over of so many tokens took so long beyond the prompt's computing; the decode worker would have
        computed it in `alone_s`. `queued`: requests waited there for room, so a slow one says nothing of the link."""
        slow = seconds > self._rules.slow_s + alone_s
        if slow and queued:
            self.unbound(source, target)
            return
        self._links.observe(source, target, num_tokens, seconds)
        if slow:
            self._bad(source, target, "slow")
        elif (source, target) in self._breakers:
            self._close(source, target)

    def failed(self, source: str, target: str) -> None:
        self._bad(source, target, "failed")

    def tick(self) -> None:
        """About once a second."""
        now = self._clock()
        for (source, target), breaker in self._breakers.items():
            if breaker.state is State.OPEN and breaker.until_s <= now:
                self._open_half(source, target, breaker)

    def keep(self, worker_ids: set[str]) -> None:
        """Those that are connected; what was known of others is void."""
        for source, target in [link for link in self._breakers if not worker_ids.issuperset(link)]:
            self._links.heal(source, target)
            del self._breakers[source, target]

    def _open_half(self, source: str, target: str, breaker: _Breaker) -> None:
        breaker.state = State.HALF_OPEN
        self._links.heal(source, target)

    def _bad(self, source: str, target: str, reason: str) -> None:
        breaker = self._breakers.setdefault((source, target), _Breaker(rest_s=self._rules.rest_s))
        breaker.num_bad += 1
        on_trial = breaker.state in (State.ON_TRIAL, State.HALF_OPEN)
        if breaker.state is State.OPEN or (not on_trial and breaker.num_bad < self._rules.failures):
            return
        if on_trial:
            breaker.rest_s = min(2 * breaker.rest_s, MAX_REST_S)
        breaker.state, breaker.until_s = State.OPEN, self._clock() + breaker.rest_s
        self._links.trip(source, target)
        self._trips.labels(self._model, reason).inc()
        log.warning("the link from %s to %s rests for %g s: hand-over %s", source, target, breaker.rest_s, reason)

    def _close(self, source: str, target: str) -> None:
        """A good one: an early end of what had begun, or of the trial. One that was under way when the link was opened
        proves nothing."""
        breaker = self._breakers[source, target]
        if breaker.state is State.OPEN:
            return
        if breaker.state is not State.CLOSED:
            log.info("the link from %s to %s is used again", source, target)
        self._links.heal(source, target)
        del self._breakers[source, target]
