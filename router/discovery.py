"""Where the workers are: whoever knows yields the set of their addresses each time it changes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Protocol

from pdserve.errors import ConfigError


class Discovery(Protocol):
    def watch(self) -> AsyncIterator[frozenset[str]]:
        """host:port of every worker, at once and again at each change. It may end: then nothing changes any more."""
        ...


class StaticDiscovery:
    """A list from the config. Raises `ConfigError` (key "workers") for an entry that is no host:port."""

    def __init__(self, addresses: Iterable[str]) -> None:
        self._addresses = frozenset(addresses)
        for address in self._addresses:
            host, _, port = address.rpartition(":")
            if not host or not port.isdigit() or not 0 < int(port) < 65536:
                raise ConfigError(f"workers: {address!r} is not host:port", key="workers")

    async def watch(self) -> AsyncIterator[frozenset[str]]:
        yield self._addresses
