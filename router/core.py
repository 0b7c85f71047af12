"""The router's core: what every face calls. Tokenise, admit, place, submit; the rest happens in callbacks.

Implements `router.base.Core`. One event loop, no task for a request.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from pdserve.errors import InvalidRequest, ModelNotFound, NoWorker, PdserveError
from pdserve.metrics import RouterMetrics
from pdserve.tokens import Tokenizer
from pdserve.types import ModelInfo, Request, Role
from router.admission import Admission
from router.base import Incoming, Sink
from router.catalog import Catalog, Record
from router.choice import TextOptions
from router.deadlines import Deadlines
from router.fleet import Fleet
from router.observer import Observer
from router.prompts import Bounds, PromptMaker
from router.request import ActiveRequest, Surroundings, Timeouts
from router.scheduling.base import Need
from router.scheduling.scheduler import Placed, Scheduler
from router.session import Link

MAX_ID_CHARS = 256

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CoreOptions:
    """`model` is the name that workers serve; `aliases` are further names for it."""

    model: str
    aliases: dict[str, str]
    disaggregate: bool
    block_tokens: int
    secret: bytes
    max_inflight: int
    timeouts: Timeouts
    num_records: int


@dataclass(frozen=True, slots=True)
class _Known:
    """What one state of the fleet means. `bounds` None: nobody has the model; `not_servable`: why it can't be used."""

    version: int
    bounds: Bounds | None
    models: tuple[ModelInfo, ...]
    not_servable: str | None


class RouterCore:
    """Made on the loop that it runs on."""

    def __init__(
        self,
        options: CoreOptions,
        tokenizer: Tokenizer,
        fleet: Fleet,
        scheduler: Scheduler[Link],
        metrics: RouterMetrics,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.catalog = Catalog(options.num_records)
        self.admission = Admission(options.max_inflight)
        self._options = options
        self._tokenizer = tokenizer
        self._fleet = fleet
        self._scheduler = scheduler
        self._observer = Observer(metrics, options.model, lambda: self.admission.num_inflight)
        self._prompts = PromptMaker(tokenizer, options.block_tokens, options.secret)
        self._active: dict[str, ActiveRequest] = {}
        self._deadlines = Deadlines(loop)
        self._around = Surroundings(loop, self._deadlines, options.timeouts, self._on_end)
        self._idle = asyncio.Event()
        self._idle.set()
        self._known = _Known(-1, None, (), None)

    # ---- Core ----

    def submit(self, incoming: Incoming, sink: Sink) -> ActiveRequest:
        arrived = self._around.loop.time()
        try:
            return self._submit(incoming, sink, arrived)
        except PdserveError as error:
            self._observer.refused(error)
            raise

    def models(self) -> Sequence[ModelInfo]:
        return self._now().models

    def token_text(self, model: str, token_id: int) -> tuple[str, bytes]:
        return self._tokenizer.token_text(token_id), self._tokenizer.token_bytes(token_id)

    def ready(self) -> str | None:
        if self.admission.draining:
            return "draining"
        return self._now().not_servable

    def record(self, request_id: str) -> dict[str, object] | None:
        found = self.catalog.find(request_id)
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

    # ---- a request's beginning ----

    def _submit(self, incoming: Incoming, sink: Sink, arrived: float) -> ActiveRequest:
        bounds = self._bounds(incoming.model)
        self._check_id(incoming.request_id)
        self.admission.enter()
        try:
            request = self._prompts.request(incoming, bounds)
            tokenised_s = self._around.loop.time() - arrived
            placed = self._place(request)
            active = self._active_request(incoming, request, sink, placed, arrived)
            active.record.tokenised_s = tokenised_s
            self._start(active, placed)
        except BaseException:
            self.admission.num_inflight -= 1
            raise
        self._active[request.request_id] = active
        self._idle.clear()
        self._observer.admitted(active.record)
        return active

    def _check_id(self, request_id: str) -> None:
        if not 0 < len(request_id) <= MAX_ID_CHARS:
            raise InvalidRequest(f"request_id must have 1 to {MAX_ID_CHARS} characters", param="request_id")
        if request_id in self._active:
            raise InvalidRequest(f"request_id {request_id!r} is in use", param="request_id")

    def _canonical(self, name: str) -> str | None:
        """The served model that a client's name means."""
        name = self._options.aliases.get(name, name)
        return name if name == self._options.model else None

    def _bounds(self, name: str) -> Bounds:
        """Raises `ModelNotFound` for a name nobody ever serves here, `NoWorker` while nobody does."""
        canonical = self._canonical(name)
        if canonical is None:
            raise ModelNotFound(
                f"the model {name!r} does not exist; this router serves {self._options.model!r}", param="model"
            )
        bounds = self._now().bounds
        if bounds is None:
            raise self._nobody_has(canonical)
        return bounds

    def _nobody_has(self, model: str) -> NoWorker:
        """Says what the workers do serve: a name that differs between configs is the usual cause."""
        others = sorted({link.info.model.name for link in self._fleet.links})
        served = f"; the connected ones serve {', '.join(others)}" if others else ""
        return NoWorker(f"no worker for {model} is connected{served}", leg="router", retry_after_s=1.0)

    def _place(self, request: Request) -> Placed[Link]:
        """One token is prefill's alone: a decode worker would have nothing to do."""
        max_tokens = request.params.max_tokens or 0
        alone = not self._options.disaggregate or max_tokens == 1
        role = Role.PREFILL if alone and self._options.disaggregate else Role.DECODE
        need = Need(role, request.model, len(request.prompt_token_ids), max_tokens)
        place = self._scheduler.place_one if alone else self._scheduler.place_pair
        return place(self._fleet.links, self._fleet.version, need)

    def _active_request(
        self, incoming: Incoming, request: Request, sink: Sink, placed: Placed[Link], arrived: float
    ) -> ActiveRequest:
        return ActiveRequest(
            request,
            sink,
            partial(self._tokenizer.detokenizer, skip_special_tokens=incoming.skip_special_tokens),
            TextOptions.of(request.params, incoming.include_stop_str_in_output),
            self._record(incoming, request, placed),
            self._around,
            arrived,
        )

    def _record(self, incoming: Incoming, request: Request, placed: Placed[Link]) -> Record:
        record = Record(request.request_id, request.model, "", time.time(), picks=placed.picks)
        record.num_prompt_tokens = len(request.prompt_token_ids)
        record.num_choices = request.params.n
        record.seed = request.params.seed
        record.seed_was_drawn = incoming.params.seed is None
        if placed.prefill is not None:
            info = placed.prefill.info
            record.revision = info.model.revision
            record.prefill_worker, record.prefill_incarnation = info.worker_id, info.incarnation
        if placed.decode is not None:
            info = placed.decode.info
            record.revision = info.model.revision
            record.decode_worker, record.decode_incarnation = info.worker_id, info.incarnation
        return record

    def _start(self, active: ActiveRequest, placed: Placed[Link]) -> None:
        if placed.prefill is not None and placed.decode is not None:
            active.start_pair(placed.prefill, placed.decode)
        elif placed.decode is not None:
            active.start_alone(placed.decode, "decode")
        elif placed.prefill is not None:
            active.start_alone(placed.prefill, "prefill")

    # ---- and its end ----

    def _on_end(self, active: ActiveRequest) -> None:
        self._active.pop(active.request_id, None)
        self.admission.leave(active.record.ended_s or 0.0)
        self._observer.ended(active.record)
        self.catalog.add(active.record)
        if active.error is not None:
            fields = {"request_id": active.request_id, "reason": active.error.reason, "leg": active.error.leg}
            log.warning("request failed: %s", active.error.message, extra=fields)
        if not self._active:
            self._idle.set()

    # ---- what the fleet can serve, looked at again only when it has changed ----

    def _now(self) -> _Known:
        if self._known.version != self._fleet.version:
            model = self._fleet.model(self._options.model)
            bounds = None if model is None else self._bounds_of(model)
            not_servable = self._why_not_servable()
            names = (self._options.model, *self._options.aliases) if model is not None and not_servable is None else ()
            listed = tuple(replace(model, name=name) for name in names) if model is not None else ()
            self._known = _Known(self._fleet.version, bounds, listed, not_servable)
        return self._known

    def _bounds_of(self, model: ModelInfo) -> Bounds:
        rooms = [
            link.info.num_blocks * link.info.block_tokens for link in self._fleet.of_model(model.name, Role.DECODE)
        ]
        return Bounds(model, min([model.max_model_len, max(rooms, default=model.max_model_len)]))

    def _why_not_servable(self) -> str | None:
        model = self._options.model
        if not self._options.disaggregate:
            return None if self._fleet.of_model(model, Role.DECODE) else f"no decode worker for {model} is ready"
        if any(True for _ in self._fleet.pairs(model)):
            return None
        for role in Role:
            if not self._fleet.of_model(model, role):
                return f"no {role.value} worker for {model} is ready"
        return f"no prefill and decode worker for {model} have the same KV layout"
