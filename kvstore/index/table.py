"""Block key -> set of places, as one big dict of 16-byte keys to bit masks, bounded in size.

A mask is an int with a bit for each place (`columns` says whose); equal masks are one object, so an entry costs its
key (64 bytes), its share of the dict (40 to 80, as the dict fills and grows) and one pointer in the ring: 114 bytes
measured at a million entries. The ring holds every key once, in the order of the clock hand that evicts and tidies:
so one structure gives second chances, and removes dead places a few at a time instead of in one long pause.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from kvstore.eviction.base import require

USED = 1
"""Bit 0 of a mask: looked up since the hand passed. Places have bit 1 and up."""
MAX_SECOND_CHANCES = 64
"""Used entries that one insertion passes over before it evicts regardless: bounds the time of an insertion."""
SLICE = 8192
"""Entries looked at in one go (about 1 ms) where a whole pass would hold up the event loop."""
MAX_SHARED_MASKS = 1 << 16
"""Distinct masks that are kept as one object each; beyond it sharing starts afresh."""


class BlockTable:
    """Keys and masks. Knows nothing of nodes; not thread-safe.

    Eviction when full (CLOCK): the hand goes over the entries from the oldest; one without a place leaves, one that
    was looked up since the hand last passed gets a second chance, the first other one leaves.
    """

    def __init__(self, max_entries: int) -> None:
        require(max_entries > 0, "an index needs room for at least one entry")
        self.max_entries = max_entries
        self.masks: dict[bytes, int] = {}
        """For look-ups only: `get(key, 0)`."""
        self.num_evicted = 0
        self._ring: deque[bytes] = deque()
        self._shared: dict[int, int] = {}
        self._num_empty = 0
        self._dead = 0
        self._in_pass = False
        self._pass_dead = 0
        self._pass_left = 0

    def __len__(self) -> int:
        return len(self.masks)

    def add(self, key: bytes, bit: int) -> None:
        """Sets `bit` of `key`; a new key may push an old one out."""
        mask = self.masks.get(key)
        if mask is None:
            if len(self.masks) >= self.max_entries:
                self._make_room()
            self._ring.append(key)
            self.masks[key] = self._share(bit)
            return
        if not mask & bit:
            self._num_empty -= mask <= USED
            self.masks[key] = self._share(mask | bit)

    def discard(self, key: bytes, bit: int) -> None:
        """Clears `bit` of `key`. An entry without places waits for the hand, so that its ring slot stays its own."""
        mask = self.masks.get(key, 0)
        if mask & bit:
            left = mask ^ bit
            self._num_empty += left <= USED
            self.masks[key] = self._share(left)

    def mark_used(self, keys: list[bytes]) -> None:
        """Gives these keys a second chance; unknown ones are ignored."""
        masks = self.masks
        for key in keys:
            mask = masks.get(key, USED)
            if not mask & USED:
                masks[key] = self._share(mask | USED)

    def bury(self, bits: int) -> None:
        """These places are gone from everywhere: the hand will clear them. `reclaim` tells when."""
        self._dead |= bits

    def tidy(self, steps: int) -> int:
        """Moves the hand over at most `steps` entries. Returns places that a whole round has cleared: their bits may be
        given to others."""
        if not self._in_pass:
            if not self._dead and self._num_empty * 4 <= len(self.masks):
                return 0
            self._in_pass, self._pass_dead, self._pass_left = True, self._dead, len(self._ring)
        for _ in range(min(steps, self._pass_left)):
            self._step(second_chance=None)
        return 0 if self._pass_left else self._end_pass()

    def tidy_all(self) -> int:
        """A whole round at once: linear, for when too many dead places have gathered."""
        self._pass_dead, self._pass_left = self._dead, 0
        for key in list(self._ring):
            mask = self.masks[key]
            if mask & self._dead:
                self._num_empty += mask & ~self._dead <= USED
                self.masks[key] = self._share(mask & ~self._dead)
        return self._end_pass()

    def clear_bit(self, bit: int) -> None:
        """Clears one place from every entry, at once: linear (0.1 s for a million entries)."""
        for key in self._ring:
            self.discard(key, bit)

    def slices_with(self, bits: int) -> Iterator[list[tuple[bytes, int]]]:
        """(key, mask) of the entries that have any of `bits`, a list for every SLICE entries looked at. The table may
        change between two lists: it goes over a copy of the keys."""
        keys, get = list(self._ring), self.masks.get
        for start in range(0, len(keys), SLICE):
            found = [(key, get(key, 0)) for key in keys[start : start + SLICE]]
            yield [(key, mask) for key, mask in found if mask & bits]

    def check_integrity(self) -> None:
        """Linear. Raises `IntegrityError`."""
        require(len(self._ring) == len(self.masks), "ring and table differ in size")
        require(set(self._ring) == self.masks.keys(), "ring and table differ")
        require(len(self.masks) <= self.max_entries, "more entries than allowed")
        empty = sum(mask <= USED for mask in self.masks.values())
        require(empty == self._num_empty, "the count of empty entries is wrong")

    def _share(self, mask: int) -> int:
        if len(self._shared) >= MAX_SHARED_MASKS:
            self._shared.clear()
        return self._shared.setdefault(mask, mask)

    def _make_room(self) -> None:
        chances = MAX_SECOND_CHANCES
        while not self._step(second_chance=chances > 0):
            chances -= 1

    def _step(self, second_chance: bool | None) -> bool:
        """Looks at the oldest entry; whether it left. `second_chance` None: only an empty one may leave."""
        key = self._ring.popleft()
        mask = self.masks[key]
        if self._pass_left:
            self._pass_left -= 1
        live = mask & ~self._dead
        if live <= USED:
            self._num_empty -= mask <= USED
            del self.masks[key]
            return True
        if second_chance is False or (second_chance and not live & USED):
            self.num_evicted += 1
            del self.masks[key]
            return True
        if second_chance:
            live ^= USED
        if live != mask:
            self.masks[key] = self._share(live)
        self._ring.append(key)
        return False

    def _end_pass(self) -> int:
        cleared, self._pass_dead, self._in_pass = self._pass_dead, 0, False
        self._dead &= ~cleared
        return cleared
