"""Which node has which block, in which tier: in memory, fed by events, and silent rather than wrong.

A node's entries are shown only while its events have come without a gap, its lease runs and its incarnation is the
newest known. After anything else (a lost event, a restart, a first contact) they are hidden at once and a snapshot is
asked for by the verdict `RESYNC`; `load` brings it. Not thread-safe: it belongs to one event loop.

`BlockTable` holds keys and masks, `Columns` says which bit is whose, `Node` follows each node's stream.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

from kvstore.index.audit import Audit, AuditPolicy
from kvstore.index.base import IndexCounts, NodeReach, NodeSnapshot, Reach, Section, Verdict, split_keys
from kvstore.index.columns import TIERS, Columns, bits_of, iter_bits, sections_of
from kvstore.index.nodes import Node, State
from kvstore.index.table import SLICE, USED, BlockTable
from kvstore.types import KEY_BYTES, EventKind, Place, StoreEvent, Tier
from pdserve.errors import InvalidRequest, Overloaded

DEFAULT_MAX_ENTRIES = 4_000_000
"""16-token blocks: 64M tokens, in about 600 MB."""
MAX_NODES = 1024
"""Each live node widens the masks by three bits a layout; more than this many is a fault of discovery."""
MAX_LAYOUTS = 16
"""Fingerprints a node may report: it has one, or a few around a conversion."""
TIDY_PER_TICK = 4096
"""Entries that the hand passes at each `expire` (under 1 ms)."""
MAX_BURIED_BITS = 3 * 256
"""Places of gone nodes that may wait for the hand; past it they are cleared in one go."""


class KVIndex:
    """The map from block keys to places. `clock` is any clock in seconds."""

    def __init__(
        self,
        *,
        max_entries: int = DEFAULT_MAX_ENTRIES,
        lease_s: float = 10.0,
        audit: AuditPolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`lease_s`: how long a node is believed without a sign of life."""
        self.counts = IndexCounts()
        self.audit = Audit(audit or AuditPolicy())
        self._table = BlockTable(max_entries)
        self._columns = Columns()
        self._nodes: dict[str, Node] = {}
        self._live: dict[bytes, int] = {}
        self._buried = 0
        self.lease_s = lease_s
        self._clock = clock
        self._next_deadline = float("inf")

    # What is known

    def __len__(self) -> int:
        """Entries held, at most `max_entries`; some may wait to be tidied away."""
        return len(self._table)

    @property
    def max_entries(self) -> int:
        return self._table.max_entries

    def match(self, keys: bytes, fingerprint: bytes) -> dict[str, NodeReach]:
        """For each node that has the first block of the chain: how many leading blocks it has, by tier.

        `keys` are packed, 16 bytes a block (`pdserve.block_keys`). Hot path: one dict look-up a key, some bit
        arithmetic where the set of places changes.
        """
        self._expire_if_due()
        found: dict[str, list[int]] = {}
        for bits, length in self._ends(keys, self._live.get(fingerprint, 0)):
            for bit in iter_bits(bits):
                node, tier = self._columns.owner(bit)
                found.setdefault(node, [0] * TIERS)[tier] = length
        return {name: self._reach(name, *lengths) for name, lengths in found.items()}

    def _reach(self, name: str, hbm: int, dram: int, disk: int) -> NodeReach:
        return NodeReach(hbm, dram, disk, self._nodes[name].incarnation)

    def _ends(self, keys: bytes, alive: int) -> list[tuple[int, int]]:
        """(place bits, length): the places whose runs end after `length` blocks, places spread over farther tiers."""
        if not alive:
            return []
        get, spread = self._table.masks.get, self._columns.spread
        ends: list[tuple[int, int]] = []
        unmarked: list[bytes] = []
        last = -1
        for start in range(0, len(keys), KEY_BYTES):
            key = keys[start : start + KEY_BYTES]
            mask = get(key, 0)
            if mask != last:
                last, left = mask, alive & spread(mask)
                if left != alive:
                    ends.append((alive ^ left, start // KEY_BYTES))
                    alive = left
                    if not alive:
                        break
            if not mask & USED:
                unmarked.append(key)
        self._table.mark_used(unmarked)
        ends.append((alive, len(keys) // KEY_BYTES))
        return [end for end in ends if end[1]]

    def match_group(self, keys: bytes, fingerprint: bytes, nodes: Iterable[str]) -> Reach:
        """How many leading blocks `nodes` can give together: a worker and its node's store, say."""
        self._expire_if_due()
        group = self._group_bits(nodes, fingerprint)
        lengths: list[int] = []
        get, spread = self._table.masks.get, self._columns.spread
        for start in range(0, len(keys), KEY_BYTES):
            mask = spread(get(keys[start : start + KEY_BYTES], 0))
            while len(lengths) < TIERS and not mask & group[len(lengths)]:
                lengths.append(start // KEY_BYTES)
            if len(lengths) == TIERS:
                break
        lengths += [len(keys) // KEY_BYTES] * (TIERS - len(lengths))
        return Reach(*lengths)

    def _group_bits(self, nodes: Iterable[str], fingerprint: bytes) -> list[int]:
        """By tier, the bits of the live ones of `nodes`."""
        live = self._live.get(fingerprint, 0)
        known = (self._nodes[name] for name in nodes if name in self._nodes)
        columns = {node.columns[fingerprint] for node in known if fingerprint in node.columns}
        return [sum(1 << (column + tier) for column in columns) & live for tier in Tier]

    def locate(self, key: bytes, fingerprint: bytes) -> tuple[Place, ...]:
        """Every place where this block can be read now."""
        self._expire_if_due()
        mask = self._table.masks.get(key, 0) & self._live.get(fingerprint, 0)
        owners = map(self._columns.owner, iter_bits(mask))
        return tuple(Place(node, tier, self._nodes[node].incarnation) for node, tier in owners)

    def position(self, name: str) -> tuple[int, int, int] | None:
        """(incarnation, last event applied, epoch) of a live node. The epoch changes when its entries were replaced."""
        self._expire_if_due()
        node = self._nodes.get(name)
        return (node.incarnation, node.sequence, node.epoch) if node and node.state is State.LIVE else None

    def num_nodes(self) -> Counter[State]:
        """Nodes by state."""
        self._expire_if_due()
        return Counter(node.state for node in self._nodes.values())

    def live_nodes(self) -> list[str]:
        self._expire_if_due()
        return [name for name, node in self._nodes.items() if node.state is State.LIVE]

    def awaiting(self) -> list[tuple[str, int]]:
        """(node, incarnation) of those whose snapshot is wanted: ask them again now and then."""
        self._expire_if_due()
        return [(name, node.incarnation) for name, node in self._nodes.items() if node.state is State.WAITING]

    # What happens

    def apply(self, name: str, incarnation: int, events: Sequence[StoreEvent]) -> Verdict:
        """Takes a node's events, in the order they were sent. A sign of life too.

        Raises `Overloaded` (too many nodes), `InvalidRequest` (too many layouts).
        """
        node = self._greet(name, incarnation, self.lease_s)
        if node is None:
            self.counts.stale += len(events)
            return Verdict.STALE
        if node.state is State.LIVE:
            return self._advance(node, events)
        if node.state is State.DISTRUSTED:
            return Verdict.DISTRUSTED
        node.hold(events)
        return Verdict.RESYNC

    def renew(self, name: str, incarnation: int, *, sequence: int = 0, lease_s: float | None = None) -> Verdict:
        """A heartbeat. `sequence`: the node's last event number, if heartbeats and events come in one order: then a
        lost last event is noticed too. `lease_s` where it differs from the index's own."""
        node = self._greet(name, incarnation, self.lease_s if lease_s is None else lease_s)
        if node is None:
            return Verdict.STALE
        if node.state is State.DISTRUSTED:
            return Verdict.DISTRUSTED
        node.seen = max(node.seen, sequence)
        if node.state is State.LIVE and node.seen > node.sequence:
            self._suspend(node)
        return Verdict.APPLIED if node.state is State.LIVE else Verdict.RESYNC

    def load(self, snapshot: NodeSnapshot, *, lease_s: float | None = None) -> Verdict:
        """Replaces what is known of a node, then applies the events held for it. `RESYNC`: too old, ask again.
        `DUPLICATE`: the index already stands later. About 0.5 µs a block, all at once: see `load_in_steps`."""
        steps = self.load_in_steps(snapshot, lease_s=lease_s)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                verdict: Verdict = end.value
                return verdict

    def load_in_steps(self, snapshot: NodeSnapshot, *, lease_s: float | None = None) -> Generator[None, None, Verdict]:
        """As `load`, pausing after every few thousand blocks; the node shows nothing until the end. If it is restarted
        or loaded anew meanwhile, this load is dropped: `STALE`."""
        node = self._greet(snapshot.node, snapshot.incarnation, self.lease_s if lease_s is None else lease_s)
        if node is None:
            return Verdict.STALE
        if node.state is State.DISTRUSTED:
            return Verdict.DISTRUSTED
        if node.state is State.LIVE and snapshot.sequence < node.sequence:
            return Verdict.DUPLICATE
        self._suspend(node)
        epoch = node.epoch
        for _ in self._fill(node, snapshot.sections):
            yield
            if node.epoch != epoch or node.state is not State.WAITING:
                return Verdict.STALE
        return self._commit(node, snapshot.sequence)

    def expire(self) -> list[str]:
        """Call it every tick: nodes whose lease ran out vanish (their names are returned), and some tidying is done."""
        now = self._clock()
        over = [n for n in self._nodes.values() if n.state in (State.LIVE, State.WAITING) and n.deadline <= now]
        for node in over:
            self._drop(node, State.EXPIRED)
        self.counts.expired_nodes += len(over)
        waiting = (n.deadline for n in self._nodes.values() if n.state in (State.LIVE, State.WAITING))
        self._next_deadline = min(waiting, default=float("inf"))
        self._tidy(TIDY_PER_TICK)
        return [node.name for node in over]

    def remove(self, name: str) -> None:
        """The node said goodbye. Late news of this incarnation starts with a snapshot again."""
        if (node := self._nodes.get(name)) is not None:
            self._drop(node, State.EXPIRED)

    def observe(self, name: str, incarnation: int, predicted_tokens: int, reported_tokens: int) -> bool:
        """How many tokens a request was to find cached at a node, and how many it found. True if the node is aged out
        by this: nothing of it is shown or taken until it restarts."""
        node = self._nodes.get(name)
        if node is None or node.incarnation != incarnation or node.state is State.DISTRUSTED:
            return False
        if not self.audit.observe(name, incarnation, predicted_tokens, reported_tokens):
            return False
        self._drop(node, State.DISTRUSTED)
        self.counts.distrusted_nodes += 1
        return True

    def export(self, name: str) -> Iterator[list[Section]]:
        """A live node's blocks, some at a time; the index may change meanwhile, then the whole fits the snapshot rule
        of `NodeSnapshot` with the sequence at the start. Ends early if the node's epoch changes: check `position`."""
        node = self._nodes[name]
        epoch = node.epoch
        bits = sum(map(bits_of, node.columns.values()))
        for found in self._table.slices_with(bits):
            if node.epoch != epoch:
                return
            yield sections_of(node.columns, found)

    def check_integrity(self) -> None:
        """Linear. Raises `IntegrityError`."""
        self._table.check_integrity()

    # How

    def _greet(self, name: str, incarnation: int, lease_s: float) -> Node | None:
        """The node's record, its lease renewed; None if `incarnation` is an old one."""
        self._expire_if_due()
        node = self._nodes.get(name) or self._meet(name, incarnation)
        if incarnation < node.incarnation:
            return None
        if incarnation > node.incarnation:
            self._drop(node, State.WAITING)
            node.begin(incarnation)
            self.counts.restarts += 1
        elif node.state is State.EXPIRED:
            node.state = State.WAITING
        node.deadline = self._clock() + lease_s
        self._next_deadline = min(self._next_deadline, node.deadline)
        return node

    def _meet(self, name: str, incarnation: int) -> Node:
        if len(self._nodes) >= MAX_NODES:
            self._forget_one()
        node = self._nodes[name] = Node(name, incarnation, deadline=0.0)
        return node

    def _forget_one(self) -> None:
        now = self._clock()
        over = (State.EXPIRED, State.DISTRUSTED)
        gone = next((name for name, n in self._nodes.items() if n.state in over and n.deadline <= now), None)
        if gone is None:
            raise Overloaded(f"the index follows {MAX_NODES} nodes already; is discovery making up names?")
        del self._nodes[gone]
        self.audit.forget(gone)

    def _expire_if_due(self) -> None:
        if self._clock() >= self._next_deadline:
            self.expire()

    def _advance(self, node: Node, events: Sequence[StoreEvent]) -> Verdict:
        verdict, keys = Verdict.DUPLICATE, 0
        for position, event in enumerate(events):
            if event.sequence <= node.sequence:
                self.counts.duplicates += 1
            elif event.sequence == node.sequence + 1:
                self._take(node, event)
                keys += len(event.keys)
                verdict = Verdict.APPLIED
            else:
                self.counts.gaps += 1
                self._suspend(node)
                node.hold(events[position:])
                return Verdict.RESYNC
        self._tidy(2 * keys)
        return verdict if events else Verdict.APPLIED

    def _take(self, node: Node, event: StoreEvent) -> None:
        """Applies the next event."""
        if event.kind is EventKind.CLEARED:
            self._clear_tier(node, event.tier)
        else:
            bit = self._bit(node, event.fingerprint, event.tier)
            change = self._table.add if event.kind is EventKind.STORED else self._table.discard
            for key in event.keys:
                change(key, bit)
        node.sequence = event.sequence
        node.seen = max(node.seen, event.sequence)
        self.counts.events += 1

    def _clear_tier(self, node: Node, tier: Tier) -> None:
        """A worker has one tier, and its columns are given up. A store has two, the other stays: linear in entries."""
        if node.tiers <= {tier}:
            self._give_up_columns(node)
            return
        for column in node.columns.values():
            self._table.clear_bit(1 << (column + tier))
        node.tiers.discard(tier)

    def _bit(self, node: Node, fingerprint: bytes, tier: Tier) -> int:
        node.tiers.add(tier)
        column = node.columns.get(fingerprint)
        if column is None:
            if len(node.columns) >= MAX_LAYOUTS:
                raise InvalidRequest(f"{node.name} reports more than {MAX_LAYOUTS} layouts", param="fingerprint")
            column = node.columns[fingerprint] = self._columns.allocate(node.name)
            if node.state is State.LIVE:
                self._show(fingerprint, column)
        return 1 << (column + tier)

    def _show(self, fingerprint: bytes, column: int) -> None:
        self._live[fingerprint] = self._live.get(fingerprint, 0) | bits_of(column)

    def _fill(self, node: Node, sections: Iterable[Section]) -> Iterator[None]:
        for section in sections:
            bit = self._bit(node, section.fingerprint, section.tier)
            for start in range(0, len(section.keys), SLICE * KEY_BYTES):
                for key in split_keys(section.keys[start : start + SLICE * KEY_BYTES]):
                    self._table.add(key, bit)
                yield

    def _commit(self, node: Node, sequence: int) -> Verdict:
        """The snapshot is in: show it, and go on from it with what was held."""
        node.state, node.sequence = State.LIVE, sequence
        for fingerprint, column in node.columns.items():
            self._show(fingerprint, column)
        self.counts.snapshots += 1
        self._advance(node, node.release())
        if node.state is State.LIVE and node.sequence < node.seen:
            self._suspend(node)
        return Verdict.APPLIED if node.state is State.LIVE else Verdict.RESYNC

    def _suspend(self, node: Node) -> None:
        self._drop(node, State.WAITING, keep_held=True)

    def _drop(self, node: Node, state: State, *, keep_held: bool = False) -> None:
        """Nothing of the node is shown any more."""
        self._give_up_columns(node)
        node.state = state
        if not keep_held:
            node.release()

    def _give_up_columns(self, node: Node) -> None:
        """The hand will clear what the node had."""
        for fingerprint, column in node.columns.items():
            bits = self._columns.retire(column)
            self._live[fingerprint] = self._live.get(fingerprint, 0) & ~bits
            if not self._live[fingerprint]:
                del self._live[fingerprint]
            self._table.bury(bits)
            self._buried += TIERS
        node.columns, node.tiers = {}, set()
        node.epoch += 1

    def _tidy(self, steps: int) -> None:
        cleared = self._table.tidy_all() if self._buried > MAX_BURIED_BITS else self._table.tidy(steps)
        self.counts.evicted = self._table.num_evicted
        if cleared:
            self._buried -= cleared.bit_count()
            self._columns.reclaim(cleared)
