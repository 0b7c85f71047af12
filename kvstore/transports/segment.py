"""Posix shared-memory segments whose owner's death can be seen.

`multiprocessing.shared_memory` is not used: its resource tracker unlinks segments that other processes still need.
A segment is a file in /dev/shm, mode 0600. Its owner holds an exclusive `flock` on it for as long as it lives; the
kernel drops the lock with the process. So anyone can tell a dead owner without trusting a process number, which
differs between PID namespaces and is reused. Each start sweeps segments that nobody holds.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import mmap
import os
import secrets
import stat
import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pdserve.errors import ConfigError, PeerLost

SHM_DIR = Path("/dev/shm")
PREFIX = "pdserve-kv-"
_MADV_POPULATE_WRITE = 23
"""Linux 5.14; Python 3.11's mmap has no name for it."""
_POPULATE_STEP = 64 << 20

log = logging.getLogger(__name__)


class Segment(mmap.mmap):
    """A mapped segment. A class of its own, so that an array's `base` tells where its memory lives."""

    name: str


def host_id() -> str:
    """Equal in two processes exactly if they see the same /dev/shm as the same user on the same boot."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    device = os.stat(SHM_DIR).st_dev
    return hashlib.sha256(f"{boot}/{device}/{os.geteuid()}".encode()).hexdigest()[:16]


def create_segment(nbytes: int, name: str | None = None) -> tuple[Segment, int]:
    """Make, lock, size and map a segment; returns it with its locked descriptor.

    All pages are allocated now: a full /dev/shm is a `ConfigError` at start, not a SIGBUS during a request.
    """
    sweep_segments()
    name = f"{PREFIX}{name or f'{os.getpid()}-{secrets.token_hex(8)}'}"
    fd = _create_locked(_path(name))
    try:
        os.posix_fallocate(fd, 0, nbytes)
        return _map(fd, nbytes, name), fd
    except OSError as error:
        (SHM_DIR / name).unlink(missing_ok=True)
        os.close(fd)
        raise ConfigError(
            f"cannot allocate {nbytes} bytes of shared memory ({error.strerror}): "
            f"enlarge /dev/shm or lower the number of blocks",
            key="kv.num_blocks",
        ) from error


def _create_locked(path: Path) -> int:
    """A fresh file, locked. A sweep may take the file between creation and lock: then try again."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            return fd
        os.close(fd)


def open_segment(name: str) -> tuple[Segment, int]:
    """Map another process's segment. Raises `PeerLost` if it is gone, is not ours to trust, or its owner died."""
    try:
        fd = os.open(_path(name), os.O_RDWR | os.O_NOFOLLOW)
    except OSError as error:
        raise PeerLost(f"shared memory {name} is gone: its owner closed it or died") from error
    try:
        info = os.fstat(fd)
        if info.st_uid != os.geteuid() or stat.S_IMODE(info.st_mode) != 0o600 or not stat.S_ISREG(info.st_mode):
            raise PeerLost(f"shared memory {name} does not belong to this user alone: not trusted")
        if not info.st_size or not owner_alive(fd):
            raise PeerLost(f"the owner of shared memory {name} died")
        return _map(fd, info.st_size, name), fd
    except PeerLost:
        os.close(fd)
        raise


def populate(memory: NDArray[np.uint8]) -> None:
    """Map all pages of a segment's array for writing, in a thread of its own; returns at once.

    A page that is mapped at its first touch costs its writer a fault: 8 ms for 16 MB here, four times the copy itself.
    An old kernel (before 5.14) does without.
    """
    threading.Thread(target=_populate, args=(memory,), name="kv-populate", daemon=True).start()


def _populate(memory: NDArray[np.uint8]) -> None:
    madvise = ctypes.CDLL(None, use_errno=True).madvise  # unlike mmap's own, it lets other threads run meanwhile
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    end = memory.ctypes.data + memory.nbytes // mmap.PAGESIZE * mmap.PAGESIZE
    for start in range(memory.ctypes.data, end, _POPULATE_STEP):
        if madvise(start, min(_POPULATE_STEP, end - start), _MADV_POPULATE_WRITE):
            log.debug("pages are not mapped ahead: %s", os.strerror(ctypes.get_errno()))
            return


def owner_alive(fd: int) -> bool:
    """Whether the owner still holds its lock. `fd` must be a descriptor that this process opened itself."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False


def destroy_segment(name: str, fd: int) -> None:
    """The owner's end: the name goes, the lock goes; mappings live on until their arrays are dropped."""
    (SHM_DIR / name).unlink(missing_ok=True)
    fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def sweep_segments() -> list[str]:
    """Unlink segments of ours whose owner died; returns their names."""
    swept = []
    for path in SHM_DIR.glob(PREFIX + "*"):
        try:
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:
            continue  # another user's, or just gone
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
            swept.append(path.name)
        except BlockingIOError:
            pass  # its owner lives
        finally:
            os.close(fd)
    return swept


def segment_of(memory: NDArray[np.uint8]) -> Segment | None:
    """The segment that an array is a view of, if any."""
    base: object = memory
    while base is not None:
        if isinstance(base, Segment):
            return base
        base = base.obj if isinstance(base, memoryview) else getattr(base, "base", None)
    return None


def _path(name: str) -> Path:
    """Names come from peers: nothing that could lead out of the folder."""
    if not name.startswith(PREFIX) or "/" in name or "\0" in name:
        raise PeerLost(f"{name!r} is not the name of a pdserve segment")
    return SHM_DIR / name


def _map(fd: int, nbytes: int, name: str) -> Segment:
    segment = Segment(fd, nbytes)
    segment.name = name
    return segment
