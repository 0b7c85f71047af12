"""When a choice has ended: one rule for the engines, which end it, and for the router, which must know when a worker is
lost between the last token and the word that it was the last."""

from __future__ import annotations

from pdserve.types import FinishReason, ModelInfo, SamplingParams


def end_of(
    params: SamplingParams, model: ModelInfo, last_token: int, num_outputs: int, num_tokens: int
) -> tuple[FinishReason, int | None] | None:
    """Whether `last_token`, output number `num_outputs` and token number `num_tokens`, ends a choice: (reason, the
    stop token if it is one). vLLM's order: EOS and stop tokens, unless below `min_tokens`; then the lengths."""
    if num_outputs >= params.min_tokens and (
        (last_token in model.eos_token_ids and not params.ignore_eos) or last_token in params.stop_token_ids
    ):
        return FinishReason.STOP, last_token
    if num_tokens >= model.max_model_len or (params.max_tokens is not None and num_outputs >= params.max_tokens):
        return FinishReason.LENGTH, None
    return None
