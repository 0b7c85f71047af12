"""The books: which block stands in which record, which segments there are, and what leaves when room is needed.

All of it in memory, under one lock that is never held across I/O. A thread that is about to read or erase takes the
segment (`readers`), so that its file stays open; the last one to let go of a retired segment closes it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from kvstore.disk.events import DiskObserver, Gone
from kvstore.disk.footer import DEAD, LIVE
from kvstore.disk.record import Record
from kvstore.disk.segment import Segment
from kvstore.eviction.base import EvictionPolicy, require
from kvstore.types import KEY_BYTES, BlockId

Clock = Callable[[], float]


def policy_key(block: BlockId) -> bytes:
    """What the policy calls a block: key and fingerprint, since two layouts' blocks of one prefix leave apart."""
    return block.key + block.fingerprint


class Catalog:
    """Thread-safe. `lock` may be taken by the owner to make several calls one."""

    def __init__(self, policy: EvictionPolicy, observer: DiskObserver, clock: Clock) -> None:
        self.lock = threading.RLock()
        self.segments: dict[int, Segment] = {}
        self._index: dict[BlockId, Record] = {}
        self._policy = policy
        self._observer = observer
        self._clock = clock

    def __len__(self) -> int:
        return len(self._index)

    def ids(self) -> list[BlockId]:
        with self.lock:
            return list(self._index)

    def find(self, block: BlockId) -> Record | None:
        return self._index.get(block)

    @property
    def live_bytes(self) -> int:
        with self.lock:
            return sum(segment.live_bytes for segment in self.segments.values())

    # -- segments --------------------------------------------------------------------------------------------------

    def hold(self, record: Record) -> Segment | None:
        """Takes the segment of `record`, whether that is live or not; None when the segment left the books."""
        with self.lock:
            segment = self.segments.get(record.segment)
            if segment is not None:
                segment.readers += 1
            return segment

    def take(self, ids: Sequence[BlockId]) -> dict[BlockId, tuple[Record, Segment]]:
        """The records of those blocks that are here, their segments held. Give each back by `release`."""
        with self.lock:
            found = {block: self._index[block] for block in ids if block in self._index}
            taken = {block: (record, self.segments[record.segment]) for block, record in found.items()}
            for _, segment in taken.values():
                segment.readers += 1
            return taken

    def release(self, segment: Segment, count: int = 1) -> None:
        with self.lock:
            segment.readers -= count
            if segment.retired and not segment.readers:
                segment.close()

    def retire(self, segment: Segment) -> None:
        """Out of the books. Its blocks must have left; its file is closed when the last reader lets go."""
        with self.lock:
            del self.segments[segment.number]
            segment.retired = True
            if not segment.readers:
                segment.close()

    def states(self, segment: Segment) -> bytes:
        """One byte a record of the segment: live or not."""
        with self.lock:
            return b"".join(LIVE if self._index.get(r.id) == r else DEAD for r in segment.records)

    def clear(self, policy: EvictionPolicy) -> None:
        """Everything leaves the books, for `Gone.OFF`; the files stay. `policy` is a fresh one."""
        with self.lock:
            for record in list(self._index.values()):
                self._leave(record, Gone.OFF)
            for segment in list(self.segments.values()):
                self.retire(segment)
            self._policy = policy

    # -- blocks ----------------------------------------------------------------------------------------------------

    def touch(self, ids: Sequence[BlockId], *, extends: bool = False) -> None:
        """One request used these blocks, as far as they are here."""
        with self.lock:
            keys = [policy_key(block) for block in dict.fromkeys(ids) if block in self._index]
            if keys:
                self._policy.access(keys, self._clock(), extends=extends)

    def publish(self, records: Sequence[Record]) -> None:
        """These records are whole: serve them."""
        with self.lock:
            for record in records:
                self._enter(record)
            self._observer.stored([record.id for record in records])

    def _enter(self, record: Record) -> None:
        old = self._index.get(record.id)
        if old is not None:
            self.segments[old.segment].live_bytes -= old.nbytes
        self._index[record.id] = record
        self.segments[record.segment].live_bytes += record.nbytes

    def move(self, old: Record, new: Record) -> bool:
        """A compaction copied `old` to `new`. False when the block left meanwhile: then the copy is void."""
        with self.lock:
            if self._index.get(old.id) != old:
                return False
            self._enter(new)
            return True

    def drop(self, record: Record, reason: str) -> bool:
        """The block leaves. False when it did already, or stands in another record by now."""
        with self.lock:
            if self._index.get(record.id) != record:
                return False
            self._policy.forget(policy_key(record.id))
            self._leave(record, reason)
            return True

    def _leave(self, record: Record, reason: str) -> None:
        del self._index[record.id]
        self.segments[record.segment].live_bytes -= record.nbytes
        self._observer.removed(record.id, reason)

    def evict(self, allowed: Callable[[BlockId], bool]) -> Record | None:
        """The policy's next victim, gone from the books; None when none may leave."""
        with self.lock:
            key = self._policy.evict(self._clock(), lambda k: allowed(_block(k)))
            if key is None:
                return None
            record = self._index[_block(key)]
            self._leave(record, Gone.EVICTED)
            return record

    def live_records(self, segment: Segment) -> list[Record]:
        with self.lock:
            return [record for record in segment.records if self._index.get(record.id) == record]

    def check_integrity(self) -> None:
        """Linear. Raises `IntegrityError` when the books disagree."""
        with self.lock:
            sizes = dict.fromkeys(self.segments, 0)
            for block, record in self._index.items():
                require(record.id == block, f"{block} stands under another block's name")
                require(record.segment in sizes, f"{block} stands in segment {record.segment}, which is gone")
                require(policy_key(block) in self._policy, f"the policy does not know {block}")
                sizes[record.segment] += record.nbytes
            for number, size in sizes.items():
                counted = self.segments[number].live_bytes
                require(counted == size, f"segment {number} has {size} live bytes, the books say {counted}")
            require(len(self._policy) == len(self._index), f"{len(self._policy)} blocks in the policy")
            self._policy.check_integrity()


def _block(key: bytes) -> BlockId:
    return BlockId(key[:KEY_BYTES], key[KEY_BYTES:])
