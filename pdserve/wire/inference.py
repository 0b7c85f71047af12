"""What clients call by gRPC: `pdserve.v1.InferenceService`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pdserve.errors import InvalidRequest
from pdserve.types import FinishReason, ModelInfo, SamplingParams
from pdserve.v1 import inference_service_pb2 as pb
from pdserve.v1.common_pb2 import FinishReason as PbFinishReason
from pdserve.wire import Method
from pdserve.wire.columns import pack_u32, unpack_u32
from pdserve.wire.common import decode_model, decode_params, encode_model, encode_params


@dataclass(frozen=True, slots=True)
class GenerateCall:
    """Exactly one of `prompt`, `messages` ((role, content) pairs) and `prompt_token_ids` is given."""

    model: str
    params: SamplingParams = field(default_factory=SamplingParams)
    request_id: str = ""
    """Made by the server when empty."""
    prompt: str | None = None
    messages: tuple[tuple[str, str], ...] | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    deterministic: bool = False
    cache_salt: str = ""
    priority: int = 0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """`top`: the most likely tokens in falling order, as asked for."""

    token_id: int
    token: str
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """New output of one choice; `finish` with its last."""

    index: int
    text: str
    token_ids: Sequence[int]
    finish: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenUsage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class GenerateChunk:
    """`usage` comes with the last one."""

    request_id: str
    choices: tuple[ChoiceDelta, ...]
    usage: TokenUsage | None = None


@dataclass(frozen=True, slots=True)
class ListModelsCall:
    pass


@dataclass(frozen=True, slots=True)
class ModelList:
    models: tuple[ModelInfo, ...]


def encode_generate_call(call: GenerateCall) -> bytes:
    message = pb.GenerateRequest(
        request_id=call.request_id,
        model=call.model,
        params=encode_params(call.params),
        deterministic=call.deterministic,
        cache_salt=call.cache_salt,
        priority=call.priority,
    )
    if call.prompt is not None:
        message.prompt = call.prompt
    elif call.messages is not None:
        message.chat.SetInParent()
        for role, content in call.messages:
            message.chat.messages.add(role=role, content=content)
    elif call.prompt_token_ids is not None:
        message.prompt_token_ids.token_ids = pack_u32(call.prompt_token_ids)
    return message.SerializeToString()


def decode_generate_call(data: bytes) -> GenerateCall:
    """Raises `InvalidRequest` naming the field."""
    message = pb.GenerateRequest.FromString(data)
    given = message.WhichOneof("input")
    if given is None:
        raise InvalidRequest("one of prompt, chat and prompt_token_ids must be given", param="prompt")
    return GenerateCall(
        model=message.model,
        params=decode_params(message.params),
        request_id=message.request_id,
        prompt=message.prompt if given == "prompt" else None,
        messages=tuple((each.role, each.content) for each in message.chat.messages) if given == "chat" else None,
        prompt_token_ids=_token_ids(message.prompt_token_ids.token_ids) if given == "prompt_token_ids" else None,
        deterministic=message.deterministic,
        cache_salt=message.cache_salt,
        priority=message.priority,
    )


def _token_ids(data: bytes) -> tuple[int, ...]:
    if len(data) % 4:
        raise InvalidRequest("token_ids must be u32 little-endian: 4 bytes a token", param="prompt_token_ids")
    return tuple(unpack_u32(data))


def encode_generate_chunk(chunk: GenerateChunk) -> bytes:
    message = pb.GenerateResponse(request_id=chunk.request_id, choices=[_encode_delta(each) for each in chunk.choices])
    if chunk.usage is not None:
        message.usage.prompt_tokens = chunk.usage.prompt_tokens
        message.usage.completion_tokens = chunk.usage.completion_tokens
        message.usage.cached_tokens = chunk.usage.cached_tokens
    return message.SerializeToString()


def _encode_delta(delta: ChoiceDelta) -> pb.ChoiceDelta:
    return pb.ChoiceDelta(
        index=delta.index,
        text=delta.text,
        token_ids=delta.token_ids,
        finish_reason=PbFinishReason.ValueType(int(delta.finish) if delta.finish is not None else 0),
        logprobs=[_encode_logprob(each) for each in delta.logprobs],
    )


def _encode_logprob(entry: TokenLogprob) -> pb.TokenLogprob:
    return pb.TokenLogprob(
        token_id=entry.token_id,
        token=entry.token,
        logprob=entry.logprob,
        top=[_encode_logprob(each) for each in entry.top],
    )


def decode_generate_chunk(data: bytes) -> GenerateChunk:
    message = pb.GenerateResponse.FromString(data)
    usage = None
    if message.HasField("usage"):
        found = message.usage
        usage = TokenUsage(found.prompt_tokens, found.completion_tokens, found.cached_tokens)
    return GenerateChunk(message.request_id, tuple(_decode_delta(each) for each in message.choices), usage)


def _decode_delta(message: pb.ChoiceDelta) -> ChoiceDelta:
    return ChoiceDelta(
        index=message.index,
        text=message.text,
        token_ids=tuple(message.token_ids),
        finish=FinishReason(message.finish_reason) if message.finish_reason else None,
        logprobs=tuple(_decode_logprob(each) for each in message.logprobs),
    )


def _decode_logprob(message: pb.TokenLogprob) -> TokenLogprob:
    top = tuple(_decode_logprob(each) for each in message.top)
    return TokenLogprob(message.token_id, message.token, message.logprob, top)


def encode_model_list(models: ModelList) -> bytes:
    return pb.ListModelsResponse(models=[encode_model(model) for model in models.models]).SerializeToString()


def decode_model_list(data: bytes) -> ModelList:
    return ModelList(tuple(decode_model(model) for model in pb.ListModelsResponse.FromString(data).models))


def _decode_list_models(data: bytes) -> ListModelsCall:
    pb.ListModelsRequest.FromString(data)
    return ListModelsCall()


_SERVICE = "/" + pb.DESCRIPTOR.services_by_name["InferenceService"].full_name

GENERATE: Method[GenerateCall, GenerateChunk] = Method(
    _SERVICE + "/Generate",
    False,
    True,
    encode_generate_call,
    decode_generate_call,
    encode_generate_chunk,
    decode_generate_chunk,
)
LIST_MODELS: Method[ListModelsCall, ModelList] = Method(
    _SERVICE + "/ListModels",
    False,
    False,
    lambda call: pb.ListModelsRequest().SerializeToString(),
    _decode_list_models,
    encode_model_list,
    decode_model_list,
)
