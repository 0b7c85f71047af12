"""Which bit of a mask is whose: three neighbouring bits (HBM, DRAM, disk) for each layout of each node.

Neighbours, so that "in HBM or DRAM" for all nodes at once is one shift: `spread`. Bits of a node that left are given
out again only when no entry has them any more, so an old bit is never read as the new owner's.
"""

from __future__ import annotations

from kvstore.index.base import Section
from kvstore.types import Tier

FIRST_BIT = 1
"""Bit 0 belongs to the table."""
TIERS = len(Tier)
_TIERS = tuple(map(Tier, range(TIERS)))
"""A look-up by number costs a tenth of `Tier(number)`, and matching a prompt makes one for each node that has some."""


class Columns:
    """Hands out bits. A column is the number of its HBM bit."""

    def __init__(self) -> None:
        self._free: list[int] = []
        self._end = FIRST_BIT
        self._hbm = 0
        self._owners: dict[int, str] = {}

    def allocate(self, owner: str) -> int:
        column = self._free.pop() if self._free else self._extend()
        self._owners[column] = owner
        return column

    def retire(self, column: int) -> int:
        """The column has no owner from now on; its bits, to be buried in the table."""
        del self._owners[column]
        return bits_of(column)

    def reclaim(self, bits: int) -> None:
        """No entry has these bits any more."""
        self._free += iter_columns(bits)

    def owner(self, bit: int) -> tuple[str, Tier]:
        column = bit - (bit - FIRST_BIT) % TIERS
        return self._owners[column], _TIERS[bit - column]

    def spread(self, mask: int) -> int:
        """DRAM bits set where HBM or DRAM was, disk bits where any was."""
        mask |= (mask & self._hbm) << 1
        return mask | (mask & (self._hbm << 1)) << 1

    def _extend(self) -> int:
        column = self._end
        self._end += TIERS
        self._hbm |= 1 << column
        return column


def bits_of(column: int) -> int:
    """The three place bits of a column."""
    return ((1 << TIERS) - 1) << column


def iter_bits(mask: int) -> list[int]:
    """Numbers of the bits set, lowest first."""
    found = []
    while mask:
        low = mask & -mask
        found.append(low.bit_length() - 1)
        mask ^= low
    return found


def iter_columns(bits: int) -> list[int]:
    """Columns all or part of whose bits are set, lowest first."""
    return sorted({bit - (bit - FIRST_BIT) % TIERS for bit in iter_bits(bits)})


def sections_of(columns: dict[bytes, int], found: list[tuple[bytes, int]]) -> list[Section]:
    """What (key, mask) pairs say of one node, whose `columns` are given by fingerprint."""
    sections = []
    for fingerprint, column in columns.items():
        for tier in Tier:
            keys = b"".join(key for key, mask in found if mask >> (column + tier) & 1)
            if keys:
                sections.append(Section(tier, fingerprint, keys))
    return sections
