"""How many slots each tenant holds, and which of its blocks go first when its share is used up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from kvstore.eviction.base import Allowed, require
from kvstore.eviction.lru import LruPolicy
from kvstore.node.entries import Name


class Tenants:
    """Slots by tenant, reserved ones included. Tenants with a quota have an order of their own: the pool's policy
    can't be asked for one tenant's victims without disturbing everyone's."""

    def __init__(self, default_quota: int = 0, quotas: Mapping[str, int] | None = None) -> None:
        self._default = default_quota
        self._quotas = dict(quotas or {})
        self.used: Counter[str] = Counter()
        self._orders: dict[str, LruPolicy] = {}

    def quota(self, tenant: str) -> int:
        """In slots; 0: no limit."""
        return self._quotas.get(tenant, self._default)

    def room(self, tenant: str, wanted: int) -> int:
        """How many of `wanted` slots its quota leaves it."""
        quota = self.quota(tenant)
        return min(wanted, max(0, quota - self.used[tenant])) if quota else wanted

    def take(self, tenant: str, slots: int) -> None:
        self.used[tenant] += slots

    def give(self, tenant: str, slots: int) -> None:
        self.used[tenant] -= slots
        if not self.used[tenant]:
            del self.used[tenant]
            self._orders.pop(tenant, None)

    def access(self, owned: Iterable[tuple[str, Name]], now: float) -> None:
        """These blocks, first to last, were used."""
        chains: dict[str, list[Name]] = {}
        for tenant, name in owned:
            if self.quota(tenant):
                chains.setdefault(tenant, []).append(name)
        for tenant, names in chains.items():
            self._orders.setdefault(tenant, LruPolicy()).access(names, now)

    def forget(self, tenant: str, name: Name) -> None:
        if tenant in self._orders:
            self._orders[tenant].forget(name)

    def victims(self, tenant: str, count: int, now: float, allowed: Allowed) -> Sequence[Name]:
        """Up to `count` of its blocks, least recently used first."""
        order = self._orders.get(tenant)
        found: list[Name] = []
        while order is not None and len(found) < count:
            name = order.evict(now, allowed)
            if name is None:
                break
            found.append(name)
        return found

    def check_integrity(self, held: Counter[str]) -> None:
        """`held` is counted anew by the caller. Raises `IntegrityError`."""
        require(held == self.used, f"tenants hold {dict(held)} slots; the books say {dict(self.used)}")
        over = [tenant for tenant, count in self.used.items() if 0 < self.quota(tenant) < count]
        require(not over, f"over their quota: {', '.join(over)}")
