"""What is special about shared memory: who may see it, and what remains of the dead."""

import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from peer_process import peer_process

from kvstore.transports.base import Range
from kvstore.transports.segment import PREFIX, SHM_DIR, host_id, sweep_segments
from kvstore.transports.shm import SharedMemoryPool, ShmTransport
from pdserve.engine.memory import LocalMemory
from pdserve.errors import ConfigError, PeerLost


@pytest.fixture
def pool() -> Iterator[SharedMemoryPool]:
    made = SharedMemoryPool(5, 1000)
    yield made
    made.close()


def test_layout_is_blocks_then_generations_on_a_page(pool: SharedMemoryPool) -> None:
    pool.blocks[3] = 9
    pool.generations[4] = 0x0102
    assert (pool.region[pool.block_offset(3) : pool.block_offset(4)] == 9).all()
    assert pool.generations_offset % 4096 == 0
    assert pool.region[pool.generation_offset(4) : pool.generation_offset(5)].tolist() == [2, 1, 0, 0, 0, 0, 0, 0]
    assert pool.blocks.flags.c_contiguous
    assert pool.blocks.ctypes.data % 4096 == 0


def test_the_segment_is_private_and_goes_with_its_owner(pool: SharedMemoryPool) -> None:
    path = SHM_DIR / pool.name
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    pool.close()
    pool.close()
    assert not path.exists()
    assert pool.closed
    pool.blocks[0] = 1  # the owner's arrays live on


def test_an_attached_pool_shares_memory_and_does_not_own_it(pool: SharedMemoryPool) -> None:
    other = SharedMemoryPool.attach(pool.name)
    other.blocks[1] = 42
    other.generations[1] = 7
    assert (pool.blocks[1] == 42).all()
    assert pool.generations[1] == 7
    other.close()
    assert (SHM_DIR / pool.name).exists()


@pytest.mark.parametrize("name", ["../etc/passwd", PREFIX + "../x", "psm_other", PREFIX + "gone", PREFIX + "a\0b"])
def test_names_that_are_not_segments_are_refused(name: str) -> None:
    with pytest.raises(PeerLost):
        SharedMemoryPool.attach(name)


def test_a_file_that_is_no_pool_is_refused(pool: SharedMemoryPool) -> None:
    pool.region[-4096:] = 0
    with pytest.raises(PeerLost, match="no KV pool"):
        SharedMemoryPool.attach(pool.name)


def test_a_file_open_to_others_is_refused(pool: SharedMemoryPool) -> None:
    (SHM_DIR / pool.name).chmod(0o666)
    with pytest.raises(PeerLost, match="not trusted"):
        SharedMemoryPool.attach(pool.name)


def test_too_little_shared_memory_is_a_config_error() -> None:
    """Four times the whole file system: refused by the kernel before it allocates a page."""
    total = os.statvfs(SHM_DIR).f_blocks * os.statvfs(SHM_DIR).f_frsize
    with pytest.raises(ConfigError, match="enlarge /dev/shm"):
        SharedMemoryPool(4, total)
    assert not list(SHM_DIR.glob(f"{PREFIX}{os.getpid()}-*"))


def test_a_killed_owners_segment_is_swept_and_a_living_ones_stays(pool: SharedMemoryPool) -> None:
    with peer_process("shm", 1, 64) as child:
        assert child.segment not in sweep_segments()
        child.kill()
        assert (SHM_DIR / child.segment).exists()
        SharedMemoryPool(1, 64).close()  # any start sweeps
        assert not (SHM_DIR / child.segment).exists()
        assert (SHM_DIR / pool.name).exists()


def test_an_owner_that_exits_without_close_leaves_nothing() -> None:
    code = "from kvstore.transports.shm import SharedMemoryPool as P; p = P(1, 64); print(p.name)"
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert not (SHM_DIR / done.stdout.strip()).exists()
    assert done.stderr == ""


def test_an_owner_that_restarts_under_the_same_name_is_another_one() -> None:
    transport = ShmTransport()
    first = SharedMemoryPool(1, 64, name=f"test-{os.getpid()}")
    descriptor = transport.register(first.region).descriptor
    old = transport.connect(descriptor)
    first.close()
    second = SharedMemoryPool(1, 64, name=f"test-{os.getpid()}")
    transport.register(second.region)
    local = np.zeros(8, dtype=np.uint8)
    with pytest.raises(PeerLost):
        old.read([Range(0, 0, 8)], local)
    with pytest.raises(PeerLost, match="restarted"):
        ShmTransport().connect(descriptor)
    second.close()
    transport.close()


def test_only_memory_of_a_pool_can_be_registered(pool: SharedMemoryPool) -> None:
    transport = ShmTransport()
    for memory in (LocalMemory(1, 64).blocks.reshape(-1), pool.blocks, pool.region[::2]):
        with pytest.raises(ConfigError, match="SharedMemoryPool"):
            transport.register(memory)


def test_a_part_of_a_pool_can_be_registered(pool: SharedMemoryPool) -> None:
    transport = ShmTransport()
    pool.blocks[2] = 5
    peer = transport.connect(transport.register(pool.region[2000:3000]).descriptor)
    local = np.zeros(1000, dtype=np.uint8)
    peer.read([Range(0, 0, 1000)], local)
    assert (local == 5).all()
    with pytest.raises(ValueError, match="leaves"):
        peer.read([Range(1, 0, 1000)], local)


def test_the_host_id_is_stable() -> None:
    assert host_id() == host_id()
    assert len(host_id()) == 16


def test_pages_mapped_ahead_hold_what_was_written() -> None:
    """Populating runs beside a writer, on every page, and changes nothing."""
    pool = SharedMemoryPool(64, 1 << 20)
    pool.populate()
    for block in range(64):
        pool.blocks[block] = block
    for thread in [t for t in threading.enumerate() if t.name == "kv-populate"]:
        thread.join()
    assert mapped_bytes(pool) >= 64 << 20
    assert all((pool.blocks[block] == block).all() for block in range(64))
    pool.close()


def test_a_fresh_mapping_is_mapped_ahead_without_being_touched() -> None:
    pool = SharedMemoryPool(64, 1 << 20)
    other = SharedMemoryPool.attach(pool.name)
    other.populate()
    for thread in [t for t in threading.enumerate() if t.name == "kv-populate"]:
        thread.join()
    assert mapped_bytes(other) >= 64 << 20
    other.close()
    pool.close()


def mapped_bytes(pool: SharedMemoryPool) -> int:
    """What the kernel has in this process's page table of the pool's mapping."""
    start = pool.region.ctypes.data
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if line.startswith(f"{start:x}-"):
            return next(int(entry.split()[1]) << 10 for entry in lines if entry.startswith("Rss:"))
    raise AssertionError("the pool is not mapped")
