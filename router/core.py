"""The router's core: what every face calls. Tokenise, admit, place; the rest happens in callbacks.

Implements `router.base.Core`. One event loop, no task for a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from msgspec.structs import replace

from pdserve.errors import InvalidRequest, ModelNotFound, Overloaded, PdserveError
from pdserve.types import ModelInfo, Request
from router.admission import MIN_RETRY_AFTER_S, Admission
from router.base import Incoming, Sink
from router.catalog import Catalog, Record
from router.choice import TextOptions
from router.deadlines import Deadlines
from router.fleet import Fleet
from router.prefixes import PrefixIndex
from router.request import ActiveRequest
from router.served import ServedModel
from router.surroundings import Placing, Surroundings, Timeouts
from router.traces import RouterTraces

MAX_ID_CHARS = 256
TICK_S = 1.0
"""Leases of the index, ages of guesses, rests of breakers: none of them is finer than seconds."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CoreOptions:
    """`max_waiting`: requests that may stand in queues; `max_retries`: placements of a request after the first."""

    policy: str
    max_inflight: int
    max_waiting: int
    max_retries: int
    timeouts: Timeouts
    num_records: int
    max_queue_s: float = math.inf
    """A request that would wait longer for a worker is refused at once."""
    grace_s: float = 0.0
    """With no worker ready, a request waits so long for one that is known and may come soon."""


MakeModels = Callable[["RouterCore"], Sequence[ServedModel]]


class RouterCore:
    """Made on the loop that it runs on. `make_models` is called once, with the core; see `router.models`."""

    def __init__(
        self,
        options: CoreOptions,
        fleet: Fleet,
        prefixes: PrefixIndex,
        make_models: MakeModels,
        traces: RouterTraces | None = None,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.fleet = fleet
        self.prefixes = prefixes
        self.options = options
        self.catalog = Catalog(options.num_records)
        self.admission = Admission(options.max_inflight, options.max_waiting)
        self._traces = traces
        self._active: dict[str, ActiveRequest] = {}
        self._expecting: set[asyncio.Task[Incoming]] = set()
        """Requests that came before any worker of their model."""
        self._fleet_changed = asyncio.Event()
        self._deadlines = Deadlines(self.loop)
        self._idle = asyncio.Event()
        self._idle.set()
        self.served = tuple(make_models(self))
        self._by_name: Mapping[str, ServedModel] = {name: each for each in self.served for name in each.names}
        fleet.subscribe(self._on_fleet)
        self._on_fleet()
        self._ticking = self.loop.call_later(TICK_S, self._tick)

    def surroundings(self, placing: Placing) -> Surroundings:
        """What the requests of one model share."""
        options = self.options
        return Surroundings(self.loop, self._deadlines, options.timeouts, placing, self._on_end, options.max_retries)

    # ---- Core ----

    def prepare(self, incoming: Incoming) -> asyncio.Future[Incoming] | None:
        served = self._by_name.get(incoming.model)
        if served is None:
            return None
        if served.unknown and len(self._expecting) < self.options.max_waiting:
            return self._track(self.loop.create_task(self._prepare_later(served, incoming)))
        return served.prompts.prepare(incoming, self.loop)

    async def _prepare_later(self, served: ServedModel, incoming: Incoming) -> Incoming:
        """This router has just been started, and no worker has said yet what the model takes. What comes of waiting
        for the first one is seen by `submit`."""
        arrived_s = time.monotonic() if incoming.arrived_s is None else incoming.arrived_s
        wait_s = min(self.options.grace_s, incoming.timeout_ms / 1000 if incoming.timeout_ms else math.inf)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                while served.unknown:
                    await self._fleet_changed.wait()
        later = served.prompts.prepare(incoming, self.loop)
        return replace(incoming if later is None else await later, arrived_s=arrived_s)

    def _track(self, preparing: asyncio.Task[Incoming]) -> asyncio.Task[Incoming]:
        """Bounded, and ended with the router."""
        self._expecting.add(preparing)
        preparing.add_done_callback(self._expecting.discard)
        return preparing

    def submit(self, incoming: Incoming, sink: Sink) -> ActiveRequest:
        arrived = time.monotonic() if incoming.arrived_s is None else incoming.arrived_s
        served = self._by_name.get(incoming.model)
        try:
            if served is None:
                raise self._no_such_model(incoming.model)
            return self._submit(served, incoming, sink, arrived)
        except PdserveError as error:
            (served or self.served[0]).observer.refused(error)
            raise

    def models(self) -> Sequence[ModelInfo]:
        return [info for served in self.served for info in served.infos()]

    def token_text(self, model: str, token_id: int) -> tuple[str, bytes]:
        tokenizer = self._by_name[model].tokenizer
        return tokenizer.token_text(token_id), tokenizer.token_bytes(token_id)

    def ready(self) -> str | None:
        """One model that can be served is enough: the others' requests are refused by name."""
        if self.admission.draining:
            return "draining"
        reasons = [served.why_not() for served in self.served]
        return None if None in reasons else "; ".join(reason for reason in reasons if reason)

    def record(self, request_id: str) -> dict[str, object] | None:
        active = self._active.get(request_id)
        found = active.record if active is not None else self.catalog.find(request_id)
        return None if found is None else found.as_dict()

    # ---- life of the process ----

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for those under way. False: some are left after `timeout_s`."""
        self.admission.draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def close(self, error: PdserveError) -> None:
        """Fail what is still under way."""
        for active in list(self._active.values()):
            active.fail(error)
        self._deadlines.close()
        self._ticking.cancel()
        for preparing in self._expecting:
            preparing.cancel()
        for served in self.served:
            served.placer.close()
            served.prompts.close()

    # ---- a request's beginning ----

    def _submit(self, served: ServedModel, incoming: Incoming, sink: Sink, arrived: float) -> ActiveRequest:
        bounds = served.bounds()
        self._check_id(incoming.request_id)
        self._admit(served, incoming.priority)
        try:
            request = served.prompts.request(incoming, bounds)
            active = self._active_request(served, incoming, request, sink, arrived)
            active.record.tokenised_s = time.monotonic() - arrived
            active.session = incoming.session
            self._place(served, active)
        except BaseException:
            self.admission.num_inflight -= 1
            raise
        self._active[request.request_id] = active
        self._idle.clear()
        served.observer.admitted(active.record)
        return active

    def _place(self, served: ServedModel, active: ActiveRequest) -> None:
        if self._traces is None:
            served.placer.place(active)
            return
        active.span, active.request = self._traces.begin(active.request, active.record)
        try:
            served.placer.place(active)
        except PdserveError as error:
            self._traces.refused(active.span, active.record, error.reason)
            raise

    def _admit(self, served: ServedModel, priority: int) -> None:
        """A full queue gives up its least important request for a more important one."""
        waiting = sum([each.placer.num_waiting for each in self.served])
        full = waiting >= self.options.max_waiting and not self.admission.draining
        if full and (least := served.placer.least_important(priority)) is not None:
            message = "a more important request took its place in the queue"
            queue_s = served.placer.wait_s(least.request.priority)
            least.fail(Overloaded(message, leg="queue", retry_after_s=max(MIN_RETRY_AFTER_S, queue_s)))
            waiting -= 1
        asked_for = waiting and (self.options.max_queue_s < math.inf or self.admission.is_full(waiting))
        queue_s = served.placer.wait_s(priority) if asked_for else 0.0  # it looks at all who wait
        self.admission.enter(waiting, queue_s, self.options.max_queue_s)

    def _check_id(self, request_id: str) -> None:
        if not 0 < len(request_id) <= MAX_ID_CHARS:
            raise InvalidRequest(f"request_id must have 1 to {MAX_ID_CHARS} characters", param="request_id")
        if request_id in self._active:
            raise InvalidRequest(f"request_id {request_id!r} is in use", param="request_id")

    def _no_such_model(self, name: str) -> ModelNotFound:
        names = ", ".join(repr(served.name) for served in self.served)
        return ModelNotFound(f"the model {name!r} does not exist; this router serves {names}", param="model")

    def _active_request(
        self, served: ServedModel, incoming: Incoming, request: Request, sink: Sink, arrived: float
    ) -> ActiveRequest:
        return ActiveRequest(
            request,
            sink,
            partial(served.tokenizer.detokenizer, skip_special_tokens=incoming.skip_special_tokens),
            TextOptions.of(request.params, incoming.include_stop_str_in_output),
            self._record(served, incoming, request, arrived),
            served.around,
            arrived,
        )

    def _record(self, served: ServedModel, incoming: Incoming, request: Request, arrived: float) -> Record:
        arrived_at = time.time() - (time.monotonic() - arrived)
        record = Record(request.request_id, request.model, served.bounds().model.revision, arrived_at)
        record.policy = self.options.policy
        record.num_prompt_tokens = len(request.prompt_token_ids)
        record.num_choices = request.params.n
        record.priority = request.priority
        record.seed = request.params.seed
        record.seed_was_drawn = incoming.params.seed is None
        return record

    # ---- and its end ----

    def _on_end(self, active: ActiveRequest) -> None:
        if self._active.pop(active.request_id, None) is None:
            return  # it never came in
        self.admission.leave(active.record.ended_s or 0.0)
        self._by_name[active.request.model].observer.ended(active.record)
        self.catalog.add(active.record)
        if self._traces is not None and active.span is not None:
            self._traces.end(active.span, active.record)
        if active.error is not None:
            fields = {"request_id": active.request_id, "reason": active.error.reason, "leg": active.error.leg}
            log.warning("request failed: %s", active.error.message, extra=fields)
        if not self._active:
            self._idle.set()

    # ---- what happens beside ----

    def _on_fleet(self) -> None:
        self.prefixes.follow(self.fleet.links)
        self._fleet_changed.set()
        self._fleet_changed = asyncio.Event()
        for served in self.served:
            served.placer.changed()

    def _tick(self) -> None:
        self._ticking = self.loop.call_later(TICK_S, self._tick)
        self.prefixes.tick()
        for served in self.served:
            served.placer.tick()
