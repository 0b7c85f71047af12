"""The index against the truth, under loss, repetition, reordering, restarts, expiry and eviction."""

import random

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from index_model import FP, OTHER_FP, Clock, Node, chain, key, shown, truth

from kvstore.index.base import NodeSnapshot, Verdict
from kvstore.index.index import KVIndex
from kvstore.index.nodes import State
from kvstore.types import StoreEvent, Tier

NUMBERS = range(24)
numbers = st.lists(st.sampled_from(NUMBERS), min_size=1, max_size=6, unique=True)
names = st.sampled_from(["a", "b", "store"])
tiers = st.sampled_from(list(Tier))
layouts = st.sampled_from([FP, OTHER_FP])


class IndexMachine(RuleBasedStateMachine):
    """Nodes change and tell; a bad network carries it; the index must never show what was not so."""

    max_entries = 1000
    lossless = True

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.index = KVIndex(max_entries=self.max_entries, lease_s=10.0, clock=self.clock)
        self.nodes = {name: Node(name) for name in ("a", "b", "store")}
        self.wire: dict[str, list[tuple[int, StoreEvent]]] = {name: [] for name in self.nodes}
        self.old_news: list[tuple[str, int, StoreEvent]] = []
        self.old_snapshots: list[NodeSnapshot] = []
        self.history = {(name, 1, 0): frozenset() for name in self.nodes}
        self.last_life = dict.fromkeys(self.nodes, self.clock.now)

    def _tell(self, name: str, event: StoreEvent) -> None:
        node = self.nodes[name]
        self.wire[name].append((node.incarnation, event))
        self.history[name, node.incarnation, node.sequence] = frozenset(node.blocks)

    @rule(name=names, blocks=numbers, tier=tiers, layout=layouts)
    def store(self, name, blocks, tier, layout):
        self._tell(name, self.nodes[name].store(blocks, tier, layout))

    @rule(name=names, blocks=numbers, tier=tiers, layout=layouts)
    def drop(self, name, blocks, tier, layout):
        self._tell(name, self.nodes[name].drop(blocks, tier, layout))

    @rule(name=names, tier=tiers)
    def clear(self, name, tier):
        self._tell(name, self.nodes[name].clear(tier))

    @rule(name=names)
    def restart(self, name):
        self.nodes[name].restart()
        self.history[name, self.nodes[name].incarnation, 0] = frozenset()

    @rule(name=names, count=st.integers(1, 6))
    def deliver(self, name, count):
        self._deliver(name, count)

    @rule(name=names)
    def lose(self, name):
        del self.wire[name][:1]

    @rule(name=names, seed=st.integers(0, 999))
    def reorder(self, name, seed):
        random.Random(seed).shuffle(self.wire[name])

    @rule(data=st.data())
    def repeat_old_news(self, data):
        if self.old_news:
            name, incarnation, event = data.draw(st.sampled_from(self.old_news[-20:]))
            verdict = self.index.apply(name, incarnation, [event])
            if verdict is not Verdict.STALE:
                self.last_life[name] = self.clock.now

    @rule(name=names)
    def take_snapshot(self, name):
        self.old_snapshots.append(self.nodes[name].snapshot())

    @rule(data=st.data())
    def load_an_old_snapshot(self, data):
        if self.old_snapshots:
            snapshot = data.draw(st.sampled_from(self.old_snapshots[-10:]))
            if self.index.load(snapshot) is not Verdict.STALE:
                self.last_life[snapshot.node] = self.clock.now

    @rule(name=names)
    def heartbeat(self, name):
        if self.index.renew(name, self.nodes[name].incarnation) is not Verdict.STALE:
            self.last_life[name] = self.clock.now

    @rule(seconds=st.floats(0, 7))
    def wait(self, seconds):
        self.clock.now += seconds

    @rule()
    def tick(self):
        self.index.expire()

    @rule(blocks=numbers, layout=layouts)
    def look_up(self, blocks, layout):
        for name, reach in self.index.match(chain(blocks), layout).items():
            assert reach.hbm <= reach.dram <= reach.disk <= len(blocks)
            assert reach.disk == self.index.match_group(chain(blocks), layout, [name]).disk
            for n in blocks[: reach.hbm]:
                assert any(p.node == name and p.tier is Tier.HBM for p in self.index.locate(key(n), layout))

    @rule(name=names)
    def resync(self, name):
        node = self.nodes[name]
        self._deliver(name, len(self.wire[name]))
        assert self.index.load(node.snapshot()) is Verdict.APPLIED
        self.last_life[name] = self.clock.now
        for layout in (FP, OTHER_FP):
            told = {entry for entry in shown(self.index, NUMBERS, layout) if entry[0] == name}
            real = truth(node, fingerprint=layout)
            assert told == real if self.lossless else told <= real

    def _deliver(self, name: str, count: int) -> None:
        batch, self.wire[name] = self.wire[name][:count], self.wire[name][count:]
        for incarnation, event in batch:
            self.old_news.append((name, incarnation, event))
            if self.index.apply(name, incarnation, [event]) is not Verdict.STALE:
                self.last_life[name] = self.clock.now

    @invariant()
    def no_place_is_void(self):
        for layout in (FP, OTHER_FP):
            for name, _, _, incarnation in shown(self.index, NUMBERS, layout):
                assert incarnation == self.index._nodes[name].incarnation
                assert self.index._nodes[name].state is State.LIVE
                assert self.last_life[name] + 10.0 > self.clock.now

    @invariant()
    def what_is_shown_was_true_at_the_sequence_applied(self):
        for name in self.index.live_nodes():
            incarnation, sequence, _ = self.index.position(name)
            told = {
                (tier, layout, block)
                for layout in (FP, OTHER_FP)
                for node, tier, block, _ in shown(self.index, NUMBERS, layout)
                if node == name
            }
            if name not in self.index.live_nodes():  # its lease ran out while we looked
                assert not told
                continue
            was = self.history[name, incarnation, sequence]
            assert told == was if self.lossless else told <= was

    @invariant()
    def memory_is_bounded_and_sound(self):
        assert len(self.index) <= self.max_entries
        self.index.check_integrity()


class FullIndexMachine(IndexMachine):
    max_entries = 9
    lossless = False


IndexMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)
FullIndexMachine.TestCase.settings = IndexMachine.TestCase.settings
TestIndex = IndexMachine.TestCase
TestFullIndex = FullIndexMachine.TestCase
