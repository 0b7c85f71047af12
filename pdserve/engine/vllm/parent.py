"""Lets vLLM's core end with the worker that started it, even if that one was killed.

vLLM's own processes watch their core, but the core doesn't watch whoever embeds it: after a SIGKILL of the worker it
would sleep on, with all of its memory.
"""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1
"""prctl(2): the signal a process gets when the thread that started it ends."""


def end_with_parent(owner_pid: int) -> None:
    """Called in a process that `owner_pid` started; elsewhere (in a worker of the core) it does nothing.

    SIGTERM: vLLM removes its shared memory and ends its workers.
    """
    if os.getppid() == owner_pid:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
