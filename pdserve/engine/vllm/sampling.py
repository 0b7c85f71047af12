"""Our sampling parameters as vLLM's.

Names and meaning are the same (ours are vLLM's); what differs is what the hand-over needs: every choice is a vLLM
request of its own with a seed derived from the request's, and the outputs it starts with are forced.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm import SamplingParams as VllmParams
from vllm.exceptions import VLLMClientError
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.v1.structured_output.backend_xgrammar import validate_xgrammar_grammar

from pdserve.engine.vllm.forced import FORCED_KEY
from pdserve.errors import InvalidRequest
from pdserve.types import MAX_SEED, Grammar, GrammarKind, Request


def choice_params(
    request: Request, choice: int, max_tokens: int, forced: Sequence[int], transfer: dict[str, Any] | None
) -> VllmParams:
    """Parameters of one choice. `max_tokens` counts forced outputs; a prefill asks for one more than those.

    The seed of choice c is seed + c (vLLM's own rule for n > 1), so prefill and decode agree without a message.
    """
    params = request.params
    extra: dict[str, Any] = {}
    if forced:
        extra[FORCED_KEY] = list(forced)
    if transfer:
        extra["kv_transfer_params"] = transfer
    return VllmParams(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        logit_bias=dict(params.logit_bias) or None,
        seed=None if params.seed is None else (params.seed + choice) % (MAX_SEED + 1),
        stop_token_ids=list(params.stop_token_ids),
        ignore_eos=params.ignore_eos,
        max_tokens=max_tokens,
        min_tokens=min(params.min_tokens, max_tokens),
        logprobs=params.logprobs,
        structured_outputs=None if params.grammar is None else _structured(params.grammar),
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args=extra or None,
    )


def check_grammar(grammar: Grammar) -> None:
    """Raises `InvalidRequest` when xgrammar cannot compile it: better now than inside vLLM, where it would come back
    as an error of the engine."""
    try:
        validate_xgrammar_grammar(VllmParams(structured_outputs=_structured(grammar)))
    except (VLLMClientError, ValueError) as error:
        raise InvalidRequest(f"the grammar does not compile: {error}", param="response_format") from error


def _structured(grammar: Grammar) -> StructuredOutputsParams:
    if grammar.kind is GrammarKind.JSON_SCHEMA:
        return StructuredOutputsParams(json=grammar.source)
    if grammar.kind is GrammarKind.REGEX:
        return StructuredOutputsParams(regex=grammar.source)
    return StructuredOutputsParams(json_object=True)
