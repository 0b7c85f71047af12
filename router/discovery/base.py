"""Where the workers are: whoever knows yields the set of their addresses each time it changes."""

from __future__ import annotations

import asyncio
import random
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import ClassVar, Protocol

from pdserve.errors import ConfigError, ServiceError


class Discovery(Protocol):
    """What a fleet follows. A failure on the way to whoever knows is never a change: the last set stays."""

    @property
    def answering(self) -> bool:
        """Whether whoever knows did so when last asked."""
        ...

    def watch(self) -> AsyncGenerator[frozenset[str]]:
        """host:port of every worker, at once and again at each change. It may end: then nothing changes any more."""
        ...


class DiscoveryError(ServiceError):
    """Whoever knows the workers does not answer, or not as it should. Stays within discovery, which tries again."""

    reason = "discovery_failed"


class StaticDiscovery:
    """A list from the config. Raises `ConfigError` (key "workers") for an entry that is no host:port."""

    answering = True

    def __init__(self, addresses: Iterable[str]) -> None:
        self._addresses = frozenset(addresses)
        for address in self._addresses:
            host, _, port = address.rpartition(":")
            if not host or not port.isdigit() or not 0 < int(port) < 65536:
                raise ConfigError(f"workers: {address!r} is not host:port", key="workers")

    async def watch(self) -> AsyncGenerator[frozenset[str]]:
        yield self._addresses


class Backoff:
    """Waits between tries: doubled up to a bound, with jitter so that routers don't march in step."""

    FIRST_S = 0.1
    MAX_S = 5.0

    def __init__(self) -> None:
        self._next_s = self.FIRST_S

    @property
    def failing(self) -> bool:
        """Whether the last try failed."""
        return self._next_s > self.FIRST_S

    def reset(self) -> None:
        self._next_s = self.FIRST_S

    def take(self) -> float:
        """Seconds to wait after one more failure."""
        wait_s = self._next_s
        self._next_s = min(2 * wait_s, self.MAX_S)
        return wait_s * random.uniform(0.5, 1.0)


class AskingDiscovery(ABC):
    """Base of those that ask somebody else, and ask again when that fails: `Discovery` but for whom, and how."""

    failures: ClassVar[tuple[type[Exception], ...]]
    """After these it asks again; anything else is a bug and ends `watch`."""

    def __init__(self) -> None:
        self._backoff = Backoff()
        self._told: frozenset[str] | None = None

    @property
    def answering(self) -> bool:
        return self._told is not None and not self._backoff.failing

    async def watch(self) -> AsyncGenerator[frozenset[str]]:
        try:
            while True:
                try:
                    async with aclosing(self._answers()) as answers:
                        async for addresses in answers:
                            if addresses != self._told:
                                self._told = addresses
                                yield addresses
                except self.failures as error:
                    self._note(error)
                    await asyncio.sleep(self._backoff.take())
        finally:
            await self._close()

    @abstractmethod
    def _answers(self) -> AsyncGenerator[frozenset[str]]:
        """All addresses, at once and after each piece of news; when it ends it is called again. Raises `failures`, and
        resets the backoff once it is sure of an answer."""
        ...

    @abstractmethod
    def _note(self, error: Exception) -> None:
        """Tell the log, once for each outage, before the next try."""
        ...

    @abstractmethod
    async def _close(self) -> None: ...
