"""Who dies when in `pdserve chaos`: SIGKILL at random moments, a short absence, and a successor with the same config.

Every role gets its turn; now and then two die at once, one dies again while it starts, or a store freezes for a while.
The same seed gives the same roles in the same order, mostly; what was in flight differs from run to run.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from pdserve_cli.chaos_load import Outages
from pdserve_cli.cluster import Cluster, ClusterError, Member
from pdserve_cli.tiers import TIERS, hits

ROLES = ("router", "prefill", "decode", "kvstore")
_ABSENCE_S = 0.5
"""A dead process is gone for at most this, beside its start."""
_DOUBLE, _EARLY, _FREEZE = 0.2, 0.1, 0.15
"""Share of kills with a second victim; that hit the successor while it starts; that go with a frozen store."""
_FREEZE_S = 3.0
_START_S = 1.0
"""Within which an early kill comes."""


@dataclass(slots=True)
class Killer:
    """`gap_s`: at most so long between a recovery and the next kill. `between` runs while a victim is down."""

    cluster: Cluster
    outages: Outages
    rng: random.Random
    gap_s: float
    say: Callable[[str], None]
    between: Callable[[Member], None] = lambda member: None
    kills: Counter[str] = field(default_factory=Counter)
    freezes: int = 0
    hits: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(TIERS, 0)))
    """Blocks found by processes that are dead now."""

    async def run(self, kills: int) -> None:
        """Raises `ClusterError` when a successor doesn't start."""
        order = self._order()
        while sum(self.kills.values()) < kills:
            await asyncio.sleep(self.rng.uniform(0, self.gap_s))
            double = self.rng.random() < _DOUBLE and sum(self.kills.values()) + 2 <= kills
            victims = {self._victim(next(order)) for _ in range(2 if double else 1)}
            async with self._maybe_frozen(victims):
                await asyncio.gather(*(self._kill_and_restart(name, kills) for name in sorted(victims)))
            self.say(f"{sum(self.kills.values())} of {kills} killed, last {', '.join(sorted(victims))}")

    def _order(self) -> Iterator[str]:
        """Roles in random order, each as often as the others."""
        while True:
            yield from self.rng.sample(ROLES, len(ROLES))

    def _victim(self, role: str) -> str:
        return self.rng.choice(sorted(member.name for member in self.cluster.of_role(role)))

    @asynccontextmanager
    async def _maybe_frozen(self, victims: set[str]) -> AsyncIterator[None]:
        """A store that stands still while others die, and a moment longer."""
        stores = sorted((m for m in self.cluster.stores if m.name not in victims), key=lambda m: m.name)
        if not stores or self.rng.random() >= _FREEZE:
            yield
            return
        frozen = self.rng.choice(stores)
        os.kill(frozen.pid, signal.SIGSTOP)
        self.freezes += 1
        try:
            yield
            await asyncio.sleep(self.rng.uniform(0, _FREEZE_S))
        finally:
            os.kill(frozen.pid, signal.SIGCONT)

    async def _kill_and_restart(self, name: str, kills: int) -> None:
        member = next(member for member in self.cluster.members if member.name == name)
        await self._note_hits(member)
        async with self._outage(member.role):
            await self._kill(member)
            if self.rng.random() < _EARLY and sum(self.kills.values()) < kills:
                member = await self._kill_early(member)
            await asyncio.sleep(self.rng.uniform(0, _ABSENCE_S))
            self.between(member)
            await self.cluster.restart(member)

    @asynccontextmanager
    async def _outage(self, role: str) -> AsyncIterator[None]:
        if role != "router":
            yield
            return
        self.outages.count += 1
        self.outages.down = True
        try:
            yield
        finally:
            self.outages.down = False

    async def _kill(self, member: Member) -> None:
        self.cluster.kill_member(member)
        self.kills[member.role] += 1
        await member.process.wait()

    async def _kill_early(self, dead: Member) -> Member:
        """The successor dies before, or just after, it is ready; returns it."""
        starting = asyncio.ensure_future(self.cluster.restart(dead))
        await asyncio.wait([starting], timeout=self.rng.uniform(0, _START_S))
        spawned = [member for member in self.cluster.members if member.name == dead.name]
        if spawned:
            await self._kill(spawned[0])
        try:
            successor = await starting
        except ClusterError:
            return spawned[0]
        if not spawned:
            await self._kill(successor)
        return successor

    async def _note_hits(self, member: Member) -> None:
        self.hits.update(await hits(self.cluster, [member]))
