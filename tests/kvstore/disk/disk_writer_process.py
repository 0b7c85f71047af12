"""Writers to kill: forks one per line of stdin, `folder seed capacity direct`, and tells what each has done.

Every answer is a line: `pid N` when a writer starts, `put A B ..` and `removed A` once that call returned. After the
writer died and was reaped: `dead`.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from disk_blocks import block_id, options, put

from kvstore.disk import DiskTier


def tell(line: str) -> None:
    os.write(1, f"{line}\n".encode())


def write_forever(folder: str, seed: int, capacity: int, direct: bool) -> None:
    """Puts batches of fresh blocks, and removes a block now and then."""
    rng = random.Random(seed)
    tier = DiskTier(folder, options(capacity=capacity, direct=direct))
    tell(f"pid {os.getpid()}")
    for start in range(seed * 1_000_000, (seed + 1) * 1_000_000, 16):
        numbers = list(range(start, start + rng.randint(1, 16)))
        put(tier, numbers)
        tell("put " + " ".join(map(str, numbers)))
        if rng.random() < 0.3:
            tier.remove(block_id(numbers[0]))
            tell(f"removed {numbers[0]}")


def main() -> None:
    for line in sys.stdin:
        folder, seed, capacity, direct = line.split()
        child = os.fork()
        if child == 0:
            write_forever(folder, int(seed), int(capacity), direct == "direct")
        os.waitpid(child, 0)
        tell("dead")


if __name__ == "__main__":
    main()
