"""What a request at the router needs around it: clocks, bounds, and whoever gives it workers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pdserve.errors import PdserveError
from pdserve.types import PromptStats
from router.deadlines import Deadlines

if TYPE_CHECKING:
    from router.request import ActiveRequest


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds without progress after which a leg has failed; `queue_s`: that a request may wait to be placed."""

    prefill_s: float
    transfer_s: float
    decode_s: float
    queue_s: float = 60.0

    def of(self, clock: str) -> float:
        if clock == "decode":
            return self.decode_s
        if clock == "prefill":
            return self.prefill_s
        return self.transfer_s if clock == "transfer" else self.queue_s


class Placing(Protocol):
    """Who gave this request its workers, and wants to know what became of it."""

    def again(self, active: ActiveRequest) -> None:
        """Its workers are let go; find others. Nothing is called back before this returns."""
        ...

    def decode_again(self, active: ActiveRequest) -> None:
        """Its decode worker is lost, and nothing was handed over yet: find another, the prompt is computed meanwhile.
        Nothing is called back before this returns."""
        ...

    def prefilled(self, active: ActiveRequest, stats: PromptStats | None) -> None:
        """The prompt is computed; None: the worker did not say what of it was cached."""
        ...

    def decoding(self, active: ActiveRequest) -> None:
        """Decode has given its first token."""
        ...

    def failed(self, active: ActiveRequest, error: PdserveError) -> None:
        """An attempt has failed, whatever is done about it."""
        ...

    def ended(self, active: ActiveRequest) -> None: ...


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What every request of a model shares. `max_retries`: placements after the first."""

    loop: asyncio.AbstractEventLoop
    deadlines: Deadlines
    timeouts: Timeouts
    placing: Placing
    on_end: Callable[[ActiveRequest], None]
    max_retries: int = 2
    clock: Callable[[], float] = time.monotonic
    """The loop's time, finer: uvloop's stands still within an iteration and counts milliseconds."""
