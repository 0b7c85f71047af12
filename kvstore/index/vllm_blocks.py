"""From the engine's names of blocks to ours.

An engine hashes blocks in a way of its own (algorithm, seed, truncation differ by version), but says which tokens a
block holds and which block came before: so our keys are computed anew, from a root that is given. What the engine says
later by hash alone (removed) is looked up in a bounded map.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvstore.index.base import NodeSnapshot, Section, split_keys
from kvstore.index.vllm_wire import Cleared, EngineHash, Event, Removed, Stored
from kvstore.types import KEY_BYTES, EventKind, StoreEvent, Tier
from pdserve.block_keys import block_keys
from pdserve.errors import ConfigError

RootOf = Callable[[str, tuple[Any, ...]], bytes | None]
"""(LoRA name, extra keys of a chain's first block) -> our chain's root; None: not known, such chains are left out."""

DEFAULT_MAX_BLOCKS = 1 << 20
"""Engine blocks followed (some 250 bytes each): more than an engine of a few hundred GB of KV has."""


@dataclass(frozen=True, slots=True)
class ModelRoots:
    """The roots of one model. `by_lora[""]` is that of the plain model (`pdserve.block_keys.root_key`)."""

    by_lora: Mapping[str, bytes]
    salt_is_root: bool = False
    """Only for our own vLLM workers: they pass a request's root, in hex, as vLLM's `cache_salt`."""

    def __call__(self, lora_name: str, extra_keys: tuple[Any, ...]) -> bytes | None:
        if not extra_keys:
            return self.by_lora.get(lora_name)
        if not self.salt_is_root or len(extra_keys) != 1 or not isinstance(extra_keys[0], str):
            return None
        return _from_hex(extra_keys[0])


def _from_hex(text: str) -> bytes | None:
    try:
        root = bytes.fromhex(text)
    except ValueError:
        return None
    return root if len(root) == KEY_BYTES else None


@dataclass(slots=True)
class TranslationCounts:
    orphans: int = 0
    """Blocks whose parent is not known: left out."""
    untranslatable: int = 0
    """Blocks with a salt, an image or a LoRA that we have no root for: left out."""
    unknown_removals: int = 0
    evicted: int = 0
    """Blocks let go because the map was full."""


@dataclass(slots=True)
class _Block:
    keys: bytes
    """Ours, packed: one, or several where the engine's block is a multiple of ours."""
    tiers: set[Tier] = field(default_factory=set)


class VllmBlocks:
    """Translates one engine's events to a gapless stream of ours. Its own content can be had as a snapshot."""

    def __init__(
        self, roots: RootOf, *, block_tokens: int, fingerprint: bytes, max_blocks: int = DEFAULT_MAX_BLOCKS
    ) -> None:
        self.counts = TranslationCounts()
        self.sequence = 0
        """Of the last event given out."""
        self._roots = roots
        self._block_tokens = block_tokens
        self._fingerprint = fingerprint
        self._max_blocks = max_blocks
        self._blocks: OrderedDict[EngineHash, _Block] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def translate(self, events: Iterable[Event]) -> list[StoreEvent]:
        """Raises `ConfigError` (key "block_tokens") if the engine's blocks do not divide into ours."""
        return [ours for event in events for ours in self._translate(event)]

    def clear(self) -> list[StoreEvent]:
        """The engine's cache, or what we know of it, is void."""
        tiers = sorted({tier for block in self._blocks.values() for tier in block.tiers})
        self._blocks.clear()
        return [self._emit(EventKind.CLEARED, tier, b"") for tier in tiers]

    def restart(self) -> None:
        """A new incarnation of the engine: empty, and counted from 1 again."""
        self._blocks.clear()
        self.sequence = 0

    def snapshot(self, node: str, incarnation: int) -> NodeSnapshot:
        sections = []
        for tier in Tier:
            keys = b"".join(block.keys for block in self._blocks.values() if tier in block.tiers)
            if keys:
                sections.append(Section(tier, self._fingerprint, keys))
        return NodeSnapshot(node, incarnation, self.sequence, tuple(sections))

    def _translate(self, event: Event) -> Iterator[StoreEvent]:
        match event:
            case Stored():
                yield from self._store(event)
                yield from self._shrink()
            case Removed():
                yield from self._remove(event)
            case Cleared():
                yield from self.clear()

    def _store(self, event: Stored) -> Iterator[StoreEvent]:
        before = self._key_before(event)
        if before is None:
            return
        known = self._translatable(event)
        self.counts.untranslatable += len(event.hashes) - known
        keys = block_keys(before, event.token_ids[: known * event.block_size], self._block_tokens)
        each = event.block_size // self._block_tokens * KEY_BYTES
        for number, name in enumerate(event.hashes[:known]):
            yield from self._put(name, keys[number * each : (number + 1) * each], event.tier)
        if keys:
            yield self._emit(EventKind.STORED, event.tier, keys, before)

    def _key_before(self, event: Stored) -> bytes | None:
        """Our key of the block before the event's first; None if it can't be known."""
        if event.block_size % self._block_tokens:
            raise ConfigError(
                f"the engine's blocks of {event.block_size} tokens do not divide into ours of {self._block_tokens}; "
                "start it with that block size",
                key="block_tokens",
            )
        if event.parent is None:
            root = self._roots(event.lora_name, event.extra_keys[0] if event.extra_keys else ())
            self.counts.untranslatable += len(event.hashes) if root is None else 0
            return root
        parent = self._blocks.get(event.parent)
        if parent is None:
            self.counts.orphans += len(event.hashes)
            return None
        self._blocks.move_to_end(event.parent)
        return parent.keys[-KEY_BYTES:]

    def _translatable(self, event: Stored) -> int:
        """Leading blocks that are made of tokens alone. A first block's extra keys are in its root."""
        first = 1 if event.parent is None else 0
        return next((n for n in range(first, len(event.hashes)) if event.extra_keys[n]), len(event.hashes))

    def _put(self, name: EngineHash, keys: bytes, tier: Tier) -> Iterator[StoreEvent]:
        block = self._blocks.get(name)
        if block is not None and block.keys != keys:  # two chains under one short hash: the older one is let go
            yield from self._let_go(name)
            block = None
        if block is None:
            block = self._blocks[name] = _Block(keys)
        block.tiers.add(tier)

    def _remove(self, event: Removed) -> Iterator[StoreEvent]:
        gone = []
        for name in event.hashes:
            block = self._blocks.get(name)
            if block is None or event.tier not in block.tiers:
                self.counts.unknown_removals += 1
                continue
            gone.append(block.keys)
            block.tiers.discard(event.tier)
            if not block.tiers:
                del self._blocks[name]
        if gone:
            yield self._emit(EventKind.REMOVED, event.tier, b"".join(gone))

    def _shrink(self) -> Iterator[StoreEvent]:
        """A block that leaves the map leaves the index too: its removal could not be understood any more."""
        while len(self._blocks) > self._max_blocks:
            self.counts.evicted += 1
            yield from self._let_go(next(iter(self._blocks)))

    def _let_go(self, name: EngineHash) -> Iterator[StoreEvent]:
        block = self._blocks.pop(name)
        for tier in sorted(block.tiers):
            yield self._emit(EventKind.REMOVED, tier, block.keys)

    def _emit(self, kind: EventKind, tier: Tier, keys: bytes, before: bytes = b"") -> StoreEvent:
        self.sequence += 1
        each = tuple(split_keys(keys))
        parents: Sequence[bytes] = (before, *each[:-1]) if before else ()
        return StoreEvent(self.sequence, kind, tier, each, self._fingerprint, tuple(parents))
