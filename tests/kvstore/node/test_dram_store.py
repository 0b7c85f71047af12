"""The node's DRAM pool, one behaviour a test."""

from __future__ import annotations

import pytest
from store_tools import Clock, chain, contents, digest_of, fill, make_store, name, put, replay

from kvstore.node.compaction import compact
from kvstore.node.entries import Entry, Limits, Status
from kvstore.node.integrity import Scrubber
from kvstore.node.slots import runs_of
from kvstore.node.tenants import Tenants
from kvstore.types import EventKind
from pdserve.errors import DigestMismatch, InvalidRequest, QuotaExceeded, TicketRefused


def test_a_block_is_visible_only_after_its_commit() -> None:
    store = make_store(8)
    names = chain("a", 3)
    offer = store.reserve(names, "t", "w")
    assert offer.statuses == (Status.RESERVED,) * 3
    assert store.lookup(names, "r").slots == ()
    store.commit(offer.reservation_id, "w", fill(store, names, offer))
    hit = store.lookup(names, "r")
    assert hit.slots == offer.slots
    assert hit.digests == tuple(digest_of(block) for block in names)
    assert all((store.pool.blocks[slot] == contents(block)).all() for slot, block in zip(hit.slots, names, strict=True))
    store.check_integrity()


def test_lookup_finds_the_longest_prefix_and_only_of_its_own_layout() -> None:
    store = make_store(8)
    names = chain("a", 4)
    put(store, names)
    store.drop([names[2]])
    assert len(store.lookup(names, "r").slots) == 2
    other = [block[:16] + b"G" * 16 for block in names]
    assert store.lookup(other, "r").slots == ()


def test_a_second_writer_is_told_busy_then_exists() -> None:
    store = make_store(8)
    names = chain("a", 2)
    first = store.reserve(names, "t", "one")
    assert store.reserve(names, "t", "two").statuses == (Status.BUSY, Status.BUSY)
    store.commit(first.reservation_id, "one", fill(store, names, first))
    assert store.reserve(names, "t", "two").statuses == (Status.EXISTS, Status.EXISTS)


def test_an_aborted_reservation_leaves_nothing() -> None:
    store = make_store(4)
    offer = store.reserve(chain("a", 4), "t", "w")
    store.abort(offer.reservation_id, "w")
    store.abort(offer.reservation_id, "w")
    assert store.slots.free == 4
    assert store.events.sequence == 0
    store.check_integrity()


def test_a_partial_commit_keeps_the_head_and_frees_the_rest() -> None:
    store = make_store(4)
    names = chain("a", 4)
    offer = store.reserve(names, "t", "w")
    assert store.commit(offer.reservation_id, "w", fill(store, names, offer)[:2]) == 2
    assert len(store.lookup(names, "r").slots) == 2
    assert store.slots.free == 2
    store.check_integrity()


def test_only_the_writer_that_reserved_can_commit() -> None:
    store = make_store(4)
    offer = store.reserve(chain("a", 1), "t", "w")
    with pytest.raises(TicketRefused):
        store.commit(offer.reservation_id, "thief", [b"d" * 16])
    with pytest.raises(InvalidRequest):
        store.commit(offer.reservation_id, "w", [b"d" * 16] * 2)
    assert len(store.reservations) == 1


def test_bytes_that_are_not_their_digests_never_become_visible() -> None:
    store = make_store(4)
    names = chain("a", 2)
    offer = store.reserve(names, "t", "w")
    digests = fill(store, names, offer)
    store.pool.blocks[offer.slots[1], 5] ^= 1
    with pytest.raises(DigestMismatch):
        store.commit(offer.reservation_id, "w", digests)
    assert store.lookup(names, "r").slots == ()
    assert store.slots.free == 4
    store.check_integrity()


def test_slots_of_a_silent_writer_are_not_reused_until_it_is_dead() -> None:
    clock, dead = Clock(), set[str]()
    store = make_store(2, clock=clock, writer_gone=dead.__contains__)
    names = chain("a", 2)
    stalled = store.reserve(names, "t", "stalled")
    clock.now += store.limits.reservation_s
    assert store.reserve(names, "t", "other").statuses == (Status.NO_ROOM,) * 2
    store.pool.blocks[list(stalled.slots)] = 77  # it wakes up and writes
    with pytest.raises(TicketRefused):
        store.commit(stalled.reservation_id, "stalled", [b"d" * 16] * 2)
    assert put(store, names, client="other").statuses == (Status.RESERVED,) * 2

    gone = store.reserve(chain("b", 1), "t", "crashed")
    clock.now += store.limits.reservation_s
    clock.now += store.limits.abandoned_s
    store.tick()
    assert len(store.reservations) == 1  # it lives, so it may still write
    dead.add("crashed")
    store.tick()
    assert not len(store.reservations)
    assert gone.slots
    store.check_integrity()


def test_a_lapsed_reservation_lets_another_write_the_same_block() -> None:
    clock = Clock()
    store = make_store(4, clock=clock)
    names = chain("a", 1)
    stalled = store.reserve(names, "t", "stalled")
    clock.now += store.limits.reservation_s
    other = put(store, names, client="other")
    assert other.slots != stalled.slots
    store.abort(stalled.reservation_id, "stalled")
    assert store.lookup(names, "r").slots == other.slots
    assert store.slots.free == 3
    store.check_integrity()


def test_a_leased_block_is_neither_evicted_nor_reused_and_lapses_by_itself() -> None:
    clock = Clock()
    store = make_store(2, clock=clock)
    put(store, chain("a", 2))
    hit = store.lookup(chain("a", 2), "reader")
    assert put(store, chain("b", 1)).statuses == (Status.NO_ROOM,)
    clock.now += 6
    assert store.renew(hit.lease_id, "reader") == store.limits.lease_s
    clock.now += 6
    assert put(store, chain("b", 1)).statuses == (Status.NO_ROOM,)
    clock.now += 5
    assert put(store, chain("b", 1)).statuses == (Status.RESERVED,)
    with pytest.raises(TicketRefused):
        store.renew(hit.lease_id, "reader")
    store.check_integrity()


def test_a_lease_ends_at_its_bound_however_often_it_is_renewed() -> None:
    clock = Clock()
    store = make_store(2, clock=clock, limits=Limits(lease_s=10, max_lease_s=25))
    put(store, chain("a", 1))
    lease = store.lookup(chain("a", 1), "r").lease_id
    for step, left in ((8, 10), (8, 9), (4, 5)):
        clock.now += step
        assert store.renew(lease, "r") == pytest.approx(left)
    clock.now += 5
    with pytest.raises(TicketRefused):
        store.renew(lease, "r")


def test_the_generation_grows_before_a_slot_has_a_new_owner() -> None:
    store = make_store(1)
    put(store, chain("a", 1))
    hit = store.lookup(chain("a", 1), "r", lease=False)
    offer = store.reserve(chain("b", 1), "t", "w")
    assert offer.slots == hit.slots
    assert store.pool.generations[offer.slots[0]] == hit.generations[0] + 1 == offer.generations[0]


def test_a_dropped_block_is_gone_at_once_and_its_slot_after_its_last_reader() -> None:
    store = make_store(1)
    names = chain("a", 1)
    put(store, names)
    lease = store.lookup(names, "r").lease_id
    assert store.drop(names) == 1
    assert store.lookup(names, "r").slots == ()
    assert store.reserve(names, "t", "w").statuses == (Status.NO_ROOM,)
    store.check_integrity()
    store.release(lease, "r")
    assert put(store, names).statuses == (Status.RESERVED,)
    store.check_integrity()


def test_pins_keep_a_block_and_soft_pins_keep_it_longest() -> None:
    clock = Clock()
    store = make_store(3, clock=clock)
    for key in "abc":
        put(store, chain(key, 1))
    assert store.pin(chain("a", 1), pinned=True) == 1
    store.pin(chain("b", 1), pinned=False, soft_ttl_s=50)
    put(store, chain("d", 1))  # c leaves, though b is older
    assert name("b0") in store.entries
    put(store, chain("e", 2))  # d, then b: nothing else is left
    assert set(store.entries) == {name("a0"), name("e0"), name("e1")}
    store.check_integrity()


def test_above_the_high_watermark_the_pool_empties_to_the_low_one() -> None:
    store = make_store(10, limits=Limits(high_watermark=0.8, low_watermark=0.5))
    for key in "abcdefghi":
        put(store, chain(key, 1))
    store.tick()
    assert [block[:1] for block in store.entries] == [b"e", b"f", b"g", b"h", b"i"]


def test_a_tenant_at_its_quota_replaces_its_own_oldest_blocks() -> None:
    store = make_store(8, tenants=Tenants(quotas={"small": 2}))
    put(store, chain("x", 3), tenant="large")
    put(store, chain("a", 1), tenant="small")
    put(store, chain("b", 1), tenant="small")
    put(store, chain("c", 1), tenant="small")
    assert set(store.entries) == {*chain("x", 3), name("b0"), name("c0")}
    assert put(store, chain("d", 3), tenant="small").statuses == (Status.RESERVED, Status.RESERVED, Status.NO_ROOM)
    lease = store.lookup(chain("d", 2), "r").lease_id
    with pytest.raises(QuotaExceeded):
        store.reserve(chain("e", 1), "small", "w")
    store.release(lease, "r")
    assert put(store, chain("e", 1), tenant="small").slots
    store.check_integrity()


def test_victims_go_to_the_lower_tier_and_stay_readable_on_the_way() -> None:
    taken: list[Entry] = []
    store = make_store(2, demote=lambda entry: taken.append(entry) is None)
    put(store, chain("a", 2))
    assert put(store, chain("b", 1)).statuses == (Status.NO_ROOM,)
    assert [entry.name for entry in taken] == [name("a1")]
    assert len(store.lookup(chain("a", 2), "r", lease=False).slots) == 2  # used: it will stay
    store.demoted(taken.pop())
    assert name("a1") in store.entries
    store.check_integrity()
    put(store, chain("b", 1))
    store.demoted(taken.pop())
    assert name("a1") not in store.entries
    assert put(store, chain("b", 1)).statuses == (Status.RESERVED,)
    store.check_integrity()


def test_a_block_dropped_on_its_way_down_frees_its_slot_only_then() -> None:
    taken: list[Entry] = []
    store = make_store(1, demote=lambda entry: taken.append(entry) is None)
    put(store, chain("a", 1))
    store.reserve(chain("b", 1), "t", "w")
    store.drop(chain("a", 1))
    assert not store.slots.free
    store.check_integrity()
    store.demoted(taken.pop())
    assert store.slots.free == 1
    store.check_integrity()


def test_events_are_gapless_and_replay_to_the_content() -> None:
    store = make_store(3)
    for key in "abcd":
        put(store, chain(key, 2))
    events = store.events.since(0)
    assert events is not None
    assert [event.sequence for event in events] == list(range(1, store.events.sequence + 1))
    assert replay(events) == set(store.entries) == replay(store.content())
    assert {event.sequence for event in store.content()} == {store.events.sequence}
    stored = next(event for event in events if event.kind is EventKind.STORED)
    assert stored.parents == (b"", stored.keys[0])


def test_a_flipped_bit_is_found_and_its_block_dropped() -> None:
    store = make_store(4)
    put(store, chain("a", 4))
    store.pool.blocks[2, 9] ^= 4
    scrubber = Scrubber(store)
    found = [wrong for _ in range(2) for wrong in scrubber.step(2)[1]]
    assert len(found) == 1
    assert len(store.entries) == 3
    assert scrubber.step(10) == (3, [])
    store.check_integrity()


def test_one_requests_blocks_lie_in_one_run_also_after_churn_and_in_chunks() -> None:
    store = make_store(64)
    for key in "abcdefgh":
        put(store, chain(key, 8))
    for key in "bdf":
        store.drop(chain(key, 8))
    request = chain("z", 8)
    for end in (2, 4, 8):  # chunks of a prefill
        put(store, request[:end])
    assert len(runs_of(store.lookup(request, "r").slots)) == 1
    store.drop(chain("c", 8))
    assert len(runs_of(put(store, chain("y", 16)).slots)) == 1
    store.check_integrity()


def test_compaction_joins_free_space_and_moves_no_block_that_is_read() -> None:
    store = make_store(32)
    for i in range(16):
        put(store, chain(f"{i:x}", 2))
    for i in range(0, 16, 2):
        store.drop(chain(f"{i:x}", 2))
    assert store.slots.largest_run == 2
    leased = store.lookup(chain("7", 2), "r")
    before = set(store.entries)
    assert compact(store, 3) == 3
    assert compact(store, 100) > 0
    assert compact(store, 100) == 0
    assert store.slots.largest_run >= 8
    assert store.lookup(chain("7", 2), "r").slots == leased.slots
    assert set(store.entries) == before
    for block, entry in store.entries.items():
        assert (store.pool.blocks[entry.slot] == contents(block)).all()
    store.check_integrity()


def test_compaction_spreads_no_corrupt_block() -> None:
    store = make_store(8)
    for key in "abcd":
        put(store, chain(key, 2))
    store.pool.blocks[7, 0] ^= 1
    store.drop([name("a0"), name("b0"), name("c0")])
    assert compact(store, 8)
    assert name("d1") not in store.entries
    assert name("d0") in store.entries
    store.check_integrity()


def test_a_chain_that_names_a_block_twice_is_refused() -> None:
    store = make_store(4)
    with pytest.raises(InvalidRequest):
        store.reserve(chain("a", 2) + chain("a", 1), "t", "w")
