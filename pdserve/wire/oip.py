"""Open Inference Protocol v2 (package `inference`): tensors and parameters to plain values and back.

The protocol knows typed tensors only; the platform serves text, so BYTES and BOOL are read and written, in either of
the protocol's two forms (`contents`, or `raw_input_contents` for all inputs of a request).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from pdserve.errors import InvalidRequest, NotSupported
from pdserve.oip import open_inference_pb2 as pb
from pdserve.wire import Method

Parameter = bool | int | float | str
Element = bytes | bool

_LENGTH_BYTES = 4
"""Raw BYTES elements are each preceded by their length, u32 little-endian."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """`datatype` is "BYTES" (values are bytes) or "BOOL"."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: tuple[Element, ...]


@dataclass(frozen=True, slots=True)
class InferCall:
    model_name: str
    inputs: tuple[Tensor, ...]
    model_version: str = ""
    id: str = ""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class InferAnswer:
    model_name: str
    outputs: tuple[Tensor, ...]
    model_version: str = ""
    id: str = ""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StreamAnswer:
    """One of a run of answers. With an error `answer` still says by id which request failed."""

    answer: InferAnswer | None
    error_message: str = ""


@dataclass(frozen=True, slots=True)
class UnreadableCall:
    """A request of a stream that could not be read: the stream goes on, this one is answered with `error`."""

    id: str
    error: InvalidRequest | NotSupported


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A model's input or output; -1 in a shape: any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModelCall:
    name: str
    version: str = ""


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True)
class ServerCall:
    pass


@dataclass(frozen=True, slots=True)
class ServerMetadata:
    name: str
    version: str
    extensions: tuple[str, ...] = ()


# ---- tensors ----


def _tensor(message: pb.ModelInferRequest.InferInputTensor, raw: bytes | None) -> Tensor:
    """Raises `NotSupported` for other datatypes, `InvalidRequest` when contents and shape differ."""
    contents = message.contents
    values: tuple[Element, ...]
    if message.datatype == "BYTES":
        values = _raw_bytes(message.name, raw) if raw is not None else tuple(contents.bytes_contents)
    elif message.datatype == "BOOL":
        values = tuple(byte != 0 for byte in raw) if raw is not None else tuple(contents.bool_contents)
    else:
        raise NotSupported(
            f"input {message.name!r} has datatype {message.datatype!r}; BYTES and BOOL are served", param=message.name
        )
    shape = tuple(message.shape)
    if any(size < 0 for size in shape) or math.prod(shape) != len(values):
        raise InvalidRequest(
            f"input {message.name!r} has shape {list(shape)} but {len(values)} elements", param=message.name
        )
    return Tensor(message.name, message.datatype, shape, values)


def _raw_bytes(name: str, raw: bytes) -> tuple[bytes, ...]:
    values = []
    position = 0
    while position < len(raw):
        start = position + _LENGTH_BYTES
        end = start + int.from_bytes(raw[position:start], "little")
        if start > len(raw) or end > len(raw):
            raise InvalidRequest(f"raw contents of input {name!r} end within an element", param=name)
        values.append(raw[start:end])
        position = end
    return tuple(values)


def _fill_tensor(message: pb.ModelInferResponse.InferOutputTensor, tensor: Tensor) -> None:
    message.name = tensor.name
    message.datatype = tensor.datatype
    message.shape.extend(tensor.shape)
    for value in tensor.values:
        if isinstance(value, bytes):
            message.contents.bytes_contents.append(value)
        else:
            message.contents.bool_contents.append(value)


def _parameters(message: Mapping[str, pb.InferParameter]) -> dict[str, Parameter]:
    found: dict[str, Parameter] = {}
    for name, parameter in message.items():
        kind = parameter.WhichOneof("parameter_choice")
        if kind is None:
            raise InvalidRequest(f"parameter {name!r} has no value", param=name)
        found[name] = getattr(parameter, kind)
    return found


def _fill_parameters(message: Mapping[str, pb.InferParameter], parameters: Mapping[str, Parameter]) -> None:
    for name, value in parameters.items():
        if isinstance(value, bool):
            message[name].bool_param = value
        elif isinstance(value, int):
            message[name].int64_param = value
        elif isinstance(value, float):
            message[name].double_param = value
        else:
            message[name].string_param = value


# ---- calls and answers ----


def _infer_call(message: pb.ModelInferRequest) -> InferCall:
    raws: list[bytes | None] = list(message.raw_input_contents)
    if raws and len(raws) != len(message.inputs):
        raise InvalidRequest(
            f"raw_input_contents has {len(raws)} entries for {len(message.inputs)} inputs", param="raw_input_contents"
        )
    pairs = zip(message.inputs, raws or [None] * len(message.inputs), strict=True)
    return InferCall(
        model_name=message.model_name,
        inputs=tuple(_tensor(each, raw) for each, raw in pairs),
        model_version=message.model_version,
        id=message.id,
        parameters=_parameters(message.parameters),
    )


def decode_infer_call(data: bytes) -> InferCall:
    """Raises `InvalidRequest` or `NotSupported` naming the input or parameter."""
    return _infer_call(pb.ModelInferRequest.FromString(data))


def decode_stream_call(data: bytes) -> InferCall | UnreadableCall:
    message = pb.ModelInferRequest.FromString(data)
    try:
        return _infer_call(message)
    except (InvalidRequest, NotSupported) as error:
        return UnreadableCall(message.id, error)


def encode_infer_call(call: InferCall | UnreadableCall) -> bytes:
    if isinstance(call, UnreadableCall):
        raise ValueError("an unreadable call cannot be sent")
    message = pb.ModelInferRequest(model_name=call.model_name, model_version=call.model_version, id=call.id)
    for tensor in call.inputs:
        added = message.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        for value in tensor.values:
            if isinstance(value, bytes):
                added.contents.bytes_contents.append(value)
            else:
                added.contents.bool_contents.append(value)
    _fill_parameters(message.parameters, call.parameters)
    return message.SerializeToString()


def _infer_message(answer: InferAnswer) -> pb.ModelInferResponse:
    message = pb.ModelInferResponse(model_name=answer.model_name, model_version=answer.model_version, id=answer.id)
    for tensor in answer.outputs:
        _fill_tensor(message.outputs.add(), tensor)
    _fill_parameters(message.parameters, answer.parameters)
    return message


def _infer_answer(message: pb.ModelInferResponse) -> InferAnswer:
    outputs = []
    for output in message.outputs:
        contents = output.contents
        values: tuple[Element, ...] = tuple(contents.bytes_contents) or tuple(contents.bool_contents)
        outputs.append(Tensor(output.name, output.datatype, tuple(output.shape), values))
    return InferAnswer(
        message.model_name, tuple(outputs), message.model_version, message.id, _parameters(message.parameters)
    )


def encode_infer_answer(answer: InferAnswer) -> bytes:
    return _infer_message(answer).SerializeToString()


def decode_infer_answer(data: bytes) -> InferAnswer:
    return _infer_answer(pb.ModelInferResponse.FromString(data))


def encode_stream_answer(answer: StreamAnswer) -> bytes:
    message = pb.ModelStreamInferResponse(error_message=answer.error_message)
    if answer.answer is not None:
        message.infer_response.CopyFrom(_infer_message(answer.answer))
    return message.SerializeToString()


def decode_stream_answer(data: bytes) -> StreamAnswer:
    message = pb.ModelStreamInferResponse.FromString(data)
    answer = _infer_answer(message.infer_response) if message.HasField("infer_response") else None
    return StreamAnswer(answer, message.error_message)


# ---- the server and its models ----


def _encode_server_metadata(found: ServerMetadata) -> bytes:
    return pb.ServerMetadataResponse(
        name=found.name, version=found.version, extensions=found.extensions
    ).SerializeToString()


def _decode_server_metadata(data: bytes) -> ServerMetadata:
    message = pb.ServerMetadataResponse.FromString(data)
    return ServerMetadata(message.name, message.version, tuple(message.extensions))


def _encode_model_metadata(found: ModelMetadata) -> bytes:
    tensor = pb.ModelMetadataResponse.TensorMetadata
    return pb.ModelMetadataResponse(
        name=found.name,
        versions=found.versions,
        platform=found.platform,
        inputs=[tensor(name=each.name, datatype=each.datatype, shape=each.shape) for each in found.inputs],
        outputs=[tensor(name=each.name, datatype=each.datatype, shape=each.shape) for each in found.outputs],
    ).SerializeToString()


def _decode_model_metadata(data: bytes) -> ModelMetadata:
    message = pb.ModelMetadataResponse.FromString(data)
    inputs = tuple(TensorSpec(each.name, each.datatype, tuple(each.shape)) for each in message.inputs)
    outputs = tuple(TensorSpec(each.name, each.datatype, tuple(each.shape)) for each in message.outputs)
    return ModelMetadata(message.name, tuple(message.versions), message.platform, inputs, outputs)


def _model_call(message: pb.ModelReadyRequest | pb.ModelMetadataRequest) -> ModelCall:
    return ModelCall(message.name, message.version)


_SERVICE = "/" + pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name

SERVER_LIVE: Method[ServerCall, bool] = Method(
    _SERVICE + "/ServerLive",
    False,
    False,
    lambda call: b"",
    lambda data: ServerCall(),
    lambda live: pb.ServerLiveResponse(live=live).SerializeToString(),
    lambda data: pb.ServerLiveResponse.FromString(data).live,
)
SERVER_READY: Method[ServerCall, bool] = Method(
    _SERVICE + "/ServerReady",
    False,
    False,
    lambda call: b"",
    lambda data: ServerCall(),
    lambda ready: pb.ServerReadyResponse(ready=ready).SerializeToString(),
    lambda data: pb.ServerReadyResponse.FromString(data).ready,
)
MODEL_READY: Method[ModelCall, bool] = Method(
    _SERVICE + "/ModelReady",
    False,
    False,
    lambda call: pb.ModelReadyRequest(name=call.name, version=call.version).SerializeToString(),
    lambda data: _model_call(pb.ModelReadyRequest.FromString(data)),
    lambda ready: pb.ModelReadyResponse(ready=ready).SerializeToString(),
    lambda data: pb.ModelReadyResponse.FromString(data).ready,
)
SERVER_METADATA: Method[ServerCall, ServerMetadata] = Method(
    _SERVICE + "/ServerMetadata",
    False,
    False,
    lambda call: b"",
    lambda data: ServerCall(),
    _encode_server_metadata,
    _decode_server_metadata,
)
MODEL_METADATA: Method[ModelCall, ModelMetadata] = Method(
    _SERVICE + "/ModelMetadata",
    False,
    False,
    lambda call: pb.ModelMetadataRequest(name=call.name, version=call.version).SerializeToString(),
    lambda data: _model_call(pb.ModelMetadataRequest.FromString(data)),
    _encode_model_metadata,
    _decode_model_metadata,
)
MODEL_INFER: Method[InferCall, InferAnswer] = Method(
    _SERVICE + "/ModelInfer",
    False,
    False,
    encode_infer_call,
    decode_infer_call,
    encode_infer_answer,
    decode_infer_answer,
)
MODEL_STREAM_INFER: Method[InferCall | UnreadableCall, StreamAnswer] = Method(
    _SERVICE + "/ModelStreamInfer",
    True,
    True,
    encode_infer_call,
    decode_stream_call,
    encode_stream_answer,
    decode_stream_answer,
)
