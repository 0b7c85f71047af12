"""What the two sides tell each other: transfers as the engine describes them, copies as the scheduler orders them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pdserve.engine.vllm.requests import PARAMS_KEY


@dataclass(frozen=True, slots=True)
class Load:
    """What staging holds of a prefix: tokens from block `first_block` on, up to `num_tokens`. What comes before must
    be in vLLM's own cache."""

    slot: int
    first_block: int
    blocks: tuple[int, ...]
    """Staging blocks for blocks `first_block` and on."""
    generations: tuple[int, ...]
    num_tokens: int
    digests: tuple[str, ...] = ()
    """xxh3-128 in hex, one a block; empty: not checked."""


@dataclass(frozen=True, slots=True)
class Save:
    """A request's KV on its way out, from block `first_block` on. With `num_tokens` it is a prompt that is exported:
    all of it, a partial last block too. Without, it is whole blocks for as long as the request runs."""

    slot: int
    first_block: int
    blocks: tuple[int, ...]
    """Staging blocks for blocks `first_block` and on; what comes after them is granted on the board."""
    num_tokens: int = 0


@dataclass(frozen=True, slots=True)
class LoadCopy:
    """Load tokens [first, last) into these blocks of vLLM's, which start at token 0."""

    request_id: str
    load: Load
    first: int
    last: int
    vllm_blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SaveCopy:
    """Save all tokens before `last` that were not saved yet. `final`: nothing comes after."""

    save: Save
    last: int
    final: bool
    vllm_blocks: tuple[int, ...]


@dataclass(slots=True)
class Transfers:
    """What one vLLM request does."""

    load: Load | None = None
    save: Save | None = None


def transfers_of(kv_transfer_params: Mapping[str, Any] | None) -> Transfers:
    """Of a request that is not ours: none."""
    ours = (kv_transfer_params or {}).get(PARAMS_KEY) or {}
    load, save = ours.get("load"), ours.get("save")
    return Transfers(None if load is None else _load(load), None if save is None else _save(save))


def _load(raw: Mapping[str, Any]) -> Load:
    lists = ("blocks", "generations", "digests")
    return Load(**{**raw, **{key: tuple(raw[key]) for key in lists}})


def _save(raw: Mapping[str, Any]) -> Save:
    return Save(**{**raw, "blocks": tuple(raw["blocks"])})


@dataclass(slots=True)
class Copies:
    """What the workers do in one step."""

    saves: list[SaveCopy] = field(default_factory=list)
    loads: list[LoadCopy] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    """Slots of transfers that end without (further) copies."""
