"""What a disk tier reports: to metrics, and to the events that feed the index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from kvstore.types import BlockId


class DiskState(IntEnum):
    """How much of the tier works."""

    ON = 0
    READ_ONLY = 1
    """What is stored is served, nothing is added: the disk is full or takes no writes."""
    OFF = 2
    """Nothing is served: the folder is gone, or the disk fails."""


class Gone:
    """Why a block left the disk: the metric's label."""

    EVICTED = "evicted"
    REMOVED = "removed"
    CORRUPT = "corrupt"
    OFF = "off"
    """The tier was switched off."""


@dataclass(frozen=True, slots=True)
class DiskHealth:
    """The tier's state, and why it is not ON ("" when it is)."""

    state: DiskState
    reason: str = ""


@dataclass(frozen=True, slots=True)
class DiskStats:
    """A moment's figures; sizes in bytes."""

    blocks: int
    live_bytes: int
    """Of records that can be served, headers and padding included."""
    file_bytes: int
    capacity_bytes: int
    segments: int
    health: DiskHealth


class DiskObserver(Protocol):
    """Told what happens, by any thread: return at once, and do not call the tier. `stored` and `removed` come under
    the tier's lock, so that their order is the true one."""

    def stored(self, ids: Sequence[BlockId]) -> None: ...

    def removed(self, block: BlockId, reason: str) -> None:
        """`reason` is one of `Gone`."""

    def corrupt(self, block: BlockId | None, reason: str) -> None:
        """A record failed its check, when read or at the start's scan (then its block may be unknown).

        `reason` is one word: header_digest, payload_digest, truncated, unreadable, version, ...
        """

    def moved(self, direction: str, nbytes: int, seconds: float) -> None:
        """`direction` is "read", "write" or "compact"; `nbytes` counts payloads."""

    def health(self, health: DiskHealth) -> None: ...


class Silent:
    """An observer that tells nobody."""

    def stored(self, ids: Sequence[BlockId]) -> None: ...

    def removed(self, block: BlockId, reason: str) -> None: ...

    def corrupt(self, block: BlockId | None, reason: str) -> None: ...

    def moved(self, direction: str, nbytes: int, seconds: float) -> None: ...

    def health(self, health: DiskHealth) -> None: ...
