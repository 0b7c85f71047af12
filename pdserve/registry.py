"""The list of workers in Redis: a worker's side writes itself there, a router's side reads (`discovery: redis`).

One hash a fleet: worker_id -> {incarnation, address, until}. `until` is by Redis's own clock, so that no two machines'
clocks are compared. A newer incarnation of a name takes its place at once, and an older one that still renews is told
so. A worker that leaves writes an empty address, so that routers need not wait for its time to run out.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from pdserve.config import RegistryConfig
from pdserve.errors import ConfigError

FAILURES = (RedisError, OSError)
_NOW = "local t = redis.call('TIME') local now = t[1] * 1000 + math.floor(t[2] / 1000) "
_WRITE = (
    _NOW
    + """
local known = redis.call('HGET', KEYS[1], ARGV[1])
if known then
    local entry = cjson.decode(known)
    -- as text of equal length: the numbers are larger than Lua's
    if entry.incarnation > ARGV[2] and entry.until_ms > now then return 0 end
end
local entry = {incarnation = ARGV[2], address = ARGV[3], until_ms = now + tonumber(ARGV[4])}
redis.call('HSET', KEYS[1], ARGV[1], cjson.encode(entry))
local all = redis.call('HGETALL', KEYS[1])
for i = 1, #all, 2 do
    if cjson.decode(all[i + 1]).until_ms < now then redis.call('HDEL', KEYS[1], all[i]) end
end
if not known or cjson.decode(known).address ~= ARGV[3] then redis.call('PUBLISH', KEYS[1], ARGV[1]) end
return 1
"""
)
_READ = (
    _NOW
    + """
local answer = {}
local all = redis.call('HGETALL', KEYS[1])
for i = 1, #all, 2 do
    local entry = cjson.decode(all[i + 1])
    if entry.until_ms > now then
        table.insert(answer, {all[i], entry.incarnation, entry.address, entry.until_ms - now})
    end
end
return answer
"""
)
_INCARNATION_DIGITS = 20
"""Of the largest uint64."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A worker in the list. `address` empty: it has left. `left_s`: what is left of its time."""

    worker_id: str
    incarnation: int
    address: str
    left_s: float


class WorkerList:
    """Commands on the list. Each may raise one of `FAILURES`."""

    def __init__(self, config: RegistryConfig) -> None:
        """Raises `ConfigError` for a URL that is none."""
        self._key = f"{config.prefix}:workers"
        self._ttl_ms = int(config.ttl_s * 1000)
        try:
            self._redis = aioredis.Redis.from_url(
                config.url,
                socket_timeout=config.timeout_s,
                socket_connect_timeout=config.timeout_s,
                retry=Retry(NoBackoff(), 0),
                decode_responses=True,
            )
        except ValueError as error:
            raise ConfigError(f"registry.url: {error}", key="registry.url") from error

    async def close(self) -> None:
        await self._redis.aclose()

    async def write(self, worker_id: str, incarnation: int, address: str) -> bool:
        """Enter, renew, or leave with an empty address. False: a newer incarnation has the name."""
        stamp = f"{incarnation:0{_INCARNATION_DIGITS}}"
        return bool(await self._eval(_WRITE, worker_id, stamp, address, str(self._ttl_ms)))

    async def read(self) -> list[Entry]:
        """Those whose time has not run out."""
        rows = await self._eval(_READ)
        return [Entry(name, int(stamp), address, left_ms / 1000) for name, stamp, address, left_ms in rows]

    async def changes(self, poll_s: float) -> AsyncGenerator[None]:
        """Yields at once, when the list has changed, and every `poll_s` in any case (time's changes have no news)."""
        async with self._redis.pubsub(ignore_subscribe_messages=True) as news:
            await news.subscribe(self._key)
            while True:
                yield
                await news.get_message(timeout=poll_s)

    async def _eval(self, script: str, *arguments: str) -> Any:
        return await self._redis.eval(script, 1, self._key, *arguments)
