"""Reasons why a worker can't take a request."""

from __future__ import annotations

from pdserve.types import Role, WorkerInfo
from router.scheduling.base import Candidate, Need


def compatible(a: WorkerInfo, b: WorkerInfo) -> bool:
    """KV may move between these two: same model content and same physical layout."""
    return (
        a.fingerprint == b.fingerprint
        and a.model.revision == b.model.revision
        and a.model.name == b.model.name
        and a.block_tokens == b.block_tokens
    )


class HasRole:
    """The worker is in the role that is needed (roles may flip: it is asked anew each time)."""

    def refuse(self, worker: Candidate, need: Need) -> str | None:
        return None if worker.info.role is need.role else "role"


class NotDraining:
    def refuse(self, worker: Candidate, need: Need) -> str | None:
        return "draining" if worker.draining else None


class ServesModel:
    def refuse(self, worker: Candidate, need: Need) -> str | None:
        return None if worker.info.model.name == need.model else "model"


class FitsPool:
    """Prompt and output fit the worker's whole KV pool; else the request would wait for ever."""

    def refuse(self, worker: Candidate, need: Need) -> str | None:
        info = worker.info
        outputs = need.max_tokens if need.role is Role.DECODE else 0
        return "kv_pool_too_small" if need.num_prompt_tokens + outputs > info.num_blocks * info.block_tokens else None


class MatchesPartner:
    """The other half of the pair can hand KV over to it, or take it from it."""

    def refuse(self, worker: Candidate, need: Need) -> str | None:
        if need.partner is None or compatible(worker.info, need.partner):
            return None
        return "incompatible_kv"


class HasBlockSize:
    """The block keys that the router sends are those of the worker's blocks."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens

    def refuse(self, worker: Candidate, need: Need) -> str | None:
        return None if worker.info.block_tokens == self._block_tokens else "block_tokens"
