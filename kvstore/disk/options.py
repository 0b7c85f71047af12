"""A disk tier's settings."""

from __future__ import annotations

from dataclasses import dataclass

from kvstore.disk.footer import footer_bytes
from kvstore.disk.record import PAGE, record_bytes
from pdserve.errors import ConfigError

MIN_SEGMENTS = 4
"""One that is written, room for one more while a compaction copies, and two that hold blocks."""
SEGMENTS = 64
"""Of a large tier: few enough for a process's open files, many enough that a compaction moves little."""
SEGMENT_BYTES = 64 << 20
"""At least, where the capacity allows: a file system places it in few extents."""


@dataclass(frozen=True, slots=True)
class DiskOptions:
    """Raises `ConfigError` when the capacity is too small for the blocks."""

    capacity_bytes: int
    """The tier's files together never exceed it."""
    block_bytes: int
    """The largest block that will be stored."""
    segment_bytes: int = 0
    """0: a 64th of the capacity, at least 64 MiB and at most a quarter of the capacity."""
    direct: bool = False
    """O_DIRECT: past the page cache, for a disk tier much larger than memory. Buffers that are page-aligned and whole
    pages long are moved without a copy."""
    fsync_on_seal: bool = False
    """Also survive a power cut with all sealed segments. Without it a power cut may lose blocks, never change them."""
    threads: int = 4
    """That read and write. Four reach what the disk gives (2.7 GB/s written against 1.4 to 1.8 by one)."""
    retry_s: float = 5.0
    """How long a full, read-only or failed disk is left alone before the next put tries it."""

    def __post_init__(self) -> None:
        if self.block_bytes < 1 or self.threads < 1:
            raise ConfigError("block_bytes and threads must be positive", key="kv.disk")
        need = record_bytes(self.block_bytes) + footer_bytes(1)
        if self.segment_size < need or self.capacity_bytes < MIN_SEGMENTS * self.segment_size:
            raise ConfigError(
                f"a disk tier of {self.capacity_bytes} bytes in segments of {self.segment_size} is too small for "
                f"blocks of {self.block_bytes}: give it at least {MIN_SEGMENTS * max(need, self.segment_size)}",
                key="kv.disk.capacity_bytes",
            )

    @property
    def segment_size(self) -> int:
        """Bytes a segment file may grow to, whole pages."""
        wanted = self.segment_bytes or min(
            max(SEGMENT_BYTES, self.capacity_bytes // SEGMENTS), self.capacity_bytes // 4
        )
        return wanted // PAGE * PAGE
