"""How a cluster's KV found its way back: pools so small that every tier is needed, and what each tier gave."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pdserve_cli.cluster import Cluster, Member, total

TIERS = ("hbm", "dram", "disk", "peer")
BLOCK_TOKENS = 16
_DISK_BLOCKS = 20_000
"""Room of a disk tier: more than any run writes, so that nothing but DRAM is short."""
_RECORD_BYTES = 4096
"""Of a disk record beside the block: header page and padding are at most this each."""

_WATERMARKS = {"high_watermark": 0.5, "low_watermark": 0.25}
"""Blocks go to disk early: with the usual few per cent of a tiny pool free, most of a prompt would find no room."""


@dataclass(frozen=True, slots=True)
class TinyPools:
    """Sizes in blocks. A worker's pool takes the longest request and little else, so that of many prompts most are
    gone when they come again; a store's DRAM is smaller still, so that most of what comes back comes from disk."""

    worker: int
    dram: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> TinyPools:
        """For requests of these many tokens (prompt and output)."""
        blocks = [-(-length // BLOCK_TOKENS) for length in lengths]
        return cls(worker=max(max(blocks) * 5 // 4 + 8, sum(blocks) // 6), dram=max(96, max(blocks) // 2))

    def store(self, block_bytes: int, disk: str) -> dict[str, object]:
        """Config of a store with a disk tier in this folder."""
        record = block_bytes + 2 * _RECORD_BYTES
        capacity = max(64 << 20, _DISK_BLOCKS * record)
        return {"num_blocks": self.dram, **_WATERMARKS, "disk.path": disk, "disk.capacity_bytes": capacity}


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder for disk tiers."""
    return tempfile.TemporaryDirectory(prefix="pdserve-disk-", dir=Path(tempfile.gettempdir()))


async def hits(cluster: Cluster, members: Iterable[Member] | None = None) -> dict[str, int]:
    """Blocks that these processes (all of the cluster's) found since their start, by tier."""
    found = dict.fromkeys(TIERS, 0)
    for member in cluster.members if members is None else members:
        samples = await cluster.metrics(member)
        for tier, blocks in _hits_of(member.role, samples).items():
            found[tier] += int(blocks)
    return found


def _hits_of(role: str, samples: Mapping[str, float]) -> dict[str, float]:
    """DRAM: of the node's own store, where what it brings up from disk is read as well. Disk is told by the store that
    brought the blocks up, for whoever asked."""
    if role == "kvstore":
        return {"disk": total(samples, "pdserve_kvstore_hit_blocks_total", tier="disk")}
    tiers = ("hbm", "dram", "disk", "peer")
    tokens = {tier: total(samples, "pdserve_prefix_tokens_total", tier=tier) for tier in tiers}
    tokens["dram"] += tokens.pop("disk")
    return {tier: count / BLOCK_TOKENS for tier, count in tokens.items()}
