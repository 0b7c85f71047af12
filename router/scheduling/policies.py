"""Policies by name. A baseline is data: two profiles of filters, scorers and a picker."""

from __future__ import annotations

import random
from collections.abc import Callable

from pdserve.errors import ConfigError
from pdserve.types import Role
from router.scheduling.base import Candidate, Picker, Policy, Profile, Weighted, WorkerT
from router.scheduling.conductor import Conductor
from router.scheduling.desk import Surroundings
from router.scheduling.immediate import Immediate
from router.scheduling.pickers import MaxScore, RoundRobin, TwoChoices
from router.scheduling.rules import ConductorRules
from router.scheduling.scheduler import least_loaded, standing_and_filters
from router.scheduling.scorers import Equal, LeastSeqs, LeastTokens, LongestPrefix, SameSession, context_tokens
from router.scheduling.scorers import prefill_tokens as prefill_tokens_of

DEFAULT = "conductor"
Profiles = Callable[[int, int], dict[Role, Profile]]
"""(seed, block_tokens) -> a profile a role."""


def _profiles(
    block_tokens: int, prefill: tuple[Weighted, ...], decode: tuple[Weighted, ...], picker: Callable[[], Picker]
) -> dict[Role, Profile]:
    standing, filters = standing_and_filters(block_tokens)
    return {
        Role.PREFILL: Profile(standing, filters, prefill, picker()),
        Role.DECODE: Profile(standing, filters, decode, picker()),
    }


def _tokens(count: Callable[[Candidate], int]) -> tuple[Weighted, ...]:
    return (Weighted("least_tokens", LeastTokens(count), 2.0), Weighted("least_seqs", LeastSeqs(), 1.0))


def _round_robin(seed: int, block_tokens: int) -> dict[Role, Profile]:
    equal = (Weighted("equal", Equal()),)
    return _profiles(block_tokens, equal, equal, RoundRobin)


def _power_of_two(seed: int, block_tokens: int) -> dict[Role, Profile]:
    picker = TwoChoices(random.Random(seed))
    return _profiles(block_tokens, _tokens(prefill_tokens_of), _tokens(context_tokens), lambda: picker)


def _prefix_only(seed: int, block_tokens: int) -> dict[Role, Profile]:
    picker = MaxScore(random.Random(seed))
    prefix = (Weighted("longest_prefix", LongestPrefix()),)
    return _profiles(block_tokens, prefix, _tokens(context_tokens), lambda: picker)


def _session(seed: int, block_tokens: int) -> dict[Role, Profile]:
    picker = MaxScore(random.Random(seed))
    session = Weighted("same_session", SameSession(), 10.0)
    prefill, decode = _tokens(prefill_tokens_of), _tokens(context_tokens)
    return _profiles(block_tokens, (session, *prefill), decode, lambda: picker)


BASELINES: dict[str, Profiles] = {
    "round_robin": _round_robin,
    "least_loaded": least_loaded,
    "power_of_two": _power_of_two,
    "prefix_only": _prefix_only,
    "session": _session,
}
NAMES = (DEFAULT, *BASELINES)


def make_policy(
    name: str, around: Surroundings, *, seed: int = 0, rules: ConductorRules | None = None
) -> Policy[WorkerT]:
    """A policy by name; `seed` is for those that draw lots. Raises `ConfigError` (key "policy")."""
    if name == DEFAULT:
        return Conductor(around, rules)
    if name not in BASELINES:
        raise ConfigError(f"no placement policy {name!r}; known: {', '.join(NAMES)}", key="policy")
    return Immediate(around, BASELINES[name](seed, around.block_tokens))
