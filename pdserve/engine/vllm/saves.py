"""Copies of what vLLM computes that go to the staging area for the store's sake, as long as a request runs: the full
blocks of a prompt that is decoded where it was prefilled, and of what is generated.

Nobody knows how many that will be. So blocks are granted as the request grows, two ahead, and only while nothing waits
for room: a save that finds none ends there, and costs nobody anything. A block that is full is published and let go
at once; as any published block it stays until its room is needed, long enough to be copied to the store.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pdserve.engine.vllm.news import CacheNews
from pdserve.engine.vllm.requests import Choice, Live
from pdserve.engine.vllm.staging import StagingPool

AHEAD = 2
"""Blocks that a running choice has granted and not filled. A step of vLLM's takes longer than a poll of the engine's,
and a block takes many steps."""


@dataclass(slots=True)
class _Save:
    live: Live
    slot: int
    next_block: int
    """Position in the choice's chain of the first block that is not published."""
    blocks: list[int]
    """For it and what follows."""
    told: bool = False
    """The choice's blocks before it were told of."""


class Saves:
    """All such saves of one engine."""

    def __init__(self, staging: StagingPool, news: CacheNews) -> None:
        self._staging = staging
        self._news = news
        self._size = staging.block_tokens
        self._saves: dict[Choice, _Save] = {}

    def begin(self, live: Live, choice: Choice, first_block: int, num_tokens: int) -> dict[str, Any] | None:
        """Save what comes after the first blocks; `num_tokens` of it are about to be computed. What the connector is
        told (`kvstore.vllm_connector.plan.Save`); None when there is no room."""
        num_blocks = num_tokens // self._size - first_block
        room = self._staging.allocate(max(num_blocks, 0), 1)
        if room is None:
            return None
        blocks, (choice.save_slot,) = room
        self._saves[choice] = _Save(live, choice.save_slot, first_block, blocks)
        return {"slot": choice.save_slot, "first_block": first_block, "blocks": list(blocks), "num_tokens": 0}

    def step(self, *, room: bool) -> None:
        """Publish what is full; with `room`, grant blocks for what comes."""
        if not self._saves:
            return
        moved = self._staging.board.num_tokens_of([save.slot for save in self._saves.values()])
        for (choice, save), num_tokens in zip(self._saves.items(), moved, strict=True):
            self._publish(choice, save, num_tokens)
            while room and not choice.closed and len(save.blocks) < AHEAD:
                granted = self._staging.allocate(1, 0)
                if granted is None:
                    break
                self._staging.board.grant(save.slot, granted[0][0])
                save.blocks += granted[0]

    def _publish(self, choice: Choice, save: _Save, num_tokens: int) -> None:
        saved = num_tokens // self._size
        if saved <= save.next_block:
            return
        if not save.told:
            self._tell_before(choice, save)
        keys = save.live.keys(choice, saved, self._size)[save.next_block :]
        full, save.blocks = save.blocks[: len(keys)], save.blocks[len(keys) :]
        found = [self._staging.publish(block, key) for block, key in zip(full, keys, strict=True)]
        self._news.took(choice.handle, save.next_block, keys, found)
        save.next_block += len(keys)
        self._staging.retire_blocks(full)

    def _tell_before(self, choice: Choice, save: _Save) -> None:
        """A chain is stored from its first block on: say where those are that were staged before."""
        save.told = True
        keys = save.live.keys(choice, save.next_block, self._size)
        found = self._staging.books.lookup(keys)
        self._news.took(choice.handle, 0, keys[: len(found)], found)

    def end(self, choice: Choice) -> None:
        """vLLM is through with the choice; its slot is still the choice's."""
        save = self._saves.pop(choice, None)
        if save is not None:
            self._publish(choice, save, self._staging.board.num_tokens(save.slot))
            self._staging.retire_blocks(save.blocks, [save.slot])

    def holders(self) -> list[list[int]]:
        return [save.blocks for save in self._saves.values()]
