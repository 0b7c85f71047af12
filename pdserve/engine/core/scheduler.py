"""Continuous batching: which sequences compute how many tokens in the next step, and in which blocks.

Every step takes the running decodes first, then a chunk of each prompt under way, then new ones, all in the order
(priority, arrival, choice), within a token budget. A prompt gets all its blocks when it is admitted, so only decodes
can run out of room. Then the youngest sequence gives up its blocks and is computed anew later (its full blocks are
mostly still in the prefix cache). PREFILL submissions are never preempted: what they exported must stay.

Nothing waits for ever: a sequence only ever waits for older ones, or for blocks that a peer or a transfer holds. The
oldest one may take everything from the younger if else the step would be empty.

Blocks that became known while a prompt was under way (another request computed them, or they were fetched) are taken
instead of computed, where they begin at the end of a chunk.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pdserve.engine.core.batch import Batch
from pdserve.engine.core.blocks import BlockManager
from pdserve.engine.core.config import CoreConfig
from pdserve.engine.core.fills import Fills
from pdserve.engine.core.prefix_cache import PrefixCache
from pdserve.engine.core.sequences import Choice, Group, Order, Work
from pdserve.types import Phase


@dataclass(slots=True, eq=False)
class Reservation:
    """Blocks that a DECODE submission will need for its context."""

    order: Order
    num_blocks: int
    granted: bool = False


def _order(entry: Choice | Reservation) -> Order:
    return entry.order


class Scheduler:
    """Owns the queues and the block tables of all sequences that are to run."""

    def __init__(self, config: CoreConfig, pool: BlockManager, cache: PrefixCache, fills: Fills) -> None:
        self.decoding: list[Choice] = []
        self.prefilling: list[Choice] = []
        self.waiting: list[Choice] = []
        """Those with blocks wait for a slot only."""
        self.reserving: list[Reservation] = []
        self.reserved: list[Reservation] = []
        """Granted, and not yet turned into blocks."""
        self.stuck = False
        """Nothing could be scheduled; only an event from outside can change that."""
        self.num_preemptions = 0
        self._config = config
        self._pool = pool
        self._cache = cache
        self._fills = fills
        self._block_tokens = cache.block_tokens
        self._watermark = int(config.watermark * pool.num_blocks)
        self._step = 0

    @property
    def num_running(self) -> int:
        return len(self.decoding) + len(self.prefilling)

    @property
    def has_sequences(self) -> bool:
        return bool(self.decoding or self.prefilling or self.waiting)

    @property
    def num_prefill_tokens_waiting(self) -> int:
        return sum(seq.num_uncomputed_tokens for seq in (*self.prefilling, *self.waiting))

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_tokens)

    # Queues

    def add(self, seq: Choice) -> None:
        """Queue a sequence. One that has blocks and only decodes starts at once if there is a slot."""
        if seq.block_table and self.num_running < self._config.max_num_seqs:
            self._start(seq)
        else:
            insort(self.waiting, seq, key=_order)

    def remove(self, seq: Choice) -> None:
        """Take a sequence out, wherever it is, and free its blocks."""
        for queue in (self.decoding, self.prefilling, self.waiting):
            if seq in queue:
                queue.remove(seq)
                break
        self._release(seq)

    def reserve(self, reservation: Reservation) -> None:
        insort(self.reserving, reservation, key=_order)
        self.grant()

    def grant(self) -> None:
        """Grant reservations in order, leaving room for whoever has waited longer."""
        while self.reserving:
            first = self.reserving[0]
            if first.num_blocks + self._need_of_older_waiting(first) <= self._pool.num_available:
                self._grant(first)
            elif not self._fills.give_way():
                return

    def withdraw(self, reservation: Reservation) -> None:
        """The reservation is used up or no longer wanted."""
        if reservation.granted:
            self._pool.unreserve(reservation.num_blocks)
            self.reserved.remove(reservation)
        else:
            self.reserving.remove(reservation)

    def open_reserved(self, seq: Choice, reservation: Reservation) -> bool:
        """Its KV is ready to come: turn the reservation into blocks, the cached ones first; False while there is no
        room."""
        self.grant()
        if not reservation.granted and not self._take_over(reservation):
            return False
        self.withdraw(reservation)
        table = self._pool.open_table(self._cache.keys_of(seq, len(seq.token_ids)), reservation.num_blocks)
        assert table is not None, "what was reserved is there"
        self._hold(seq, *table)
        return True

    def _grant(self, reservation: Reservation) -> None:
        self._pool.reserve(reservation.num_blocks)
        reservation.granted = True
        self.reserving.remove(reservation)
        insort(self.reserved, reservation, key=_order)

    def _revoke(self, reservation: Reservation) -> None:
        self._pool.unreserve(reservation.num_blocks)
        reservation.granted = False
        self.reserved.remove(reservation)
        insort(self.reserving, reservation, key=_order)

    def _take_over(self, reservation: Reservation) -> bool:
        """Use what was reserved for others whose KV is not there yet, the youngest first. Else two pools may wait for
        each other: the exporter, full of KV that has no room here, can't compute the KV that has."""
        need = reservation.num_blocks + self._need_of_older_waiting(reservation)
        if need > self._pool.num_available + sum(other.num_blocks for other in self.reserved):
            return False
        while need > self._pool.num_available:
            self._revoke(self.reserved[-1])
        self._grant(reservation)
        return True

    # A step

    def schedule(self) -> Batch:
        """The next batch."""
        self._step += 1
        num_preemptions = self.num_preemptions
        batch = Batch()
        self._schedule_decodes(batch)
        budget = self._schedule_chunks(batch, self._config.max_num_batched_tokens - len(batch.items))
        self.grant()
        if num_preemptions == self.num_preemptions:
            self._admit(batch, budget)
        self.stuck = not batch.items
        return batch

    def advance(self, item: Work) -> None:
        """The item was computed: publish the blocks that it filled."""
        seq = item.seq
        seq.num_computed_tokens = num_computed = item.start + item.num_tokens
        if num_computed // self._block_tokens > seq.num_published:
            self._cache.publish(seq)
        if not seq.decoding and not seq.num_uncomputed_tokens:
            self._promote(seq)

    def _schedule_decodes(self, batch: Batch) -> None:
        """One token each. Hot path, so the usual case is written out: the token goes into a block of its own."""
        for seq in tuple(self.decoding):
            table, start = seq.block_table, seq.num_computed_tokens
            if not table:
                continue  # preempted by an older one in this very loop
            index = start // self._block_tokens
            roomy = index < len(table) and not self._pool.is_shared(table[index])
            if roomy or self._make_room(seq, batch):
                batch.items.append(Work(seq, start, 1, (seq,)))
                seq.step = self._step

    def _schedule_chunks(self, batch: Batch, budget: int) -> int:
        for seq in tuple(self.prefilling):
            if not budget:
                break
            if seq.block_table and self._make_room(seq, batch):
                budget -= self._append(seq, batch, budget)
        return budget

    def _append(self, seq: Choice, batch: Batch, budget: int) -> int:
        """Put the next chunk of a sequence that has room into the batch; its number of tokens, 0 while what comes
        next is being fetched."""
        self._cache.adopt(seq)
        left = seq.num_uncomputed_tokens
        num_tokens = min(left, self._config.chunk_tokens, budget, self._cache.left_to_compute(seq))
        if not num_tokens:
            return 0
        choices = self._sampled(seq) if num_tokens == left else ()
        batch.items.append(Work(seq, seq.num_computed_tokens, num_tokens, choices))
        batch.num_prompt_tokens += num_tokens
        seq.step = self._step
        return num_tokens

    @staticmethod
    def _sampled(seq: Choice) -> tuple[Choice, ...]:
        group = seq.group
        return (seq,) if group.context_done else group.choices_at_context_end()

    def _admit(self, batch: Batch, budget: int) -> None:
        while self.waiting and budget:
            seq = self.waiting[0]
            if not self._make_slot(seq, batch) or not (seq.block_table or self._open(seq, batch)):
                return
            self.waiting.remove(seq)
            self._start(seq)
            if self._make_room(seq, batch):
                budget -= self._append(seq, batch, budget)

    def _start(self, seq: Choice) -> None:
        seq.decoding = seq.group.context_done and seq.num_uncomputed_tokens == 1
        insort(self.decoding if seq.decoding else self.prefilling, seq, key=_order)

    def _promote(self, seq: Choice) -> None:
        """A prompt, or what was recomputed, is complete."""
        self.prefilling.remove(seq)
        seq.decoding = True
        insort(self.decoding, seq, key=_order)

    # Room

    def _open(self, seq: Choice, batch: Batch) -> bool:
        """Give a waiting sequence its blocks, the cached ones first; its last token is always computed."""
        num_tokens = len(seq.token_ids)
        num_blocks = self.num_blocks_for(num_tokens)
        while True:
            spare = self._watermark if self.num_running else 0
            spare += self._need_of_older_reservation(seq)
            table = self._pool.open_table(self._cache.keys_of(seq, num_tokens - 1), num_blocks, spare)
            if table is not None:
                break
            if self._fills.give_way():
                continue
            if batch.items or not self._preempt_younger(seq):
                return False
        self._hold(seq, *table)
        return True

    def _hold(self, seq: Choice, table: list[int], num_found: int) -> None:
        seq.block_table = table
        seq.num_published = num_found
        seq.num_computed_tokens = num_found * self._block_tokens
        self._cache.found(seq)

    def _make_room(self, seq: Choice, batch: Batch) -> bool:
        """Blocks of its own for all tokens to be computed; False if it must sit this step out."""
        table = seq.block_table
        tail = seq.num_computed_tokens // self._block_tokens
        while True:
            shared = tail < len(table) and self._pool.is_shared(table[tail])
            missing = self.num_blocks_for(len(seq.token_ids)) - len(table)
            if not shared and missing <= 0:
                return True
            if missing + shared <= self._pool.num_available:
                break
            if self._fills.give_way():
                continue
            if not self._preempt_younger(seq):
                return False
        if shared:
            self._copy_on_write(table, tail, batch)
        if missing > 0:
            table += self._pool.allocate(missing, after=table[-1])
        return True

    def _copy_on_write(self, table: list[int], index: int, batch: Batch) -> None:
        source = table[index]
        (target,) = self._pool.allocate(1)
        batch.copy_sources.append(source)
        batch.copy_targets.append(target)
        self._pool.free([source])
        table[index] = target

    def _make_slot(self, seq: Choice, batch: Batch) -> bool:
        if self.num_running < self._config.max_num_seqs:
            return True
        victim = self._youngest((self.decoding, self.prefilling), seq)
        if batch.items or victim is None:
            return False
        self._preempt(victim)
        return True

    def _preempt_younger(self, seq: Choice) -> bool:
        """Give up what the youngest holds; first a mere reservation, which costs nothing."""
        if self.reserved and self.reserved[-1].order > seq.order:
            self._revoke(self.reserved[-1])
            return True
        victim = self._youngest((self.decoding, self.prefilling, self._waiting_with_blocks()), seq)
        if victim is None:
            return False
        self._preempt(victim)
        return True

    def _youngest(self, queues: Iterable[Iterable[Choice]], than: Choice) -> Choice | None:
        """The youngest sequence that may be preempted for `than`: not one that is in the batch already."""
        candidates = (
            seq
            for queue in queues
            for seq in queue
            if seq.order > than.order and seq.step != self._step and seq.group.phase is not Phase.PREFILL
        )
        return max(candidates, key=_order, default=None)

    def _waiting_with_blocks(self) -> Iterator[Choice]:
        return (seq for seq in self.waiting if seq.block_table)

    def _preempt(self, victim: Choice) -> None:
        """Recompute later: what it has put out stays, and its next token keeps its output index."""
        self.num_preemptions += 1
        victim.group.was_preempted = True
        self.remove(victim)
        insort(self.waiting, victim, key=_order)

    def _release(self, seq: Choice) -> None:
        self._pool.free(seq.block_table)
        seq.block_table = []
        seq.num_computed_tokens = 0
        seq.num_published = 0
        seq.decoding = False

    def _need_of_older_waiting(self, reservation: Reservation) -> int:
        """Blocks to leave for the first waiting sequence, if it came before."""
        if not self.waiting or self.waiting[0].order > reservation.order:
            return 0
        return self.num_blocks_for(len(self.waiting[0].token_ids)) - len(self.waiting[0].block_table)

    def _need_of_older_reservation(self, seq: Choice) -> int:
        if not self.reserving or self.reserving[0].order > seq.order:
            return 0
        return self.reserving[0].num_blocks

    def room_for_fill(self) -> int:
        """Blocks that a fill may take: what nobody waits for."""
        room = self._pool.num_available - self._watermark
        if self.waiting:
            room -= self.num_blocks_for(len(self.waiting[0].token_ids)) - len(self.waiting[0].block_table)
        return room - (self.reserving[0].num_blocks if self.reserving else 0)

    # Self-check

    def check_integrity(self, groups: Iterable[Group]) -> None:
        """`groups`: all requests. Raises `AssertionError` if the queues hold a sequence twice, a dead one, or out of
        order."""
        queues = (self.decoding, self.prefilling, self.waiting)
        queued = [id(seq) for queue in queues for seq in queue]
        known = {id(seq) for group in groups for seq in group.sequences() if seq.alive}
        assert len(set(queued)) == len(queued), "a sequence is queued twice"
        assert known.issuperset(queued), "a sequence is queued whose request has ended"
        for queue in queues:
            assert [seq.order for seq in queue] == sorted(seq.order for seq in queue), "a queue is out of order"
        assert all(seq.block_table for queue in queues[:2] for seq in queue), "a running sequence has no blocks"
