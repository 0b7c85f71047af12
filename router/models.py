"""Builds what serves each model: tokenizer, policy, placer, breakers, metrics. Which models there are is config."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from pdserve.engine.timing import timing_preset
from pdserve.metrics import RouterMetrics
from pdserve.tokens import Tokenizer
from router.breakers import BreakerRules, LinkBreakers
from router.core import MakeModels, RouterCore
from router.observer import Observer
from router.placer import Placer, PlacerOptions
from router.prompts import PromptMaker
from router.scheduling.base import Policy
from router.scheduling.conductor import Conductor
from router.scheduling.desk import Surroundings
from router.scheduling.forecasts import Predictor
from router.scheduling.links import LinkRates, Links
from router.scheduling.policies import make_policy
from router.scheduling.rules import ConductorRules
from router.served import ModelNames, ServedModel
from router.session import Link

CHUNK_TOKENS = 2048
"""Of a prompt in one step, as predictions take it: the workers' default budget of a step."""


@dataclass(frozen=True, slots=True)
class ModelSetup:
    """One model as it is to be served. `timing`: a preset of `pdserve.engine.timing`, from which predictions start;
    `kv_bytes_per_token` 0: a common size."""

    names: ModelNames
    tokenizer: Tokenizer
    timing: str
    kv_bytes_per_token: int = 0


@dataclass(frozen=True, slots=True)
class PlacementOptions:
    """`disaggregate`: auto, always or never."""

    policy: str
    disaggregate: str
    block_tokens: int
    secret: bytes
    breaker: BreakerRules
    seed: int = 0


def maker(setups: list[ModelSetup], options: PlacementOptions, metrics: RouterMetrics) -> MakeModels:
    """Raises `ConfigError` for a policy or a timing preset that does not exist."""
    predictors = [Predictor(timing_preset(setup.timing), CHUNK_TOKENS) for setup in setups]

    def make(core: RouterCore) -> list[ServedModel]:
        metrics.inflight.set_function(lambda: core.admission.num_inflight)
        return [
            _make_one(core, setup, predictor, options, metrics)
            for setup, predictor in zip(setups, predictors, strict=True)
        ]

    return make


def _make_one(
    core: RouterCore, setup: ModelSetup, predictor: Predictor, options: PlacementOptions, metrics: RouterMetrics
) -> ServedModel:
    name, clock = setup.names.name, time.monotonic
    rates = LinkRates(kv_bytes_per_token=setup.kv_bytes_per_token) if setup.kv_bytes_per_token else LinkRates()
    links = Links(rates)
    around = Surroundings(clock, predictor, core.prefixes, links, options.block_tokens)
    breakers = LinkBreakers(links, options.breaker, metrics, name, clock)
    policy: Policy[Link] = make_policy(options.policy, around, seed=options.seed, rules=_rules(options))
    placing = PlacerOptions(name, options.block_tokens, options.disaggregate != "never", core.options.grace_s)

    def count_grace(outcome: str) -> None:
        metrics.worker_grace.labels(name, outcome).inc()

    placer = Placer(placing, policy, core.fleet, core.prefixes, breakers, predictor, core.loop, count_grace)
    metrics.waiting.labels(name).set_function(lambda: placer.num_waiting)
    if isinstance(policy, Conductor):
        metrics.disaggregation_gain.labels(name).set_function(lambda: policy.disaggregation_gain_s)
    return ServedModel(
        setup.names,
        setup.tokenizer,
        PromptMaker(setup.tokenizer, options.block_tokens, options.secret),
        placer,
        core.surroundings(placer),
        Observer(metrics, name),
        core.fleet,
        needs_pairs=options.disaggregate == "always",
    )


def _rules(options: PlacementOptions) -> ConductorRules:
    """`always`: no request is given to a decode worker alone because that would be faster, or because no prefill worker
    is there; only when hand-over itself fails."""
    if options.disaggregate == "always":
        return ConductorRules(alone_tokens=0, degrade_ratio=math.inf, alone_without_prefill=False)
    return ConductorRules()
