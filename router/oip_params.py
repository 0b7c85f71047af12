"""Open Inference Protocol requests as ours: which tensors and parameters mean what.

Inputs as Triton's vLLM backend and NVIDIA Dynamo name them: `text_input` (or `prompt`), `streaming` (or `stream`),
`sampling_parameters` (a JSON object). Sampling parameters may also be request parameters, under vLLM's names.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pdserve.errors import InvalidRequest
from pdserve.types import Grammar, GrammarKind, SamplingParams
from pdserve.wire.oip import InferCall, Tensor
from router.base import Incoming

PROMPT_INPUTS = ("text_input", "prompt")
STREAM_INPUTS = ("streaming", "stream")
SAMPLING_INPUT = "sampling_parameters"
_IGNORED = frozenset({"triton_enable_empty_final_response", "triton_request_id", "binary_data_output"})
"""Transport matters of Triton clients, without a meaning here."""
_MAX_INT = 2**63 - 1


@dataclass(frozen=True, slots=True)
class InferRequest:
    incoming: Incoming
    stream: bool


def read_call(call: InferCall, timeout_ms: int) -> InferRequest:
    """Raises `InvalidRequest` naming the input or parameter."""
    tensors = {tensor.name: tensor for tensor in call.inputs}
    known = {*PROMPT_INPUTS, *STREAM_INPUTS, SAMPLING_INPUT}
    unknown = sorted(tensors.keys() - known)
    if unknown:
        raise InvalidRequest(f"unknown input {unknown[0]!r}; known are {', '.join(sorted(known))}", param=unknown[0])
    if len(tensors) < len(call.inputs):
        raise InvalidRequest("an input is given twice", param="inputs")
    given = {**_sampling_input(tensors), **call.parameters}
    fields = {name: given.pop(name) for name in _FIELDS if name in given}
    incoming = Incoming(
        request_id=call.id or f"oip-{uuid.uuid4().hex}",
        model=call.model_name,
        params=read_params(given),
        text=_prompt(tensors),
        timeout_ms=timeout_ms,
        **{name: _FIELDS[name](name, value) for name, value in fields.items()},
    )
    return InferRequest(incoming, _flag(tensors))


def read_params(given: Mapping[str, object]) -> SamplingParams:
    """Sampling parameters by vLLM's names. Raises `InvalidRequest` for an unknown name or a wrong type."""
    read: dict[str, object] = {}
    for name, value in given.items():
        if name in _IGNORED:
            continue
        if name not in _PARAMS:
            raise InvalidRequest(f"unknown parameter {name!r}", param=name)
        target, reader = _PARAMS[name]
        read[target] = reader(name, value)
    return SamplingParams(**read)  # type: ignore[arg-type]


# ---- inputs ----


def _single(tensor: Tensor, datatype: str) -> bytes | bool:
    if tensor.datatype != datatype:
        raise InvalidRequest(f"input {tensor.name!r} must be {datatype}, not {tensor.datatype}", param=tensor.name)
    if len(tensor.values) != 1:
        raise InvalidRequest(
            f"input {tensor.name!r} must have exactly one element; send one request a prompt", param=tensor.name
        )
    return tensor.values[0]


def _text(tensor: Tensor) -> str:
    value = _single(tensor, "BYTES")
    assert isinstance(value, bytes)
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"input {tensor.name!r} is not UTF-8", param=tensor.name) from error


def _prompt(tensors: Mapping[str, Tensor]) -> str:
    found = [tensors[name] for name in PROMPT_INPUTS if name in tensors]
    if len(found) != 1:
        raise InvalidRequest("exactly one of the inputs text_input and prompt must be given", param="text_input")
    return _text(found[0])


def _flag(tensors: Mapping[str, Tensor]) -> bool:
    found = [tensors[name] for name in STREAM_INPUTS if name in tensors]
    return any(bool(_single(tensor, "BOOL")) for tensor in found)


def _sampling_input(tensors: Mapping[str, Tensor]) -> dict[str, object]:
    if SAMPLING_INPUT not in tensors:
        return {}
    try:
        given = json.loads(_text(tensors[SAMPLING_INPUT]))
    except ValueError as error:
        raise InvalidRequest(f"{SAMPLING_INPUT} is not JSON: {error}", param=SAMPLING_INPUT) from error
    if not isinstance(given, dict):
        raise InvalidRequest(f"{SAMPLING_INPUT} must be a JSON object", param=SAMPLING_INPUT)
    return given


# ---- parameters: a reader takes the name and the value, and gives the value in our type ----


def _wrong(name: str, wanted: str) -> InvalidRequest:
    return InvalidRequest(f"{name} must be {wanted}", param=name)


def _int(name: str, value: object) -> int:
    """JSON numbers come as strings from clients whose parameters know no other type."""
    if isinstance(value, str):
        value = _parsed(name, value, "an integer")
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > _MAX_INT:
        raise _wrong(name, "an integer")
    return value


def _float(name: str, value: object) -> float:
    if isinstance(value, str):
        value = _parsed(name, value, "a number")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(name, "a number")
    try:
        return float(value)
    except OverflowError as error:
        raise _wrong(name, "a number that fits a double") from error


def _bool(name: str, value: object) -> bool:
    if isinstance(value, str):
        value = _parsed(name, value.lower(), "true or false")
    if not isinstance(value, bool):
        raise _wrong(name, "true or false")
    return value


def _string(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise _wrong(name, "a string")
    return value


def _parsed(name: str, text: str, wanted: str) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise _wrong(name, wanted) from error


def _strings(name: str, value: object) -> tuple[str, ...]:
    """One string, a list of them, or such a list as JSON text."""
    if isinstance(value, str):
        value = _parsed(name, value, "a list of strings") if value.startswith("[") else [value]
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise _wrong(name, "a string or a list of strings")
    return tuple(value)


def _ints(name: str, value: object) -> tuple[int, ...]:
    if isinstance(value, str):
        value = _parsed(name, value, "a list of integers")
    if not isinstance(value, list):
        raise _wrong(name, "a list of integers")
    return tuple(_int(name, each) for each in value)


def _grammar(kind: GrammarKind) -> Callable[[str, object], Grammar]:
    def read(name: str, value: object) -> Grammar:
        return Grammar(kind, value if isinstance(value, str) else json.dumps(value))

    return read


_Reader = Callable[[str, object], object]
_PARAMS: dict[str, tuple[str, _Reader]] = {
    **{name: (name, _int) for name in ("n", "top_k", "seed", "max_tokens", "min_tokens", "logprobs")},
    **{
        name: (name, _float)
        for name in (
            "temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
        )
    },
    "ignore_eos": ("ignore_eos", _bool),
    "stop": ("stop", _strings),
    "stop_token_ids": ("stop_token_ids", _ints),
    "guided_json": ("grammar", _grammar(GrammarKind.JSON_SCHEMA)),
    "guided_regex": ("grammar", _grammar(GrammarKind.REGEX)),
}  # fmt: skip
_FIELDS: dict[str, Callable[[str, object], Any]] = {
    "priority": _int,
    "deterministic": _bool,
    "cache_salt": _string,
    "skip_special_tokens": _bool,
    "add_special_tokens": _bool,
    "include_stop_str_in_output": _bool,
}
