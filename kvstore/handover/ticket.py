"""What both ledgers need to know of a ticket."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

Clock = Callable[[], float]
"""Seconds that only grow; `time.monotonic` outside tests."""


def ticket_id(nonce: bytes) -> bytes:
    """What a manifest shows of its ticket: 8 bytes that don't give the nonce away."""
    return hashlib.sha256(nonce).digest()[:8]
