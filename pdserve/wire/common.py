"""Values that several services share."""

from __future__ import annotations

from operator import attrgetter

from pdserve.errors import InvalidRequest, PdserveError, from_fields
from pdserve.types import Grammar, GrammarKind, ModelInfo, ParallelRank, Role, SamplingParams
from pdserve.v1 import common_pb2 as pb

_ROLES = {Role.PREFILL: pb.ROLE_PREFILL, Role.DECODE: pb.ROLE_DECODE}
_ROLES_BACK = {number: role for role, number in _ROLES.items()}
_DEFAULTS = SamplingParams()
_SCALARS = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "max_tokens",
    "min_tokens",
    "ignore_eos",
    "logprobs",
)
_scalars = attrgetter(*_SCALARS)
_SCALAR_DEFAULTS = _scalars(_DEFAULTS)
assert set(_SCALARS) | {"logit_bias", "stop", "stop_token_ids", "grammar"} == set(SamplingParams.__struct_fields__)


def encode_role(role: Role) -> pb.Role.ValueType:
    return _ROLES[role]


def decode_role(number: int) -> Role:
    if number not in _ROLES_BACK:
        raise InvalidRequest(f"unknown role {number}", param="role")
    return _ROLES_BACK[pb.Role.ValueType(number)]


def encode_params(params: SamplingParams, message: pb.SamplingParams | None = None) -> pb.SamplingParams:
    """Into `message`, or a new one. Only what differs from the defaults is written."""
    message = pb.SamplingParams() if message is None else message
    message.SetInParent()
    for name, value, default in zip(_SCALARS, _scalars(params), _SCALAR_DEFAULTS, strict=True):
        if value != default:
            setattr(message, name, value)
    for token_id, bias in params.logit_bias:
        message.logit_bias[token_id] = bias
    if params.stop:
        message.stop.extend(params.stop)
    if params.stop_token_ids:
        message.stop_token_ids.extend(params.stop_token_ids)
    if params.grammar is not None:
        message.grammar.kind = pb.Grammar.Kind.ValueType(params.grammar.kind)
        message.grammar.source = params.grammar.source
    return message


def decode_params(message: pb.SamplingParams) -> SamplingParams:
    """Raises `InvalidRequest` naming the field."""
    given = {name: getattr(message, name) for name in _SCALARS if message.HasField(name)}  # type: ignore[arg-type]
    grammar = None
    if message.HasField("grammar"):
        grammar = _decode_grammar(message.grammar)
    return SamplingParams(
        **given,
        logit_bias=tuple(sorted(message.logit_bias.items())),
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        grammar=grammar,
    )


def _decode_grammar(message: pb.Grammar) -> Grammar:
    try:
        kind = GrammarKind(message.kind)
    except ValueError as error:
        raise InvalidRequest(f"unknown grammar kind {message.kind}", param="grammar") from error
    return Grammar(kind, message.source)


def encode_model(model: ModelInfo) -> pb.ModelInfo:
    return pb.ModelInfo(
        name=model.name,
        revision=model.revision,
        tokenizer_id=model.tokenizer_id,
        max_model_len=model.max_model_len,
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
    )


def decode_model(message: pb.ModelInfo) -> ModelInfo:
    return ModelInfo(
        name=message.name,
        revision=message.revision,
        tokenizer_id=message.tokenizer_id,
        max_model_len=message.max_model_len,
        vocab_size=message.vocab_size,
        eos_token_ids=tuple(message.eos_token_ids),
    )


def encode_rank(rank: ParallelRank) -> pb.ParallelRank:
    return pb.ParallelRank(
        tp_rank=rank.tp_rank,
        tp_size=rank.tp_size,
        pp_rank=rank.pp_rank,
        pp_size=rank.pp_size,
        dp_rank=rank.dp_rank,
        kv_group=rank.kv_group,
    )


def decode_rank(message: pb.ParallelRank) -> ParallelRank:
    return ParallelRank(
        tp_rank=message.tp_rank,
        tp_size=message.tp_size or 1,
        pp_rank=message.pp_rank,
        pp_size=message.pp_size or 1,
        dp_rank=message.dp_rank,
        kv_group=message.kv_group,
    )


def encode_error(error: PdserveError) -> pb.ErrorDetail:
    return pb.ErrorDetail(fields=error.to_fields())


def decode_error(message: pb.ErrorDetail) -> PdserveError:
    return from_fields(dict(message.fields))
