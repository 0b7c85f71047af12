"""The tier's folder: one owner at a time, files named by number, and a way to see that it is gone.

Everything goes through a descriptor of the folder itself. The lock is a `flock` on it: it needs no file, works on a
read-only disk, and the kernel drops it with the process. A folder that was deleted or replaced under our hands keeps
its descriptor, so its identity is compared with what stands at the path.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from pdserve.errors import ConfigError

SUFFIX = ".kvseg"
KEY = "kv.disk.folder"


class Folder:
    """An opened and locked folder. Raises `ConfigError` when another process has it, or `OSError`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except (FileExistsError, NotADirectoryError) as error:
            raise ConfigError(f"{path} is no folder: name one for the disk tier", key=KEY) from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._fd)
            raise ConfigError(f"{path} is in use by another process: give each disk tier its own", key=KEY) from error

    def numbers(self) -> list[int]:
        """The segments in the folder, oldest first. Other files are left alone."""
        names = [Path(name) for name in os.listdir(self._fd)]
        stems = [name.stem for name in names if name.suffix == SUFFIX and len(name.stem) == 16]
        return sorted(int(stem, 16) for stem in stems if _is_hex(stem))

    def open(self, number: int, flags: int) -> int:
        """Descriptor of a segment's file. Raises `OSError`."""
        return os.open(_name(number), flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=self._fd)

    def unlink(self, number: int) -> None:
        """Delete a segment's file; one that is gone already is no error. Raises `OSError`."""
        try:
            os.unlink(_name(number), dir_fd=self._fd)
        except FileNotFoundError:
            return

    def check(self) -> None:
        """Raises `OSError` (ENOENT) when the path no longer leads to this folder."""
        ours, found = os.fstat(self._fd), os.stat(self.path)
        if (ours.st_dev, ours.st_ino) != (found.st_dev, found.st_ino):
            raise OSError(errno.ENOENT, "the folder was replaced", str(self.path))

    def sync(self) -> None:
        os.fsync(self._fd)

    def close(self) -> None:
        """Gives the lock back."""
        os.close(self._fd)


def _name(number: int) -> str:
    return f"{number:016x}{SUFFIX}"


def _is_hex(stem: str) -> bool:
    return all(c in "0123456789abcdef" for c in stem)
