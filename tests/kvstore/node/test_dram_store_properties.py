"""The node's DRAM pool under any order of calls, for every policy: what it must never do."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from store_tools import Clock, contents, digest_of, fill, make_store, name, replay, reserved

from kvstore.eviction import POLICIES
from kvstore.node.compaction import compact
from kvstore.node.entries import Entry, Hit, Limits, Name, Offer, Status
from kvstore.node.tenants import Tenants
from kvstore.types import EventKind, StoreEvent
from pdserve.errors import QuotaExceeded, TicketRefused

BLOCKS = 7
QUOTA = 3
CHAINS = {stem: [name(f"{stem[:cut]}{i}" if i < cut else f"{stem}{i}") for i in range(4)]
          for stem, cut in (("aa", 0), ("bb", 0), ("ab", 1), ("ac", 1), ("cc", 0))}  # fmt: skip
LIMITS = Limits(high_watermark=0.9, low_watermark=0.6, lease_s=10, max_lease_s=25, reservation_s=20, abandoned_s=100)
chains = st.sampled_from(sorted(CHAINS))
lengths = st.integers(1, 4)
picks = st.integers(0, 5)


def pick(held: dict[int, Any], at: int) -> int:
    return sorted(held)[at % len(held)]


class StoreMachine(RuleBasedStateMachine):
    policy = "lru"

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.dead: set[str] = set()
        self.falling: list[Entry] = []
        self.slow_disk = False
        self.followed: list[StoreEvent] = []
        self.store = make_store(
            BLOCKS,
            self.policy,
            LIMITS,
            clock=self.clock,
            tenants=Tenants(quotas={"limited": QUOTA}),
            demote=self.demote,
            writer_gone=lambda client: client in self.dead or None,
        )
        self.offers: dict[int, tuple[str, list[Name], Offer, float]] = {}
        self.hits: dict[int, tuple[list[Name], Hit, float, float]] = {}
        self.clients = 0
        self.dropped: set[Name] = set()
        """Ever, by hand: those may be invisible while they are leased."""

    def demote(self, entry: Entry) -> bool:
        if self.slow_disk:
            self.falling.append(entry)
        return self.slow_disk

    @rule(stem=chains, length=lengths, tenant=st.sampled_from(["limited", "free"]), extends=st.booleans())
    def reserve(self, stem: str, length: int, tenant: str, extends: bool) -> None:
        self.clients += 1
        client, names = f"writer-{self.clients}", CHAINS[stem][:length]
        try:
            offer = self.store.reserve(names, tenant, client, extends=extends)
        except QuotaExceeded:
            assert tenant == "limited"
            return
        if offer.reservation_id:
            self.offers[offer.reservation_id] = (client, reserved(names, offer), offer, self.clock.now)

    @precondition(lambda self: self.offers)
    @rule(at=picks, part=st.booleans())
    def commit(self, at: int, part: bool) -> None:
        number = pick(self.offers, at)
        client, names, offer, made = self.offers.pop(number)
        digests = fill(self.store, names, Offer(number, (Status.RESERVED,) * len(names), offer.slots))
        if part:
            digests = digests[:-1]
        if made + LIMITS.reservation_s <= self.clock.now:
            with pytest.raises(TicketRefused):
                self.store.commit(number, client, digests)
        else:
            self.store.commit(number, client, digests)

    @precondition(lambda self: self.offers)
    @rule(at=picks)
    def abort(self, at: int) -> None:
        number = pick(self.offers, at)
        self.store.abort(number, self.offers.pop(number)[0])

    @precondition(lambda self: self.offers)
    @rule(at=picks)
    def crash_writer(self, at: int) -> None:
        """It writes no more: its offer is forgotten here."""
        client, *_ = self.offers.pop(pick(self.offers, at))
        self.dead.add(client)

    @rule(stem=chains, length=lengths, lease=st.booleans())
    def lookup(self, stem: str, length: int, lease: bool) -> None:
        names = CHAINS[stem][:length]
        visible = set(self.store.entries)
        hit = self.store.lookup(names, "reader", lease=lease)
        expected = next((i for i, block in enumerate(names) if block not in visible), length)
        assert len(hit.slots) == expected
        assert hit.digests == tuple(digest_of(block) for block in names[:expected])
        if hit.lease_id:
            self.hits[hit.lease_id] = (names[:expected], hit, self.clock.now, self.clock.now + LIMITS.lease_s)

    @precondition(lambda self: self.hits)
    @rule(at=picks, renew=st.booleans())
    def renew_or_release(self, at: int, renew: bool) -> None:
        number = pick(self.hits, at)
        names, hit, born, until = self.hits[number]
        if not renew:
            self.store.release(number, "reader")
            del self.hits[number]
        elif until > self.clock.now:
            left = self.store.renew(number, "reader")
            self.hits[number] = (names, hit, born, self.clock.now + left)
            assert self.clock.now + left <= born + LIMITS.max_lease_s
        else:
            with pytest.raises(TicketRefused):
                self.store.renew(number, "reader")
            del self.hits[number]

    @rule(stem=chains, length=lengths, pinned=st.booleans(), ttl=st.sampled_from([0.0, 30.0]))
    def pin(self, stem: str, length: int, pinned: bool, ttl: float) -> None:
        self.store.pin(CHAINS[stem][:length], pinned=pinned, soft_ttl_s=ttl)

    @rule(stem=chains, first=lengths)
    def drop(self, stem: str, first: int) -> None:
        self.store.drop(CHAINS[stem][first - 1 : first])
        self.dropped.add(CHAINS[stem][first - 1])

    @rule(seconds=st.sampled_from([0.5, 1.0, 6.0, 21.0, 120.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds
        silent_since = self.clock.now - LIMITS.reservation_s - LIMITS.abandoned_s
        self.offers = {number: made for number, made in self.offers.items() if made[3] > silent_since}

    @rule()
    def tick(self) -> None:
        self.store.tick()

    @precondition(lambda self: self.offers)
    @rule(at=picks)
    def write(self, at: int) -> None:
        """However late, a writer touches only its own slots."""
        _, names, offer, _ = self.offers[pick(self.offers, at)]
        fill(self.store, names, Offer(1, (Status.RESERVED,) * len(names), offer.slots))

    @rule(blocks=st.integers(1, 3))
    def compact(self, blocks: int) -> None:
        compact(self.store, blocks)

    @rule(slow=st.booleans())
    def disk_speed(self, slow: bool) -> None:
        self.slow_disk = slow

    @precondition(lambda self: self.falling)
    @rule()
    def disk_done(self) -> None:
        self.store.demoted(self.falling.pop(0))

    @invariant()
    def books_agree(self) -> None:
        self.store.check_integrity()

    @invariant()
    def visible_blocks_hold_their_own_bytes(self) -> None:
        for block, entry in self.store.entries.items():
            assert (self.store.pool.blocks[entry.slot] == contents(block)).all()

    @invariant()
    def what_is_leased_stays_readable(self) -> None:
        for names, hit, _, until in self.hits.values():
            if until > self.clock.now:
                for block, slot, generation in zip(names, hit.slots, hit.generations, strict=True):
                    assert block in self.dropped or self.store.entries[block].slot == slot
                    assert self.store.pool.generations[slot] == generation
                    assert (self.store.pool.blocks[slot] == contents(block)).all()

    @invariant()
    def no_tenant_is_over_its_quota(self) -> None:
        assert self.store.tenants.used["limited"] <= QUOTA

    @invariant()
    def events_replay_to_the_content(self) -> None:
        new = self.store.events.since(len(self.followed))
        assert new is not None
        self.followed += new
        assert [event.sequence for event in self.followed] == list(range(1, len(self.followed) + 1))
        assert all(event.kind in (EventKind.STORED, EventKind.REMOVED) for event in new)
        assert replay(self.followed) == set(self.store.entries)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_the_store_keeps_its_promises(policy: str) -> None:
    machine = type("Machine", (StoreMachine,), {"policy": policy})
    bounds = settings(
        max_examples=40,
        stateful_step_count=40,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
    run_state_machine_as_test(machine, settings=bounds)


def _random_step(machine: StoreMachine, dice: random.Random) -> None:
    """Weights for a busy store: hypothesis prefers short runs, in which few blocks ever become visible."""
    stem, length, at = dice.choice(sorted(CHAINS)), dice.randint(1, 4), dice.randrange(6)
    steps: list[tuple[float, Callable[[], object]]] = [
        (5, lambda: machine.reserve(stem, length, dice.choice(["limited", "free"]), dice.random() < 0.3)),
        (5, lambda: machine.lookup(stem, length, dice.random() < 0.8)),
        (1, lambda: machine.pin(stem, length, dice.random() < 0.1, dice.choice([0.0, 30.0]))),
        (1, lambda: machine.drop(stem, length)),
        (3, lambda: machine.time_passes(dice.choice([0.5, 1.0, 1.0, 6.0, 6.0, 21.0, 120.0]))),
        (1, machine.tick),
        (1, lambda: machine.compact(dice.randint(1, 3))),
        (0.5, lambda: machine.disk_speed(dice.random() < 0.5)),
    ]
    if machine.offers:
        steps += [(9, lambda: machine.commit(at, dice.random() < 0.2)), (1, lambda: machine.abort(at))]
        steps += [(0.5, lambda: machine.crash_writer(at)), (1, lambda: machine.write(at))]
    if machine.hits:
        steps.append((2, lambda: machine.renew_or_release(at, dice.random() < 0.5)))
    if machine.falling:
        steps.append((5, machine.disk_done))
    weights, actions = zip(*steps, strict=True)
    dice.choices(actions, weights)[0]()


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("seed", range(6))
def test_long_random_walks_keep_the_promises(policy: str, seed: int) -> None:
    dice = random.Random(seed)
    machine = type("Machine", (StoreMachine,), {"policy": policy})()
    for _ in range(400):
        _random_step(machine, dice)
        machine.books_agree()
        machine.visible_blocks_hold_their_own_bytes()
        machine.what_is_leased_stays_readable()
        machine.no_tenant_is_over_its_quota()
        machine.events_replay_to_the_content()
    assert len(machine.followed) > 30
