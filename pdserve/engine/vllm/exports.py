"""The prefill side inside the engine: prompts whose blocks vLLM saves for a decode worker.

The connector copies finished blocks out and moves the mark on the board; every step the engine looks at it and
announces what is new. Announced blocks are held until they are released; whole ones stay findable after that.
"""

from __future__ import annotations

from pdserve.engine.base import ExportedChunk
from pdserve.engine.vllm.news import CacheNews
from pdserve.engine.vllm.requests import Live
from pdserve.engine.vllm.staging import StagingPool


class Exports:
    """All PREFILL requests of one engine that have blocks still to come, in order."""

    def __init__(self, staging: StagingPool, news: CacheNews, *, caching: bool) -> None:
        self._staging = staging
        self._news = news
        self._caching = caching
        self._size = staging.block_tokens
        self._open: dict[Live, None] = {}

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, live: Live) -> bool:
        return live in self._open

    def begin(self, live: Live) -> None:
        self._open[live] = None

    def drop(self, live: Live) -> None:
        self._open.pop(live, None)

    def step(self) -> list[ExportedChunk]:
        """What was saved since the last look."""
        chunks = [self.announce(live) for live in list(self._open)]
        return [chunk for chunk in chunks if chunk is not None]

    def announce(self, live: Live) -> ExportedChunk | None:
        if live not in self._open:
            return None
        slot = live.choices[0].save_slot
        assert slot is not None, "an export keeps its slot until its last chunk is announced"
        num_saved, memory = self._staging.board.num_tokens(slot), self._staging.memory
        chunk = live.next_chunk(num_saved, self._size, memory.generations)
        if chunk is None:
            return None
        if self._caching:
            publish_context(self._staging, self._news, live, chunk.first_token, chunk.num_tokens)
        if chunk.final:
            self.drop(live)
            live.blocks = []
        return chunk


def publish_context(staging: StagingPool, news: CacheNews, live: Live, first_token: int, num_tokens: int) -> None:
    """Whole blocks of these tokens are in staging and final: `live.blocks` has them by position."""
    start, end = first_token // staging.block_tokens, (first_token + num_tokens) // staging.block_tokens
    keys = live.keys(live.choices[0], end, staging.block_tokens)[start:]
    digests = [live.digests.get(start + number) for number in range(len(keys))]
    blocks = live.blocks[start : start + len(keys)]
    found = [staging.publish(*entry) for entry in zip(blocks, keys, digests, strict=True)]
    news.took(live.handle, start, keys, found)
