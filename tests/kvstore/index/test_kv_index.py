"""The index in memory: what it finds, what it hides, what it forgets."""

import pytest
from index_model import FP, OTHER_FP, Clock, Node, chain, joined, key, shown, truth
from prometheus_client import CollectorRegistry

from kvstore.index.audit import AuditPolicy
from kvstore.index.base import NodeReach, NodeSnapshot, Reach, Section, Verdict
from kvstore.index.index import MAX_LAYOUTS, MAX_NODES, KVIndex
from kvstore.index.metrics import IndexCollector
from kvstore.types import Place, Tier
from pdserve.errors import InvalidRequest, Overloaded
from pdserve.metrics import render


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def index(clock: Clock) -> KVIndex:
    return KVIndex(max_entries=1000, lease_s=10.0, clock=clock)


def test_the_longest_prefix_of_each_node_is_found_by_tier(index):
    a, b, store = Node("a"), Node("b", 7), Node("store", 3)
    joined(index, a, b, store)
    index.apply("a", 1, [a.store([1, 2, 3])])
    index.apply("b", 7, [b.store([1, 3, 4])])
    index.apply("store", 3, [store.store([1, 2], Tier.DRAM), store.store([3, 4], Tier.DISK)])
    assert index.match(chain([1, 2, 3, 4, 5]), FP) == {
        "a": NodeReach(3, 3, 3, 1),
        "b": NodeReach(1, 1, 1, 7),
        "store": NodeReach(0, 2, 4, 3),
    }


def test_a_chain_that_starts_elsewhere_is_not_found(index):
    a = Node("a")
    joined(index, a)
    index.apply("a", 1, [a.store([2, 3])])
    assert index.match(chain([1, 2, 3]), FP) == {}
    assert index.match(b"", FP) == {}


def test_another_layout_is_another_world(index):
    a = Node("a")
    joined(index, a)
    index.apply("a", 1, [a.store([1]), a.store([1, 2], Tier.HBM, OTHER_FP)])
    assert index.match(chain([1, 2]), FP)["a"].hbm == 1
    assert index.match(chain([1, 2]), OTHER_FP)["a"].hbm == 2
    assert index.match(chain([1, 2]), b"unknown") == {}
    assert index.locate(key(2), FP) == ()


def test_a_group_gives_what_its_members_have_together(index):
    worker, store = Node("worker"), Node("store")
    joined(index, worker, store)
    index.apply("worker", 1, [worker.store([1, 4])])
    index.apply("store", 1, [store.store([2], Tier.DRAM), store.store([3], Tier.DISK)])
    keys = chain([1, 2, 3, 4, 5])
    assert index.match_group(keys, FP, ["worker", "store", "nobody"]) == Reach(1, 2, 4)
    assert index.match_group(keys, FP, ["worker"]) == Reach(1, 1, 1)
    assert index.match_group(keys, FP, []) == Reach()
    assert index.match_group(chain([1, 4]), FP, ["worker"]) == Reach(2, 2, 2)


def test_a_first_contact_shows_nothing_before_its_snapshot(index):
    a = Node("a")
    event = a.store([1])
    assert index.apply("a", 1, [event]) is Verdict.RESYNC
    assert index.awaiting() == [("a", 1)]
    assert index.match(chain([1]), FP) == {}
    assert index.load(a.snapshot()) is Verdict.APPLIED
    assert index.awaiting() == []
    assert index.locate(key(1), FP) == (Place("a", Tier.HBM, 1),)


def test_events_held_during_a_resync_are_applied_after_it(index):
    a = Node("a")
    a.store([1, 2])
    snapshot = a.snapshot()
    assert index.apply("a", 1, [a.drop([1])]) is Verdict.RESYNC
    assert index.apply("a", 1, [a.store([3])]) is Verdict.RESYNC
    assert index.load(snapshot) is Verdict.APPLIED
    assert shown(index, range(5)) == truth(a)


def test_a_gap_hides_the_node_until_a_snapshot(index):
    a, b = Node("a"), Node("b")
    joined(index, a, b)
    index.apply("a", 1, [a.store([1])])
    index.apply("b", 1, [b.store([1])])
    a.drop([1])
    assert index.apply("a", 1, [a.store([2])]) is Verdict.RESYNC
    assert index.counts.gaps == 1
    assert set(index.match(chain([1, 2]), FP)) == {"b"}
    assert index.load(a.snapshot()) is Verdict.APPLIED
    assert shown(index, range(5)) == truth(a, b)


def test_a_snapshot_older_than_the_gap_is_not_enough(index):
    a = Node("a")
    joined(index, a)
    index.apply("a", 1, [a.store([1])])
    old = a.snapshot()
    a.drop([1])
    index.apply("a", 1, [a.store([2])])
    assert index.load(old) is Verdict.RESYNC
    assert shown(index, range(5)) == set()
    assert index.load(a.snapshot()) is Verdict.APPLIED


def test_a_snapshot_too_old_is_refused_even_when_nothing_could_be_held(index, monkeypatch):
    a = Node("a")
    old = a.snapshot()
    monkeypatch.setattr("kvstore.index.nodes.MAX_HELD_KEYS", 3)
    a.store([1])
    index.apply("a", 1, [a.store([2, 3, 4, 5])])
    assert index.load(old) is Verdict.RESYNC
    assert shown(index, range(9)) == set()


def test_repeated_events_change_nothing(index):
    a = Node("a")
    joined(index, a)
    stored, removed = a.store([1]), a.drop([1])
    index.apply("a", 1, [stored, removed])
    assert index.apply("a", 1, [stored]) is Verdict.DUPLICATE
    assert shown(index, [1]) == set()


def test_a_snapshot_older_than_the_index_changes_nothing(index):
    a = Node("a")
    joined(index, a)
    old = a.snapshot()
    index.apply("a", 1, [a.store([1])])
    assert index.load(old) is Verdict.DUPLICATE
    assert shown(index, [1]) == truth(a)


def test_a_restart_voids_the_older_incarnation_at_once(index):
    a = Node("a")
    joined(index, a)
    late = a.store([1])
    index.apply("a", 1, [late])
    a.restart()
    assert index.apply("a", 2, [a.store([2])]) is Verdict.RESYNC
    assert shown(index, range(5)) == set()
    assert index.apply("a", 1, [late]) is Verdict.STALE
    assert index.load(NodeSnapshot("a", 1, 5, (Section(Tier.HBM, FP, key(1)),))) is Verdict.STALE
    index.load(a.snapshot())
    assert shown(index, range(5)) == {("a", Tier.HBM, key(2), 2)}
    assert index.counts.restarts == 1


def test_a_node_without_a_sign_of_life_vanishes(index, clock):
    a, b = Node("a"), Node("b")
    joined(index, a, b)
    index.apply("a", 1, [a.store([1])])
    index.apply("b", 1, [b.store([1])])
    clock.now += 6
    assert index.renew("b", 1) is Verdict.APPLIED
    clock.now += 4
    assert set(index.match(chain([1]), FP)) == {"b"}, "a look-up never shows an expired node, tick or no tick"
    assert index.counts.expired_nodes == 1
    assert index.renew("a", 1) is Verdict.RESYNC
    assert set(index.match(chain([1]), FP)) == {"b"}
    joined(index, a)
    assert set(index.match(chain([1]), FP)) == {"a", "b"}


def test_an_expired_incarnation_is_still_known_to_be_old(index, clock):
    a = Node("a", 5)
    joined(index, a)
    clock.now += 11
    assert index.expire() == ["a"]
    assert index.apply("a", 4, [Node("a", 4).store([1])]) is Verdict.STALE


def test_a_heartbeat_ahead_of_the_events_tells_that_the_last_were_lost(index):
    a = Node("a")
    joined(index, a)
    index.apply("a", 1, [a.store([1])])
    a.drop([1])
    assert index.renew("a", 1, sequence=1) is Verdict.APPLIED
    assert index.renew("a", 1, sequence=2) is Verdict.RESYNC
    assert shown(index, [1]) == set()


@pytest.mark.parametrize("others", [(), (Tier.DISK,)])
def test_cleared_empties_one_tier_of_one_node(index, others):
    a, b = Node("a"), Node("b")
    joined(index, a, b)
    for tier in (Tier.DRAM, *others):
        index.apply("a", 1, [a.store([1, 2], tier), a.store([2], tier, OTHER_FP)])
    index.apply("b", 1, [b.store([1], Tier.DRAM)])
    index.apply("a", 1, [a.clear(Tier.DRAM), a.store([3], Tier.DRAM)])
    for fingerprint in (FP, OTHER_FP):
        assert shown(index, range(5), fingerprint) == truth(a, b, fingerprint=fingerprint)


def test_goodbye_removes_a_node(index):
    a = Node("a")
    joined(index, a)
    index.apply("a", 1, [a.store([1])])
    index.remove("a")
    index.remove("nobody")
    assert shown(index, [1]) == set()
    assert index.live_nodes() == []


def test_a_full_index_lets_the_oldest_unused_entries_go(clock):
    index = KVIndex(max_entries=10, clock=clock)
    a = Node("a")
    joined(index, a)
    index.apply("a", 1, [a.store(range(10))])
    index.match(chain([0, 1]), FP)
    index.apply("a", 1, [a.store(range(10, 14))])
    assert len(index) == 10
    assert {n for n in range(14) if index.locate(key(n), FP)} == {0, 1, *range(6, 14)}
    assert index.counts.evicted == 4
    index.check_integrity()


def test_entries_of_gone_nodes_leave_before_live_ones(clock):
    index = KVIndex(max_entries=10, clock=clock)
    a, b = Node("a"), Node("b")
    joined(index, a, b)
    index.apply("a", 1, [a.store(range(5))])
    index.apply("b", 1, [b.store(range(5, 10))])
    index.remove("a")
    index.apply("b", 1, [b.store(range(10, 15))])
    assert index.match(chain(range(5, 15)), FP)["b"].hbm == 10
    assert index.counts.evicted == 0


def test_places_of_gone_nodes_are_tidied_and_their_bits_reused_safely(index, clock):
    keeper = Node("keeper")
    joined(index, keeper)
    index.apply("keeper", 1, [keeper.store(range(100, 200))])
    for life in range(1, 2000):
        node = Node("flapping", life)
        node.store(range(50, 150))
        index.load(node.snapshot())
        if life % 100 == 0:
            assert shown(index, range(300)) == truth(keeper, node)
        index.renew("keeper", 1)
        index.expire()
    assert max(index._table.masks.values()).bit_length() < 1000
    index.remove("flapping")
    for _ in range(3):
        index.expire()
    assert len(index) == 100, "entries without a place left the table"
    index.check_integrity()


def test_too_many_buried_places_are_cleared_in_one_go(index):
    keeper = Node("keeper")
    joined(index, keeper)
    index.apply("keeper", 1, [keeper.store(range(100))])
    for life in range(1, 600):
        node = Node("flapping", life)
        node.store(range(50))
        index.load(node.snapshot())
    assert shown(index, range(300)) == truth(keeper, node)
    assert max(index._table.masks.values()).bit_length() < 900
    index.check_integrity()


def test_a_lying_node_is_aged_out_until_it_restarts(clock):
    index = KVIndex(clock=clock, audit=AuditPolicy(min_ratio=0.5, min_requests=4))
    a, honest = Node("a"), Node("honest")
    joined(index, a, honest)
    index.apply("a", 1, [a.store([1])])
    index.apply("honest", 1, [honest.store([1])])
    outs = [index.observe("a", 1, 160, 16) for _ in range(4)]
    assert not any(index.observe("honest", 1, 160, 144) for _ in range(40))
    assert outs == [False, False, False, True]
    assert set(index.match(chain([1]), FP)) == {"honest"}
    assert index.apply("a", 1, [a.store([2])]) is Verdict.DISTRUSTED
    assert index.renew("a", 1) is Verdict.DISTRUSTED
    assert index.load(a.snapshot()) is Verdict.DISTRUSTED
    assert not index.observe("a", 1, 160, 0), "it is out already"
    a.restart()
    a.store([1])
    assert index.load(a.snapshot()) is Verdict.APPLIED
    assert index.audit.ratio("a") < 0.5
    assert not index.observe("a", 2, 160, 160), "a new life starts with a clean account"
    assert index.audit.ratio("a") == 1.0
    assert set(index.match(chain([1]), FP)) == {"a", "honest"}


def test_the_audit_forgives_a_bad_answer_and_ignores_empty_predictions():
    from kvstore.index.audit import Audit

    audit = Audit(AuditPolicy(min_ratio=0.5, min_requests=2))
    assert not any(audit.observe("a", 1, 0, 0) for _ in range(10))
    assert not any(audit.observe("a", 1, 100, 100) for _ in range(5))
    assert not audit.observe("a", 1, 100, 0)
    assert not audit.observe("a", 1, 100, 500), "a report above the prediction counts as met, not more"
    assert audit.ratio("a") < 1.0
    assert audit.ratio("unknown") == 1.0


def test_a_long_snapshot_can_be_loaded_in_steps(index, clock):
    big = KVIndex(max_entries=100_000, clock=clock)
    a = Node("a")
    a.store(range(30_000))
    steps = big.load_in_steps(a.snapshot())
    pauses = 0
    verdict = None
    while verdict is None:
        try:
            next(steps)
            pauses += 1
            assert big.match(chain([0]), FP) == {}
            if pauses == 1:
                big.apply("a", 1, [a.drop([0])])
        except StopIteration as end:
            verdict = end.value
    assert verdict is Verdict.APPLIED
    assert pauses == 4
    assert big.match(chain([0]), FP) == {}
    assert big.match(chain([1]), FP) != {}


def test_a_load_in_steps_overtaken_by_a_restart_is_dropped(clock):
    index = KVIndex(max_entries=100_000, clock=clock)
    a = Node("a")
    a.store(range(20_000))
    steps = index.load_in_steps(a.snapshot())
    next(steps)
    a.restart()
    a.store([5])
    index.load(a.snapshot())
    with pytest.raises(StopIteration) as end:
        next(steps)
    assert end.value.value is Verdict.STALE
    assert shown(index, range(100)) == {("a", Tier.HBM, key(5), 2)}


def test_an_export_is_a_snapshot_in_parts(index):
    a, b = Node("a"), Node("b")
    joined(index, a, b)
    index.apply("a", 1, [a.store(range(50)), a.store(range(10, 20), Tier.DISK, OTHER_FP)])
    index.apply("b", 1, [b.store(range(40, 90))])
    incarnation, sequence, _ = index.position("a")
    sections = tuple(section for part in index.export("a") for section in part)
    copy = KVIndex(max_entries=1000, clock=Clock())
    copy.load(NodeSnapshot("a", incarnation, sequence, sections))
    for fingerprint in (FP, OTHER_FP):
        assert shown(copy, range(100), fingerprint) == truth(a, fingerprint=fingerprint)


def test_an_export_ends_when_the_node_changes_under_it(clock):
    index = KVIndex(max_entries=100_000, clock=clock)
    a = Node("a")
    a.store(range(30_000))
    joined(index, a)
    before = index.position("a")
    parts = index.export("a")
    next(parts)
    joined(index, a)
    assert list(parts) == []
    assert index.position("a") != before


def test_floods_of_names_and_layouts_are_refused(index, clock):
    for number in range(MAX_NODES):
        index.renew(f"node-{number}", 1)
    with pytest.raises(Overloaded):
        index.renew("one-more", 1)
    clock.now += 11
    index.expire()
    assert index.renew("one-more", 1) is Verdict.RESYNC
    a = Node("one-more")
    joined(index, a)
    with pytest.raises(InvalidRequest):
        index.apply("one-more", 1, [a.store([1], Tier.HBM, bytes([n]) * 16) for n in range(MAX_LAYOUTS + 1)])


def test_a_torn_section_is_refused():
    with pytest.raises(InvalidRequest):
        Section(Tier.HBM, FP, b"short")


def test_size_and_counts_are_shown_to_prometheus(index):
    registry = CollectorRegistry()
    registry.register(IndexCollector(index))
    a = Node("a")
    joined(index, a)
    index.apply("a", 1, [a.store([1, 2])])
    index.renew("b", 1)
    shown_there = render(registry).decode()
    for line in (
        "pdserve_kvindex_entries 2.0",
        "pdserve_kvindex_max_entries 1000.0",
        'pdserve_kvindex_nodes{state="live"} 1.0',
        'pdserve_kvindex_nodes{state="waiting"} 1.0',
        "pdserve_kvindex_events_total 1.0",
    ):
        assert line in shown_there
    assert "redis" not in shown_there
