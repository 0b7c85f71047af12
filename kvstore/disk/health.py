"""Which error of the disk means what, and when a tier that is not well tries again."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable

from kvstore.disk.events import DiskHealth, DiskObserver, DiskState
from pdserve.errors import DiskError, DiskFull, DiskReadOnly

log = logging.getLogger(__name__)

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_READ_ONLY = frozenset({errno.EROFS, errno.EACCES, errno.EPERM, errno.EBADF})
"""EBADF: the file was opened for reading only, since the disk took no writes then."""

Clock = Callable[[], float]


class Health:
    """The tier's state and the error that explains it. Every change is logged and observed; call under a lock."""

    def __init__(self, observer: DiskObserver, clock: Clock, retry_s: float) -> None:
        self._observer = observer
        self._clock = clock
        self._retry_s = retry_s
        self._retry_at = 0.0
        self._error: DiskError | None = None
        self.now = DiskHealth(DiskState.ON)

    def fail(self, error: OSError) -> DiskError:
        """Note what an I/O call raised; returns the typed error for the caller to raise."""
        state, typed = self._classify(error)
        self._error, self._retry_at = typed, self._clock() + self._retry_s
        self._change(DiskHealth(state, typed.message))
        return typed

    def _classify(self, error: OSError) -> tuple[DiskState, DiskError]:
        what = error.strerror or str(error)
        if error.errno in FULL:
            text = f"the disk is full ({what}): free space, or lower the tier's capacity"
            return DiskState.READ_ONLY, DiskFull(text, retry_after_s=self._retry_s)
        if error.errno in _READ_ONLY:
            text = f"the disk takes no writes ({what}): mount it writable, or check the folder's owner"
            return DiskState.READ_ONLY, DiskReadOnly(text, retry_after_s=self._retry_s)
        text = f"the disk tier is off ({what}): check the folder and the disk"
        return DiskState.OFF, DiskError(text, retry_after_s=self._retry_s)

    @property
    def ready(self) -> bool:
        """Well, or due for another try."""
        return self._error is None or self._clock() >= self._retry_at

    def gate(self) -> None:
        """Raises the standing error until it is time to try again."""
        if self._error is not None and not self.ready:
            raise type(self._error)(self._error.message, retry_after_s=self._retry_at - self._clock())

    def well(self) -> None:
        """A write went through."""
        self._error = None
        self._change(DiskHealth(DiskState.ON))

    def _change(self, health: DiskHealth) -> None:
        if health == self.now:
            return
        self.now = health
        if health.state is DiskState.ON:
            log.info("the disk tier is on again")
        else:
            log.warning("disk tier: %s", health.reason, extra={"state": health.state.name})
        self._observer.health(health)
