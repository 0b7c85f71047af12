"""Does a node have what the index says it has? Predicted against reported cached tokens, request by request.

A ratio well under one means that the index (or the node's events) lie: blocks are gone that nobody said were gone.
Reports above the prediction say nothing against a node. Each request's weight is its predicted tokens, and halves
after HALF_LIFE requests.
"""

from __future__ import annotations

from dataclasses import dataclass

HALF_LIFE = 16
"""Requests: a node that starts to lie is found after about as many, and one bad answer is forgiven after as many."""
DECAY = 0.5 ** (1 / HALF_LIFE)


@dataclass(frozen=True, slots=True)
class AuditPolicy:
    """When a node is aged out."""

    min_ratio: float = 0.5
    """Reported over predicted tokens. A block may rightly leave between prediction and use: at a full pool some 10 to
    20 % of predictions fail that way, a restart that went unnoticed fails all."""
    min_requests: int = 8
    """Requests with a prediction before a verdict."""


@dataclass(slots=True)
class _Account:
    incarnation: int
    requests: int = 0
    predicted: float = 0.0
    reported: float = 0.0


class Audit:
    """Keeps one account a node; a new incarnation starts with a clean one."""

    def __init__(self, policy: AuditPolicy) -> None:
        self._policy = policy
        self._accounts: dict[str, _Account] = {}

    def observe(self, node: str, incarnation: int, predicted_tokens: int, reported_tokens: int) -> bool:
        """One request's outcome; true if the node is no longer to be believed. Predictions of 0 say nothing."""
        account = self._accounts.get(node)
        if account is None or account.incarnation < incarnation:
            account = self._accounts[node] = _Account(incarnation)
        if predicted_tokens <= 0 or incarnation < account.incarnation:
            return False
        account.requests += 1
        account.predicted = account.predicted * DECAY + predicted_tokens
        account.reported = account.reported * DECAY + min(predicted_tokens, max(reported_tokens, 0))
        return account.requests >= self._policy.min_requests and self.ratio(node) < self._policy.min_ratio

    def ratio(self, node: str) -> float:
        """Reported over predicted tokens, recent requests counting most; 1 without evidence."""
        account = self._accounts.get(node)
        return account.reported / account.predicted if account and account.predicted else 1.0

    def forget(self, node: str) -> None:
        self._accounts.pop(node, None)
