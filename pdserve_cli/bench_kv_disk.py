"""Cold reads of the disk tier, checksum on, beside bare preadv of the same disk, for `pdserve bench kv`.

The same bytes stand in a tier and in one plain file. `tier` is `get_many`; `preadv_1` and `preadv_4` read the file with
one call a block, by one thread and by as many as the tier has. All by O_DIRECT, so the page cache has no part in it; a
virtual disk's host may cache what this machine does not: compare the ways of one run, not runs.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from kvstore.disk import DiskOptions, DiskTier
from kvstore.types import BlockId
from pdserve_cli.bench_ways import Way

SIZES = {"64KB": 64 << 10, "1MB": 1 << 20, "16MB": 16 << 20}
THREADS = 4
TOTAL = 128 << 20
"""One request's blocks: what one `get_many` brings."""


@contextmanager
def disk_ways(sizes: Sequence[str], folder: Path | None) -> Iterator[dict[str, dict[str, Way]]]:
    """Ways by block size."""
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder, prefix="pdserve-bench-")))
        yield {size: _ways(scratch / size, SIZES[size], stack) for size in sizes}


def _ways(folder: Path, block_bytes: int, stack: ExitStack) -> dict[str, Way]:
    count = TOTAL // block_bytes
    blocks = np.frombuffer(mmap.mmap(-1, TOTAL), dtype=np.uint8).reshape(count, block_bytes)
    blocks[:] = np.random.default_rng(0).integers(0, 256, blocks.shape, dtype=np.uint8)
    ids = [BlockId(n.to_bytes(16, "little"), b"benchmark") for n in range(count)]
    tier = DiskTier(folder, DiskOptions(4 * TOTAL, block_bytes, direct=True, threads=THREADS))
    stack.callback(tier.close)
    tier.put_many(ids, list(blocks))
    plain = folder / "plain"
    plain.write_bytes(blocks.data)
    os.sync()
    fd = os.open(plain, os.O_RDONLY | os.O_DIRECT)
    stack.callback(os.close, fd)
    pool = stack.enter_context(ThreadPoolExecutor(THREADS))

    def by_tier() -> None:
        reads = tier.get_many(ids, list(blocks))
        assert all(reads.found), reads.errors

    def bare(threads: int) -> None:
        def read(first: int) -> None:
            for n in range(first, count, threads):
                os.preadv(fd, [blocks[n].data], n * block_bytes)

        list(pool.map(read, range(threads)))

    return {
        "tier": Way(TOTAL, by_tier),
        "preadv_1": Way(TOTAL, lambda: bare(1)),
        f"preadv_{THREADS}": Way(TOTAL, lambda: bare(THREADS)),
    }
