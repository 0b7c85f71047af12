"""What may be tuned in the Conductor (`router.scheduling.conductor`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ConductorRules:
    """What may be tuned."""

    lead_s: float = 0.005
    """An ask is bound this long before its worker is predicted to be free: a round trip, so that the worker never waits
    for the router. 0: only when it is free."""
    load_bound: float = 1.25
    """Times the mean of what the workers of a pool were given to compute lately: who had more gets nothing as long as
    another one can begin as soon."""
    load_half_life_s: float = 300.0
    load_slack_tokens: int = 8192
    """On top of the bound: one long prompt more than the others is no imbalance."""
    reuse_weight: float = 2.0
    """What a cached prefix counts for beyond the time that it saves this request, as a multiple of that time: whoever
    waits behind gains it too, and the conversation's blocks stay together. 0: each request for itself."""
    home_weight: float = 0.25
    """What a prompt's conversation had computed on a worker, and that has lost, counts for, as a multiple of the time
    that it took: a little, so that the conversation goes home to an idle worker, and hardly waits for a busy one."""
    alone_tokens: int = 256
    """An uncached suffix of at most so many tokens may run on a decode worker alone: a hand-over costs more."""
    patience_s: float = 1.5
    degrade_ratio: float = 2.0
    """Where a pair's first token is predicted later than `patience_s`, and than so many times that of a decode worker
    alone, the decode worker does it, at the cost of its batch's next tokens."""
    alone_without_prefill: bool = True
    """With no prefill worker at all decode workers do everything, rather than refuse it."""
