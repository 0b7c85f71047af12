"""How a request becomes vLLM requests: one a choice, each told what to load from staging and what to save to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pdserve.engine.vllm.news import CacheNews
from pdserve.engine.vllm.requests import PARAMS_KEY, Choice, Live
from pdserve.engine.vllm.saves import Saves
from pdserve.engine.vllm.settings import VllmSettings
from pdserve.engine.vllm.staging import StagingPool
from pdserve.types import ModelInfo, Phase

if TYPE_CHECKING:
    from pdserve.engine.vllm.driver import Job


class Starter:
    """Makes an engine's jobs."""

    def __init__(
        self,
        settings: VllmSettings,
        model: ModelInfo,
        staging: StagingPool,
        news: CacheNews,
        saves: Saves,
        *,
        caching: bool,
    ) -> None:
        self._settings = settings
        self._caching = caching
        self._max_model_len = model.max_model_len
        self._staging = staging
        self._news = news
        self._saves = saves
        self._size = staging.block_tokens
        self._num_jobs = 0

    def job(self, live: Live, choice: Choice) -> Job:
        """One choice's vLLM request; its slots are taken."""
        from pdserve.engine.vllm.driver import Job
        from pdserve.engine.vllm.sampling import choice_params

        request = live.request
        transfers = {PARAMS_KEY: {"load": self._load(live, choice), "save": self._save(live, choice)}}
        room = self._max_model_len - len(live.vllm_prompt)
        most = min(room, (request.params.max_tokens or self._max_model_len) - live.num_folded)
        max_tokens = len(choice.forced) + 1 if live.phase is Phase.PREFILL else most
        self._num_jobs += 1
        return Job(
            request_id=f"{request.request_id}-{choice.number}-{self._num_jobs}",
            prompt=live.vllm_prompt,
            params=choice_params(request, choice.number, max_tokens, choice.forced, transfers),
            cache_salt=request.cache_root.hex(),
            priority=request.priority,
        )

    def _load(self, live: Live, choice: Choice) -> dict[str, Any] | None:
        """What the connector is told to load (`kvstore.vllm_connector.plan.Load`): all that was handed over, or what
        is staged of the prompt."""
        if live.phase is Phase.DECODE:
            assert choice.load_slot is not None, "a DECODE request was given slots with its blocks"
            digests = [live.digests[index] for index in range(len(live.blocks))]
            return self._described(choice.load_slot, 0, live.blocks, live.num_context_tokens, digests)
        if not self._caching:
            return None
        first, blocks = self._staged(live.keys(choice, len(live.vllm_prompt) // self._size, self._size))
        room = self._staging.allocate(0, 1) if blocks else None
        if room is None:
            return None
        choice.load_slot = room[1][0]
        self._staging.retire_blocks(blocks, [choice.load_slot], first)
        num_tokens = (first + len(blocks)) * self._size
        return self._described(choice.load_slot, first, blocks, num_tokens, self._staging.digests(blocks))

    def _staged(self, keys: list[bytes]) -> tuple[int, list[int]]:
        """Where in the chain staged blocks begin, and these, held: from its start, or from where vLLM's own cache
        ends."""
        num_own = self._news.num_own(keys)
        first = num_own if num_own > len(self._staging.books.lookup(keys)) else 0
        return first, self._staging.hold(keys[first:])

    def _described(
        self, slot: int, first_block: int, blocks: list[int], num_tokens: int, digests: list[str]
    ) -> dict[str, Any]:
        return {
            "slot": slot,
            "first_block": first_block,
            "blocks": list(blocks),
            "generations": self._staging.books.generations_of(blocks),
            "num_tokens": num_tokens,
            "digests": digests if self._settings.verify_loads else [],
        }

    def _save(self, live: Live, choice: Choice) -> dict[str, Any] | None:
        """What the connector is told to save: a prompt for export, or for the store's sake what is not staged yet."""
        if live.phase is Phase.PREFILL:
            if choice.save_slot is None:
                return None
            count = live.num_context_tokens
            return {"slot": choice.save_slot, "first_block": 0, "blocks": list(live.blocks), "num_tokens": count}
        if not self._settings.saves or not self._caching:
            return None
        num_tokens = live.num_context_tokens
        first_block = num_tokens // self._size
        if live.phase is Phase.FULL and choice.number == 0:
            first_block = len(self._staging.books.lookup(live.keys(choice, first_block, self._size)))
        return self._saves.begin(live, choice, first_block, num_tokens)
