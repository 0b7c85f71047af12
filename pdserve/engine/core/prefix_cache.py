"""What sequences take from the prefix cache and give to it: at their admission, as they are computed, and when blocks
become known while they run. The scheduler decides when; blocks and keys are `blocks.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterable

from pdserve.engine.core.blocks import BlockManager
from pdserve.engine.core.fills import Fills
from pdserve.engine.core.news import CacheNews
from pdserve.engine.core.sequences import Choice


class PrefixCache:
    """One an engine. With `enabled` off nothing is ever found."""

    def __init__(self, pool: BlockManager, fills: Fills, news: CacheNews, block_tokens: int, enabled: bool) -> None:
        self.block_tokens = block_tokens
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0
        self._pool = pool
        self._fills = fills
        self._news = news
        self._enabled = enabled

    def publish(self, seq: Choice) -> None:
        """Make its full blocks findable."""
        if not self._enabled:
            return
        first, seq.num_published = seq.num_published, seq.num_computed_tokens // self.block_tokens
        for index in range(first, seq.num_published):
            self._pool.publish(seq.block_table[index], seq.key(index, self.block_tokens))
        self.tell(seq, first)

    def tell(self, seq: Choice, first: int) -> None:
        """Its blocks from `first` to the last one that the cache knows are news."""
        end, group = seq.num_published, seq.group
        self._news.took(seq.handle, first, seq.keys[first:end], seq.block_table[first:end])
        if end:
            self._pool.used(seq.keys[:end], extends=group.uses_cache)
            group.uses_cache = True

    def keys_of(self, seq: Choice, num_tokens: int) -> Iterable[bytes]:
        """Keys of the full blocks within its first `num_tokens` tokens, to be looked up."""
        if not self._enabled:
            return ()
        return (seq.key(index, self.block_tokens) for index in range(num_tokens // self.block_tokens))

    def found(self, seq: Choice) -> None:
        """It was admitted, its first blocks from the cache."""
        self.num_queried_tokens += len(seq.token_ids)
        self._count_hits(seq, seq.num_published)
        self.tell(seq, 0)

    def adopt(self, seq: Choice) -> None:
        """Take blocks that have become known instead of computing them; the last token is always computed."""
        first, rest = divmod(seq.num_computed_tokens, self.block_tokens)
        if rest or not self._enabled or seq.num_published < first:
            return
        index, limit = first, (len(seq.token_ids) - 1) // self.block_tokens
        while index < limit and (block := self._pool.find(seq.key(index, self.block_tokens))) is not None:
            self._pool.acquire([block])
            self._pool.free([seq.block_table[index]])
            seq.block_table[index] = block
            index += 1
        if index > first:
            seq.num_published, seq.num_computed_tokens = index, index * self.block_tokens
            self._count_hits(seq, index - first)
            self.tell(seq, first)

    def left_to_compute(self, seq: Choice) -> int:
        """Tokens up to those that were, or are being, fetched for it."""
        first = self._fills.start(seq.group.handle)
        left = seq.num_uncomputed_tokens
        if first is None or seq.group.context_done:
            return left
        to_fetched = first * self.block_tokens - seq.num_computed_tokens
        if to_fetched > 0:
            return to_fetched
        return 0 if not to_fetched and self._fills.is_open(seq.group.handle) else left

    def _count_hits(self, seq: Choice, num_blocks: int) -> None:
        """Blocks were found in the cache; what it had of its prompt when that is complete is what it tells."""
        group = seq.group
        self.num_hit_tokens += num_blocks * self.block_tokens
        num_fetched = self._fills.settle(group.handle, seq.num_computed_tokens // self.block_tokens)
        if not group.context_done and not group.was_preempted:
            num_cached = group.num_cached_tokens + num_blocks * self.block_tokens
            group.num_cached_tokens = min(num_cached, seq.num_prompt_tokens)
            num_fetched = min(num_fetched * self.block_tokens, group.num_cached_tokens)
            group.num_fetched_tokens = max(group.num_fetched_tokens, num_fetched)
