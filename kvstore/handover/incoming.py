"""One request on its way in: what an `ImportLedger` knows of it, and the limits that it goes by."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvstore.handover.actions import Reserve
from kvstore.handover.chunk import Chunk, ChunkState
from pdserve.engine.base import ImportTarget
from pdserve.types import KVManifest, KVTicket
from pdserve.wire.session import FirstOutput


@dataclass(frozen=True, slots=True)
class ImportLimits:
    """How long an importer waits, in seconds, and how much it pulls at once."""

    announce_s: float = 600.0
    """For the next ticket, manifest or first output. As long as an exporter may compute (`ExportLimits.compute_s`)."""
    room_s: float = 120.0
    """For local blocks, or for credits."""
    bind_s: float = 10.0
    pull_s: float = 120.0
    """For the next of a request's pulls to end. A backstop: the transport's own progress bound (10 s) comes first."""
    max_bytes_in_flight: int = 256 << 20
    """A larger chunk is pulled when nothing else is. 256 MiB are about 100 ms of tcp here: enough to keep it busy."""


class InChunk(Chunk):
    """A chunk and where it goes."""

    __slots__ = ("arrived", "asked", "manifest", "target")

    def __init__(self, manifest: KVManifest) -> None:
        super().__init__(manifest.chunk_index)
        self.to(ChunkState.COMPUTING)
        self.to(ChunkState.EXPORTED)
        self.manifest = manifest
        self.target: ImportTarget | None = None
        self.asked = False
        """Whether the engine was asked for blocks."""
        self.arrived = False
        """Its bytes are here and verified."""

    @property
    def num_to_pull(self) -> int:
        """Blocks; 0 while its target is unknown."""
        return len(self.target.blocks) - self.target.num_cached_blocks if self.target else 0

    def covers(self, reserve: Reserve) -> bool:
        """Whether these are its tokens."""
        return (self.manifest.first_token, self.manifest.num_tokens) == (reserve.first_token, reserve.num_tokens)

    def is_here(self) -> bool:
        """Arrived, or there is nothing to pull."""
        if self.state is ChunkState.EXPORTED and self.target is not None and not self.num_to_pull:
            self.to(ChunkState.PULLING)
            self.arrived = True
        return self.state is ChunkState.PULLING and self.arrived

    @property
    def pullable(self) -> bool:
        return self.state is ChunkState.EXPORTED and self.num_to_pull > 0


@dataclass(slots=True)
class Incoming:
    """One request's hand-over, seen from here."""

    handle: int
    num_prompt_tokens: int
    progress_at: float
    ticket: KVTicket | None = None
    seen: set[bytes] = field(default_factory=set)
    """Ids of all tickets so far, the current one included."""
    early: list[KVManifest] = field(default_factory=list)
    chunks: dict[int, InChunk] = field(default_factory=dict)
    outputs: tuple[FirstOutput, ...] = ()
    binding: bool = False
    bound: bool = False
    renew_at: float = 0.0
    pulls: dict[int, InChunk] = field(default_factory=dict)
    """Under way, by pull id; of a replaced ticket too."""
    num_committed_chunks: int = 0
    num_committed_tokens: int = 0
    ended: bool = False
    """Failed or cancelled: only waits for its pulls to end."""

    @property
    def complete(self) -> bool:
        return self.num_committed_tokens == self.num_prompt_tokens

    @property
    def replacing(self) -> bool:
        """Whether a replaced ticket's pull still writes into the target."""
        return any(self.chunks.get(chunk.index) is not chunk for chunk in self.pulls.values())

    def next_pull(self) -> InChunk | None:
        if self.ended or not self.bound or self.replacing:
            return None
        return next((chunk for _, chunk in sorted(self.chunks.items()) if chunk.pullable), None)

    def waits_for(self, limits: ImportLimits) -> tuple[str, float]:
        """What it waits for now, and for how long at most."""
        if self.pulls:
            return "a pull to end", limits.pull_s
        if self.binding:
            return "the exporter to bind the ticket", limits.bind_s
        if any(chunk.state is ChunkState.EXPORTED for chunk in self.chunks.values()):
            return "room for its blocks", limits.room_s
        return "prefill's next announcement", limits.announce_s
