"""Parity's disk faults: what was corrupted between the rounds, and whether the stores noticed all of it."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

from pdserve_cli.cluster import Cluster, Member
from pdserve_cli.disk_faults import Rot
from pdserve_cli.parity_types import ROUNDS
from pdserve_cli.store_calls import verify
from pdserve_cli.tiers import hits

_FAILURES = "pdserve_kvstore_integrity_failures_total"


class DiskRot:
    """Strikes the stores' disks after the first round while they run, after the second while they are down: the first
    store drained, the others killed. `finish` counts what the stores caught. With `every` 0 it does nothing."""

    def __init__(self, cluster: Cluster, disk: Path, every: int, rng: random.Random) -> None:
        self.corrupted = 0
        self.caught = 0
        self.uncaught: list[str] = []
        self.hits: Counter[str] = Counter()
        """Blocks that stores found which are gone now."""
        self._cluster = cluster
        self._disk = disk
        self._every = every
        self._rot = Rot(max(1, every), rng)

    async def after(self, round_: str) -> None:
        """Raises `ClusterError` when a store doesn't start again."""
        if not self._every or round_ == ROUNDS[-1]:
            return
        if round_ == ROUNDS[0]:
            self.corrupted += self._rot.strike(self._disk)
            return
        for number, store in enumerate(self._cluster.stores):
            await self._restart(store, drained=number == 0)

    async def _restart(self, store: Member, *, drained: bool) -> None:
        self.hits.update(await hits(self._cluster, [store]))
        self.caught += await self._caught(store)
        if drained:
            store.process.terminate()
        else:
            self._cluster.kill_member(store)
        await store.process.wait()
        self.corrupted += self._rot.strike(self._disk / store.name)
        await self._cluster.restart(store)

    async def _caught(self, store: Member) -> int:
        return int(await self._cluster.metric(store, _FAILURES, tier="disk"))

    async def finish(self) -> None:
        """Have every block compared: what no request met is found now, and then nothing wrong is left."""
        if not self._every:
            return
        for store in self._cluster.stores:
            await verify(store)
            self.caught += await self._caught(store)
            again = await verify(store)
            if again.corrupt or again.corrupt_on_disk:
                self.uncaught.append(f"{store.name}: wrong blocks after a verify")
        if self.caught < self.corrupted:
            self.uncaught.append(f"{self.corrupted} blocks were corrupted, {self.caught} caught")
