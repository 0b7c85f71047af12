"""Commands to Redis for the index's copy: write events, publish a node in full, read it back. `redis_scripts` says in
what form. Every call may raise `redis.RedisError` or `OSError`; `redis_mirror` decides what that means."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field

import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from kvstore.index import redis_scripts as scripts
from kvstore.index.base import NodeSnapshot, Section
from kvstore.index.index import KVIndex
from kvstore.types import KEY_BYTES, EventKind, StoreEvent, Tier

SCAN_COUNT = 4096
"""Keys per SSCAN: a few ms of Redis's single thread."""
STAGE_TTL_MS = 60_000
"""What a publication leaves behind if its router dies in the middle of it."""
READ_TRIES = 3
"""A node that is published anew while it is read is read again."""


@dataclass(frozen=True, slots=True)
class RedisOptions:
    url: str
    prefix: str = "pdserve:kv"
    timeout_s: float = 1.0
    """A command that takes longer counts as failed: the next tick repeats it, which is safe."""


@dataclass(frozen=True, slots=True)
class StoredNode:
    """A node as Redis has it."""

    snapshot: NodeSnapshot
    lease_s: float
    """What is left of its lease."""


class RedisCopy:
    """One connection pool; no state of its own."""

    def __init__(self, options: RedisOptions) -> None:
        self._prefix = options.prefix
        # No retries inside: a failed command marks the mirror degraded at once, and its loop tries again.
        self._redis = aioredis.Redis.from_url(
            options.url,
            socket_timeout=options.timeout_s,
            socket_connect_timeout=options.timeout_s,
            retry=Retry(NoBackoff(), 0),
        )

    async def close(self) -> None:
        await self._redis.aclose()

    async def apply(self, batches: Sequence[tuple[str, int, int, Sequence[StoreEvent]]]) -> list[int]:
        """(node, incarnation, ttl in ms, events in order) each, in one pipeline. Returns the scripts' answers."""
        return await self._run(scripts.APPLY, [[*self._head(*batch[:3]), *_flat(batch[3])] for batch in batches])

    async def renew(self, leases: Sequence[tuple[str, int, int]]) -> list[int]:
        """(node, incarnation, ttl in ms) each. Returns the scripts' answers."""
        return await self._run(scripts.RENEW, [self._head(*lease) for lease in leases])

    async def forget(self, node: str, incarnation: int) -> None:
        await self._run(scripts.FORGET, [self._head(node, incarnation, 0)])

    async def publish(self, index: KVIndex, node: str, ttl_ms: int) -> int | None:
        """The whole of a live node. Returns the script's answer, or None if the node changed meanwhile."""
        before = index.position(node)
        if before is None:
            return None
        incarnation, sequence, epoch = before
        token = secrets.token_hex(8)
        names: set[str] = set()
        for sections in index.export(node):
            await self._stage(node, token, sections)
            names |= {_name(section.tier, section.fingerprint) for section in sections}
            await asyncio.sleep(0)
        if (now := index.position(node)) is None or now[2] != epoch:
            await self._unstage(node, token, names)
            return None
        head = [*self._head(node, incarnation, ttl_ms), token, sequence, *sorted(names)]
        return (await self._run(scripts.COMMIT, [head]))[0]

    async def nodes(self) -> AsyncIterator[str]:
        """Names of all nodes that Redis knows; one may come twice."""
        start, end = f"{self._prefix}:{{", "}:meta"
        async for key in self._redis.scan_iter(match=f"{start}*{end}", count=SCAN_COUNT):
            yield key.decode(errors="replace")[len(start) : -len(end)]

    async def read(self, node: str) -> StoredNode | None:
        """A node in full, or None: unknown, or published anew again and again while it was read."""
        for _ in range(READ_TRIES):
            reading = await self._begin_reading(node)
            if reading is None:
                return None
            sections = [await self._section(node, reading, name) for name in reading.names]
            if (again := await self._begin_reading(node)) is not None and again.token == reading.token:
                snapshot = NodeSnapshot(node, int(reading.incarnation), reading.sequence, tuple(sections))
                return StoredNode(snapshot, again.lease_ms / 1000)
        return None

    async def _begin_reading(self, node: str) -> _Reading | None:
        base = self._base(node)
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hmget(f"{base}:meta", ["incarnation", "sequence", "token"])
            pipe.pttl(f"{base}:meta")
            pipe.smembers(f"{base}:sections")
            (incarnation, sequence, token), lease_ms, names = await pipe.execute()
        if incarnation is None or sequence is None or lease_ms <= 0:
            return None
        return _Reading(incarnation.decode(), int(sequence), token, lease_ms, sorted(name.decode() for name in names))

    async def _section(self, node: str, reading: _Reading, name: str) -> Section:
        key = f"{self._base(node)}:{reading.incarnation}:{name}"
        keys = {member async for member in self._redis.sscan_iter(key, count=SCAN_COUNT)}
        tier, _, fingerprint = name.partition(".")
        return Section(Tier(int(tier)), bytes.fromhex(fingerprint), b"".join(keys))

    async def _stage(self, node: str, token: str, sections: Sequence[Section]) -> None:
        async with self._redis.pipeline(transaction=False) as pipe:
            for section in sections:
                key = f"{self._base(node)}:stage:{token}:{_name(section.tier, section.fingerprint)}"
                keys = section.keys
                pipe.sadd(key, *(keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES)))
                pipe.pexpire(key, STAGE_TTL_MS)
            await pipe.execute()

    async def _unstage(self, node: str, token: str, names: set[str]) -> None:
        if names:
            await self._redis.unlink(*(f"{self._base(node)}:stage:{token}:{name}" for name in names))

    async def _run(self, script: str, calls: Sequence[Sequence[str | int | bytes]]) -> list[int]:
        # The script travels with each call (1 KB): nothing to reload after a restart or a SCRIPT FLUSH.
        async with self._redis.pipeline(transaction=False) as pipe:
            for arguments in calls:
                pipe.eval(script, 0, *arguments)
            return [int(answer) for answer in await pipe.execute()]

    def _base(self, node: str) -> str:
        return f"{self._prefix}:{{{node}}}"

    def _head(self, node: str, incarnation: int, ttl_ms: int) -> list[str | int | bytes]:
        return [self._base(node), f"{incarnation:020d}", ttl_ms]


@dataclass(frozen=True, slots=True)
class _Reading:
    incarnation: str
    sequence: int
    token: bytes
    lease_ms: int
    names: list[str] = field(default_factory=list)


def _name(tier: Tier, fingerprint: bytes) -> str:
    return f"{int(tier)}.{fingerprint.hex()}"


def _flat(events: Sequence[StoreEvent]) -> Iterator[str | int | bytes]:
    for event in events:
        cleared = event.kind is EventKind.CLEARED
        name = str(int(event.tier)) if cleared else _name(event.tier, event.fingerprint)
        yield from (event.sequence, int(event.kind), name, b"".join(event.keys))
