"""A real process that owns a region: `python peer_process.py TRANSPORT NUM_BLOCKS BLOCK_BYTES`.

Prints its segment's name and the region's descriptor in hex, then obeys lines on stdin: `fill N` writes N into every
block, `stop` ends it cleanly.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kvstore.transports.registry import make_transport
from kvstore.transports.shm import SharedMemoryPool


@dataclass
class PeerProcess:
    process: subprocess.Popen[str]
    segment: str
    descriptor: bytes

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(line, file=self.process.stdin, flush=True)
        self.process.stdout.readline()

    def kill(self) -> None:
        """SIGKILL, and wait until it is dead."""
        self.process.kill()
        self.process.wait()


@contextmanager
def peer_process(transport: str, num_blocks: int, block_bytes: int) -> Iterator[PeerProcess]:
    command = [sys.executable, str(Path(__file__)), transport, str(num_blocks), str(block_bytes)]
    root = str(Path(__file__).parents[2])
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root, env={"PYTHONPATH": root}
    ) as process:
        assert process.stdout is not None
        try:
            segment, descriptor = process.stdout.readline().split()
            yield PeerProcess(process, segment, bytes.fromhex(descriptor))
        finally:
            process.kill()


def main() -> None:
    name, num_blocks, block_bytes = sys.argv[1:]
    pool = SharedMemoryPool(int(num_blocks), int(block_bytes))
    transport = make_transport(name)
    print(pool.name, transport.register(pool.region).descriptor.hex(), flush=True)
    for line in sys.stdin:
        match line.split():
            case ["fill", value]:
                pool.blocks[:] = int(value)
            case ["stop"]:
                break
        print("ok", flush=True)
    transport.close()
    pool.close()


if __name__ == "__main__":
    main()
