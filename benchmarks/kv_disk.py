"""How fast the disk tier reads cold blocks, checks included, beside bare preadv of the same disk.

    python benchmarks/kv_disk.py --json

For each block size the same number of bytes stands in a tier and in one plain file. Every round runs each way once, in
another order, so that all see the same machine; figures are medians over the rounds. `bare_1` and `bare_4` are preadv,
one call a block, by one thread and by as many as the tier has; `direct` means O_DIRECT, `buffered` through the page
cache after it was told to forget the file. `in_order` reads blocks as they were written, as a request's blocks mostly
are, `scattered` in random order. A virtual disk's host may cache what this machine does not: compare the ways of one
run, not runs.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))

from kvstore.disk import DiskOptions, DiskTier
from kvstore.types import BlockId

SIZES = {"64K": 64 << 10, "1M": 1 << 20, "16M": 16 << 20}
THREADS = 4
REQUEST_BYTES = 64 << 20
"""What one `get_many` brings: a prompt's blocks."""

Blocks = NDArray[np.uint8]


def name(n: int) -> BlockId:
    return BlockId(n.to_bytes(16, "little"), b"benchmark")


class Disk:
    """One block size: a tier for each kind of I/O, a plain file, and the memory that is read into."""

    def __init__(self, folder: Path, block_bytes: int, total: int) -> None:
        self.count = total // block_bytes
        self.block_bytes = block_bytes
        self.folder = folder
        memory = mmap.mmap(-1, self.count * block_bytes)
        self.blocks: Blocks = np.frombuffer(memory, dtype=np.uint8).reshape(self.count, block_bytes)
        self.blocks[:] = np.random.default_rng(0).integers(0, 256, self.blocks.shape, dtype=np.uint8)
        self.plain = folder / "plain"
        self.plain.write_bytes(self.blocks.data)
        self.digest = hash(self.blocks.tobytes())
        self.pool = ThreadPoolExecutor(THREADS)
        self.tiers = {kind: self._fill(kind, total) for kind in ("direct", "buffered")}
        os.sync()

    def _fill(self, kind: str, total: int) -> DiskTier:
        settings = DiskOptions(4 * total, self.block_bytes, direct=kind == "direct", threads=THREADS)
        tier = DiskTier(self.folder / kind, settings)
        tier.put_many([name(n) for n in range(self.count)], list(self.blocks))
        return tier

    def forget(self) -> None:
        """Drop the files' pages from the page cache."""
        for path in (self.plain, *self.folder.glob("*/*.kvseg")):
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)

    def bare(self, order: Sequence[int], flags: int, threads: int) -> None:
        fd = os.open(self.plain, os.O_RDONLY | flags)
        parts = [order[i::threads] for i in range(threads)]

        def read(part: Sequence[int]) -> None:
            for n in part:
                os.preadv(fd, [self.blocks[n].data], n * self.block_bytes)

        list(self.pool.map(read, parts))
        os.close(fd)

    def through_tier(self, order: Sequence[int], kind: str) -> None:
        tier, step = self.tiers[kind], max(1, REQUEST_BYTES // self.block_bytes)
        for start in range(0, self.count, step):
            part = order[start : start + step]
            reads = tier.get_many([name(n) for n in part], [self.blocks[n] for n in part])
            assert all(reads.found), reads.errors

    def ways(self) -> dict[str, Callable[[], None]]:
        orders = {"in_order": list(range(self.count)), "scattered": list(range(self.count))}
        random.Random(0).shuffle(orders["scattered"])
        found: dict[str, Callable[[], None]] = {}
        for kind, flags in (("direct", os.O_DIRECT), ("buffered", 0)):
            for how, order in orders.items():
                found[f"{kind}/{how}/bare_1"] = lambda o=order, f=flags: self.bare(o, f, 1)
                found[f"{kind}/{how}/bare_{THREADS}"] = lambda o=order, f=flags: self.bare(o, f, THREADS)
                found[f"{kind}/{how}/tier"] = lambda o=order, k=kind: self.through_tier(o, k)
        return found

    def close(self) -> None:
        for tier in self.tiers.values():
            tier.close()
        self.pool.shutdown()


def measure(disk: Disk, rounds: int) -> dict[str, dict[str, float]]:
    """GB/s and CPU seconds a GB of each way; the first, uncounted round warms the interpreter and checks the bytes."""
    ways = disk.ways()
    gb = disk.blocks.nbytes / 1e9
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    cpu: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(rounds + 1):
        for way, read in random.Random(turn).sample(list(ways.items()), len(ways)):
            disk.forget()
            if turn == 0:
                disk.blocks[:] = 0
            began, began_cpu = time.perf_counter(), time.process_time()
            read()
            took, took_cpu = time.perf_counter() - began, time.process_time() - began_cpu
            if turn == 0:
                assert hash(disk.blocks.tobytes()) == disk.digest, f"{way} read other bytes"
            else:
                seconds[way].append(took)
                cpu[way].append(took_cpu)
    return {
        "gb_per_s": {way: round(gb / statistics.median(found), 3) for way, found in seconds.items()},
        "cpu_s_per_gb": {way: round(statistics.median(found) / gb, 3) for way, found in cpu.items()},
    }


def ratios(speed: dict[str, float]) -> dict[str, float]:
    """The tier's speed over the faster of the bare ways."""
    found = {}
    for way in speed:
        case, _, who = way.rpartition("/")
        if who == "tier":
            found[case] = round(speed[way] / max(speed[f"{case}/bare_1"], speed[f"{case}/bare_{THREADS}"]), 3)
    return found


def run(folder: str | None, total: int, rounds: int, sizes: Sequence[str]) -> dict[str, object]:
    result: dict[str, object] = {"total_bytes": total, "rounds": rounds}
    for size in sizes:
        with tempfile.TemporaryDirectory(dir=folder, prefix="kv-disk-") as scratch:
            disk = Disk(Path(scratch), SIZES[size], total)
            figures = measure(disk, rounds)
            disk.close()
        result[size] = {**figures, "tier_over_best_bare": ratios(figures["gb_per_s"])}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="on the disk to measure (default: the system's temporary folder)")
    parser.add_argument("--total-mb", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", action="append", choices=list(SIZES))
    parser.add_argument("--quick", action="store_true", help="64 MB, 2 rounds, blocks of 1 MB")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.total_mb, options.rounds, options.size = 64, 2, ["1M"]
    result = run(options.folder, options.total_mb << 20, options.rounds, options.size or list(SIZES))
    print(json.dumps(result) if options.json else json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
