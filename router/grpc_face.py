"""The gRPC face: `pdserve.v1.InferenceService`. Errors leave as status with `ErrorInfo` (see `pdserve.rpc`)."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import Any

from pdserve.rpc import RpcServer
from pdserve.types import Logprobs
from pdserve.wire.inference import (
    GENERATE,
    LIST_MODELS,
    ChoiceDelta,
    GenerateCall,
    GenerateChunk,
    ListModelsCall,
    ModelList,
    TokenLogprob,
    TokenUsage,
)
from router.base import ChatMessage, Core, Incoming, prepared
from router.grpc_sink import Batch, BatchSink, Delta


def remaining_ms(context: Any) -> int:
    """The client's own deadline; 0 when it set none."""
    remaining = context.time_remaining()
    return 0 if remaining is None else max(1, int(1000 * remaining))


def traceparent(context: Any) -> str:
    """The W3C trace context that the client sent as metadata; empty: none."""
    return next((value for key, value in context.invocation_metadata() or () if key == "traceparent"), "")


class InferenceFace:
    """Translates between the wire and the core; one batch a message."""

    def __init__(self, core: Core, max_unsent_bytes: int) -> None:
        self._core = core
        self._max_unsent_bytes = max_unsent_bytes

    def add_to(self, server: RpcServer) -> None:
        server.add(GENERATE, self.generate)
        server.add(LIST_MODELS, self.list_models)

    async def list_models(self, call: ListModelsCall) -> ModelList:
        return ModelList(tuple(self._core.models()))

    async def generate(self, call: GenerateCall, context: Any) -> AsyncIterator[GenerateChunk]:
        """While the client doesn't read, the transport holds the handler up and output gathers in the sink."""
        incoming = await prepared(self._core, _incoming(call, remaining_ms(context), traceparent(context)))
        sink = BatchSink(self._max_unsent_bytes)
        handle = sink.handle = self._core.submit(incoming, sink)
        context.add_done_callback(lambda _: handle.cancel())
        while (batch := await sink.next()) is not None:
            yield self._chunk(handle.request_id, call.model, batch)

    def _chunk(self, request_id: str, model: str, batch: Batch) -> GenerateChunk:
        usage = batch.usage
        return GenerateChunk(
            request_id,
            tuple(self._choice(model, delta) for delta in batch.deltas.values()),
            TokenUsage(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) if usage else None,
        )

    def _choice(self, model: str, delta: Delta) -> ChoiceDelta:
        logprobs = tuple(self._logprob(model, token_id, entry) for token_id, entry in delta.logprobs)
        return ChoiceDelta(delta.index, delta.text, delta.token_ids, delta.finish, logprobs)

    def _logprob(self, model: str, token_id: int, entry: Logprobs) -> TokenLogprob:
        top = zip(entry.top_ids, entry.top_logprobs, strict=True)
        alternatives = tuple(TokenLogprob(each, self._text(model, each), logprob) for each, logprob in top)
        return TokenLogprob(token_id, self._text(model, token_id), entry.logprob, alternatives)

    def _text(self, model: str, token_id: int) -> str:
        return self._core.token_text(model, token_id)[0]


def _incoming(call: GenerateCall, timeout_ms: int, trace: str) -> Incoming:
    messages = None
    if call.messages is not None:
        messages = tuple(ChatMessage(role, content) for role, content in call.messages)
    return Incoming(
        request_id=call.request_id or f"grpc-{uuid.uuid4().hex}",
        model=call.model,
        params=call.params,
        text=call.prompt,
        messages=messages,
        token_ids=call.prompt_token_ids,
        deterministic=call.deterministic,
        cache_salt=call.cache_salt,
        priority=call.priority,
        timeout_ms=timeout_ms,
        traceparent=trace,
    )
