"""One model that the router serves: its names, its tokenizer, its bounds, and the placer of its requests.

Models share the fleet, the prefix index and the bound on requests; nothing else. A model's workers are those that say
its name in their Hello; only workers of equal revision and layout are ever paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pdserve.errors import NoWorker
from pdserve.tokens import Tokenizer
from pdserve.types import ModelInfo, Role
from router.fleet import Fleet
from router.observer import Observer
from router.placer import Placer
from router.prompts import Bounds, PromptMaker
from router.surroundings import Surroundings


@dataclass(frozen=True, slots=True)
class ModelNames:
    """`name` is what workers serve; `aliases` are further names for it."""

    name: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Known:
    """What one state of the fleet means. `bounds` None: nobody has the model; `not_servable`: why it can't be used."""

    version: int
    bounds: Bounds | None
    models: tuple[ModelInfo, ...]
    not_servable: str | None


class ServedModel:
    """`needs_pairs`: one decode worker alone does not serve it."""

    def __init__(
        self,
        names: ModelNames,
        tokenizer: Tokenizer,
        prompts: PromptMaker,
        placer: Placer,
        around: Surroundings,
        observer: Observer,
        fleet: Fleet,
        *,
        needs_pairs: bool,
    ) -> None:
        self.name = names.name
        self.names = (names.name, *names.aliases)
        self.tokenizer = tokenizer
        self.prompts = prompts
        self.placer = placer
        self.around = around
        self.observer = observer
        self._fleet = fleet
        self._needs_pairs = needs_pairs
        self._known = _Known(-1, None, (), None)
        self._last_bounds: Bounds | None = None
        """Of the last workers there were."""

    def bounds(self) -> Bounds:
        """Raises `NoWorker` while nobody has the model, unless a worker like the last ones may come soon."""
        bounds = self._now().bounds or (self._last_bounds if self._may_come() else None)
        if bounds is None:
            raise self._nobody_has()
        self._last_bounds = bounds
        return bounds

    @property
    def unknown(self) -> bool:
        """Nothing can be said of a request yet: no worker was ever connected, but one may come soon."""
        return self._last_bounds is None and self._now().bounds is None and self._may_come()

    def _may_come(self) -> bool:
        return any(self.placer.expects(role) for role in Role)

    def infos(self) -> Sequence[ModelInfo]:
        """One by each of its names; none while it can't be served."""
        return self._now().models

    def why_not(self) -> str | None:
        """None when requests can be served."""
        return self._now().not_servable

    def _nobody_has(self) -> NoWorker:
        """Says what the workers do serve: a name that differs between configs is the usual cause."""
        others = sorted({link.info.model.name for link in self._fleet.links})
        served = f"; the connected ones serve {', '.join(others)}" if others else ""
        return NoWorker(f"no worker for {self.name} is connected{served}", leg="router", retry_after_s=1.0)

    # ---- looked at again only when the fleet has changed ----

    def _now(self) -> _Known:
        if self._known.version != self._fleet.version:
            model = self._fleet.model(self.name)
            bounds = None if model is None else self._bounds_of(model)
            not_servable = self._why_not_servable()
            names = self.names if model is not None and not_servable is None else ()
            listed = tuple(replace(model, name=name) for name in names) if model is not None else ()
            self._known = _Known(self._fleet.version, bounds, listed, not_servable)
        return self._known

    def _bounds_of(self, model: ModelInfo) -> Bounds:
        rooms = [
            link.info.num_blocks * link.info.block_tokens for link in self._fleet.of_model(model.name, Role.DECODE)
        ]
        return Bounds(model, min([model.max_model_len, max(rooms, default=model.max_model_len)]))

    def _why_not_servable(self) -> str | None:
        if not self._needs_pairs:
            if self._fleet.of_model(self.name, Role.DECODE):
                return None
            return f"no decode worker for {self.name} is ready"
        if any(True for _ in self._fleet.pairs(self.name)):
            return None
        for role in Role:
            if not self._fleet.of_model(self.name, role):
                return f"no {role.value} worker for {self.name} is ready"
        return f"no prefill and decode worker for {self.name} have the same KV layout"
