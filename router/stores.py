"""The node stores that connected workers name: one follower each, for as long as some worker names it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from kvstore.index.index import KVIndex
from kvstore.node.follower import StoreFollower
from pdserve.errors import ConfigError
from pdserve.rpc import Channel, Tls

BROKEN_RETRY_S = 5.0
log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Followed:
    follower: StoreFollower
    channel: Channel
    task: asyncio.Task[None]


class Stores:
    """Feeds an index with what the stores tell. Belongs to the loop it is used on."""

    def __init__(self, index: KVIndex, tls: Tls | None) -> None:
        self._index = index
        self._tls = tls
        self._followed: dict[str, _Followed] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._followed)

    def follow(self, addresses: Iterable[str]) -> None:
        """These from now on, and no others."""
        wanted = set(addresses) - {""}
        for address in self._followed.keys() - wanted:
            self._leave(self._followed.pop(address))
        for address in wanted - self._followed.keys():
            channel = Channel(address, tls=self._tls)
            follower = StoreFollower(channel, self._index, may_be_called=partial(self._may_be_called, address))
            self._followed[address] = _Followed(follower, channel, asyncio.create_task(_run(follower, address)))

    def node_at(self, address: str) -> str:
        """The name of the store at an address; empty: none, or it has not told yet."""
        followed = self._followed.get(address)
        return followed.follower.node if followed is not None else ""

    def address_of(self, node: str) -> str:
        """Where a store can be asked; empty: it is not followed any more."""
        return next((address for address, each in self._followed.items() if each.follower.node == node), "")

    def _may_be_called(self, address: str, node: str) -> bool:
        """A name belongs to the store that is heard of: one that came back at another address takes its own over."""
        for other, each in self._followed.items():
            if other != address and each.follower.node == node:
                if each.follower.connected:
                    return False
                each.follower.forget_name()
        return True

    async def close(self) -> None:
        self.follow(())
        if self._closing:
            await asyncio.wait(self._closing)

    def _leave(self, followed: _Followed) -> None:
        if followed.follower.node:
            self._index.remove(followed.follower.node)
        task = asyncio.create_task(_end(followed))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


async def _run(follower: StoreFollower, address: str) -> None:
    """A store whose events can't be understood is tried again; its entries lapse meanwhile."""
    while True:
        try:
            await follower.run()
        except ConfigError as error:
            log.warning("the store at %s is not used: %s", address, error.message, extra={"key": error.key})
        except Exception:
            log.exception("following the store at %s broke", address)
        await asyncio.sleep(BROKEN_RETRY_S)


async def _end(followed: _Followed) -> None:
    followed.task.cancel()
    await asyncio.wait([followed.task])
    await followed.channel.close()
