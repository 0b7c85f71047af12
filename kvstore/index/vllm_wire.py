"""vLLM's KV events as bytes: a batch is `[ts, [event, ..], data_parallel_rank]` in msgpack; an event is a map with a
"type" (vLLM since PR #42892, SGLang) or an array that starts with it (before). Block hashes are ints or bytes, as the
engine is set. Sources: vLLM `distributed/kv_events.py` (0.32), SGLang 0.5.23."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from kvstore.types import Tier
from pdserve.errors import ProtocolMismatch

EngineHash = int | bytes

_FIELDS = {
    "BlockStored": (
        "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name", "extra_keys",
        "group_idx",
    ),
    "BlockRemoved": ("block_hashes", "medium", "group_idx"),
    "AllBlocksCleared": (),
}  # fmt: skip
"""Fields of the array shape, in order; later ones than these don't matter here."""
_TIERS = {
    None: Tier.HBM,
    "GPU": Tier.HBM,
    "CPU": Tier.DRAM,
    "CPU_PINNED": Tier.DRAM,
    "STORAGE": Tier.DISK,
    "DISK": Tier.DISK,
}
"""By medium. Others (SGLang's EXTERNAL) are not the node's own."""


@dataclass(frozen=True, slots=True)
class Stored:
    hashes: tuple[EngineHash, ...]
    parent: EngineHash | None
    token_ids: tuple[int, ...]
    block_size: int
    tier: Tier
    lora_name: str
    extra_keys: tuple[tuple[Any, ...], ...]
    """One entry a block: what the engine hashed besides tokens, the LoRA name left out."""


@dataclass(frozen=True, slots=True)
class Removed:
    hashes: tuple[EngineHash, ...]
    tier: Tier


@dataclass(frozen=True, slots=True)
class Cleared:
    """The engine's whole cache is gone."""


Event = Stored | Removed | Cleared


@dataclass(frozen=True, slots=True)
class Batch:
    timestamp: float
    """Seconds by the engine's wall clock: with the number it tells one engine's life from another's."""
    events: tuple[Event, ...]
    skipped: int
    """Events of kinds, media or cache groups that the index does not follow."""


def decode_batch(payload: bytes) -> Batch:
    """Raises `ProtocolMismatch` when the bytes are not a batch of a known shape."""
    try:
        timestamp, raw, *_ = msgspec.msgpack.decode(payload)
        events = [_event(one) for one in raw]
        return Batch(float(timestamp), tuple(event for event in events if event), events.count(None))
    except (msgspec.DecodeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ProtocolMismatch(f"not a batch of vLLM's KV events: {error!r}") from error


def _event(raw: Any) -> Event | None:
    fields = dict(raw) if isinstance(raw, dict) else _named(raw)
    kind = fields.pop("type")
    if kind == "AllBlocksCleared":
        return Cleared()
    # Groups past the first belong to hybrid models: one group's blocks follow the prefix, and that is enough.
    if kind not in _FIELDS or fields.get("group_idx") not in (None, 0) or fields.get("medium") not in _TIERS:
        return None
    hashes, tier = tuple(fields["block_hashes"]), _TIERS[fields.get("medium")]
    return Removed(hashes, tier) if kind == "BlockRemoved" else _stored(fields, hashes, tier)


def _named(raw: list[Any]) -> dict[str, Any]:
    return {"type": raw[0], **dict(zip(_FIELDS.get(raw[0], ()), raw[1:], strict=False))}


def _stored(fields: dict[str, Any], hashes: tuple[EngineHash, ...], tier: Tier) -> Stored:
    tokens, size = tuple(fields["token_ids"]), int(fields["block_size"])
    if len(tokens) != len(hashes) * size:
        raise ValueError(f"{len(tokens)} tokens for {len(hashes)} blocks of {size}")
    lora = fields.get("lora_name") or ""
    extra = fields.get("extra_keys") or [None] * len(hashes)
    if len(extra) != len(hashes):
        raise ValueError(f"{len(extra)} extra keys for {len(hashes)} blocks")
    plain = tuple(tuple(item for item in keys or () if not (lora and item == lora)) for keys in extra)
    return Stored(hashes, fields.get("parent_block_hash"), tokens, size, tier, lora, plain)
