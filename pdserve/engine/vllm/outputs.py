"""vLLM's outputs as ours: deltas without the forced tokens, logprobs, and what an end means.

vLLM ends a prefill because it was asked for one token only; whether that token ends the choice is decided here, by
the same rules as in the other engines.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from pdserve import ends
from pdserve.engine.vllm.board import Ending
from pdserve.engine.vllm.requests import Choice, Live
from pdserve.errors import DigestMismatch, EngineFailed, PdserveError, StaleBlock
from pdserve.types import EngineLoad, Finish, FinishReason, Logprobs, ModelInfo, Phase, StepOutput

if TYPE_CHECKING:
    from pdserve.engine.vllm.driver import VllmDriver


def end_of(live: Live, outputs: Sequence[int], model: ModelInfo) -> tuple[FinishReason, int | None] | None:
    """Whether the last of all outputs ended a choice: (reason, the stop token if one did)."""
    if not outputs:
        return None
    num_tokens = len(live.request.prompt_token_ids) + len(outputs)
    return ends.end_of(live.request.params, model, outputs[-1], len(outputs), num_tokens)


def _length_end(live: Live, num_outputs: int, model: ModelInfo) -> bool:
    num_tokens = len(live.request.prompt_token_ids) + num_outputs
    return num_outputs == live.request.params.max_tokens or num_tokens >= model.max_model_len


def read_tokens(live: Live, choice: Choice, completion: Any, output: StepOutput) -> None:
    """Add the tokens of one of vLLM's deltas, but for those that were forced: the client has them."""
    for position, token_id in enumerate(completion.token_ids):
        if choice.num_seen >= len(choice.forced):
            index = live.num_folded + choice.num_seen
            output.add(choice.handle, index, token_id)
            choice.outputs.append(token_id)
            if completion.logprobs:
                output.logprobs.append(_logprobs(live, choice, index, token_id, completion.logprobs[position]))
        choice.num_seen += 1


def _logprobs(live: Live, choice: Choice, index: int, token_id: int, found: dict[int, Any]) -> Logprobs:
    """`found` has the sampled token and the most likely ones, each with its rank."""
    own, most = found[token_id], live.request.params.logprobs or 0
    top = sorted((entry.rank, token, entry.logprob) for token, entry in found.items() if entry.rank <= most)[:most]
    return Logprobs(
        handle=choice.handle,
        index=index,
        logprob=own.logprob,
        rank=own.rank,
        top_ids=tuple(token for _, token, _ in top),
        top_logprobs=tuple(logprob for _, _, logprob in top),
    )


def finish_of(live: Live, choice: Choice, completion: Any, model: ModelInfo, ending: Ending) -> Finish | None:
    """What to tell of a choice that vLLM ended; None when only its prefill ended. `ending` is its transfer's."""
    num_outputs = live.num_folded + choice.num_seen
    reason: FinishReason | None = None
    stop_token_id: int | None = None
    if completion.finish_reason in ("stop", "repetition"):
        reason = FinishReason.STOP
        stop_token_id = completion.token_ids[-1] if completion.finish_reason == "stop" else None
    elif completion.finish_reason == "length":
        ended = _length_end(live, num_outputs, model)
        reason = FinishReason.LENGTH if ended or live.phase is not Phase.PREFILL else None
    else:
        return failed(choice, num_outputs, _load_error(ending))
    return None if reason is None else Finish(choice.handle, reason, num_outputs, stop_token_id)


def failed(choice: Choice, num_outputs: int, error: PdserveError) -> Finish:
    return Finish(choice.handle, FinishReason.ERROR, num_outputs, error=error)


def _load_error(ending: Ending) -> PdserveError:
    if ending is Ending.STALE:
        return StaleBlock("a staging block was reused before vLLM had loaded it")
    if ending is Ending.CORRUPT:
        return DigestMismatch("a staging block is not what was imported; vLLM did not load it")
    return EngineFailed("vLLM ended the request with an internal error")


def engine_load(driver: VllmDriver, live: Collection[Live], block_tokens: int, num_waiting: int) -> EngineLoad:
    """How busy vLLM is, and what waits before it; free blocks are counted in ours."""
    stats, cache = driver.stats, driver.config.cache_config
    total = (cache.num_gpu_blocks or 0) * cache.block_size // block_tokens
    prompts = (one for one in live if one.phase is not Phase.DECODE and not one.prompt_told)
    return EngineLoad(
        num_running=stats.num_running,
        num_waiting=stats.num_waiting + num_waiting,
        num_free_blocks=int(total * (1 - stats.kv_usage)),
        num_total_blocks=total,
        num_exported_blocks=sum(len(blocks) for one in live for blocks in one.chunks.values()),
        num_prefill_tokens_waiting=sum(one.num_context_tokens - one.num_exported for one in prompts),
        num_preemptions=stats.num_preemptions,
        prefix_cache_queries=stats.prefix_queries,
        prefix_cache_hits=stats.prefix_hits,
    )
