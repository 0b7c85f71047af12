"""From an OpenAI request body to what the core takes; every fault becomes an error that names its field."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from pdserve.errors import InvalidRequest, NotSupported, RequestError
from pdserve.types import Grammar, GrammarKind, SamplingParams
from router.base import ChatMessage, Incoming
from router.http.json_schema import check_schema
from router.http.schema import (
    REFUSED_CHAT,
    REFUSED_COMPLETION,
    ChatBody,
    CompletionBody,
    GenerationBody,
    Message,
    ResponseFormat,
    StructuredOutputs,
)

Body = TypeVar("Body", ChatBody, CompletionBody)

MAX_REGEX_CHARS = 16 << 10
"""A grammar is compiled by a worker that serves others too."""
MAX_NAME_CHARS = 100
"""How much of an unknown field's name is repeated to the client."""

_FAULT = re.compile(r"^(?P<what>.*?)(?: - at `(?:key in )?\$(?P<path>.*)`)?$", re.DOTALL)
_UNKNOWN = re.compile(r"^Object contains unknown field `(?P<name>.*)`$", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(?P<name>.*)`$")
_SAMPLING = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "min_tokens",
    "ignore_eos",
)
Refused = tuple[tuple[str, tuple[Any, ...], str], ...]
_refused_in_chat = attrgetter(*[name for name, _, _ in REFUSED_CHAT])
_refused_in_completion = attrgetter(*[name for name, _, _ in REFUSED_COMPLETION])
_sampling = attrgetter(*_SAMPLING)
_constraints = attrgetter("response_format", "structured_outputs", "guided_json", "guided_regex")
_NO_CONSTRAINTS = (None,) * 4
_EMPTY_IN_MESSAGES = ("refusal", "annotations", "audio", "tool_calls", "function_call", "tool_call_id")
_empty_in_messages = attrgetter(*_EMPTY_IN_MESSAGES)
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class RequestHead(Struct, frozen=True):
    """What the headers say about a request."""

    request_id: str
    timeout_ms: int = 0
    traceparent: str = ""
    session: str = ""


class Call(Struct, frozen=True):
    """One HTTP request: a request to the core for each prompt, and how the answer is to look."""

    request_id: str
    prompts: tuple[Incoming, ...]
    stream: bool
    include_usage: bool
    return_token_ids: bool

    @property
    def model(self) -> str:
        return self.prompts[0].model

    @property
    def params(self) -> SamplingParams:
        return self.prompts[0].params


def parse_chat(raw: bytes, head: RequestHead) -> Call:
    """The body of /v1/chat/completions. Raises `InvalidRequest` and `NotSupported`, naming the field."""
    body = _decode(raw, ChatBody)
    _refuse(body, REFUSED_CHAT, _refused_in_chat)
    messages = tuple(_message(m, f"messages[{i}]") for i, m in enumerate(body.messages))
    if not messages:
        raise InvalidRequest("messages must not be empty", param="messages")
    params = _params(body, _chat_logprobs(body), _chat_max_tokens(body))
    request_id = body.request_id or head.request_id
    return _call(body, request_id, (_incoming(body, head, request_id, params, messages=messages),))


def parse_completion(raw: bytes, head: RequestHead, max_prompts: int) -> Call:
    """The body of /v1/completions. Raises `InvalidRequest` and `NotSupported`, naming the field."""
    body = _decode(raw, CompletionBody)
    _refuse(body, REFUSED_COMPLETION, _refused_in_completion)
    prompts = list(_prompts(body.prompt))
    if len(prompts) > max_prompts:
        raise InvalidRequest(f"prompt must hold at most {max_prompts} prompts", param="prompt")
    params = _params(body, body.logprobs, body.max_tokens)
    _check_best_of(body.best_of, params.n)
    request_id = body.request_id or head.request_id
    ids = [request_id] if len(prompts) == 1 else [f"{request_id}-{i}" for i in range(len(prompts))]
    special = body.add_special_tokens is not False
    incomings = tuple(
        _incoming(body, head, ids[i], params, add_special_tokens=special, **prompt) for i, prompt in enumerate(prompts)
    )
    return _call(body, request_id, incomings)


def _call(body: GenerationBody, request_id: str, prompts: tuple[Incoming, ...]) -> Call:
    stream = bool(body.stream)
    if body.stream_options is not None and not stream:
        raise InvalidRequest("stream_options is only allowed when stream is true", param="stream_options")
    include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    return Call(request_id, prompts, stream, include_usage, bool(body.return_token_ids))


def _incoming(
    body: GenerationBody, head: RequestHead, request_id: str, params: SamplingParams, **prompt: Any
) -> Incoming:
    return Incoming(
        request_id=request_id,
        model=body.model,
        params=params,
        skip_special_tokens=body.skip_special_tokens is not False,
        include_stop_str_in_output=bool(body.include_stop_str_in_output),
        deterministic=bool(body.deterministic),
        cache_salt=body.cache_salt or "",
        priority=body.priority or 0,
        timeout_ms=head.timeout_ms,
        traceparent=head.traceparent,
        session=head.session,
        **prompt,
    )


# decoding and its faults


def _decode(raw: bytes, body_type: type[Body]) -> Body:
    try:
        return msgspec.json.decode(raw, type=body_type)
    except msgspec.ValidationError as error:
        raise _field_fault(str(error)) from None
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"The body could not be parsed as JSON: {error}") from None
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The body is not valid UTF-8: {error.reason}") from None
    except RecursionError:
        raise InvalidRequest("The body is nested too deeply") from None


def _field_fault(fault: str) -> InvalidRequest:
    """msgspec tells what is wrong and where in a sentence; the client gets the field by itself."""
    match = _FAULT.match(fault)
    what, path = (match["what"], (match["path"] or "").removeprefix(".")) if match else (fault, "")
    if unknown := _UNKNOWN.match(what):
        name = (f"{path}.{unknown['name']}" if path else unknown["name"])[:MAX_NAME_CHARS]
        return InvalidRequest(f"Unrecognized request argument supplied: {name}", param=name)
    if missing := _MISSING.match(what):
        name = f"{path}.{missing['name']}" if path else missing["name"]
        return InvalidRequest(f"Missing required parameter: '{name}'", param=name)
    param = path.replace("[...]", "") or None
    return InvalidRequest(f"Invalid value for {param or 'the body'}: {what[:1].lower()}{what[1:]}", param=param)


def _refuse(body: GenerationBody, refused: Refused, values: Callable[[Any], tuple[Any, ...]]) -> None:
    """`values` reads the refused fields in one go: nearly always all are null."""
    given = values(body)
    if given.count(None) == len(given):
        return
    for (name, neutral, why), value in zip(refused, given, strict=True):
        if value is not None and value not in neutral:
            raise NotSupported(f"{name} is not supported with this value: {why}", param=name)


# sampling


def _params(body: GenerationBody, logprobs: int | None, max_tokens: int | None) -> SamplingParams:
    given = {name: value for name, value in zip(_SAMPLING, _sampling(body), strict=True) if value is not None}
    try:
        return SamplingParams(
            logit_bias=_logit_bias(body.logit_bias),
            stop=_stop(body.stop),
            stop_token_ids=tuple(body.stop_token_ids or ()),
            max_tokens=max_tokens,
            logprobs=logprobs,
            grammar=_grammar(body),
            **given,
        )
    except InvalidRequest as error:
        raise _as_given(error, body) from None


def _as_given(error: InvalidRequest, body: GenerationBody) -> InvalidRequest:
    """The fault under the name that the client used."""
    if not isinstance(body, ChatBody):
        return error
    if error.param == "max_tokens" and body.max_tokens is None:
        return InvalidRequest(
            error.message.replace("max_tokens", "max_completion_tokens"), param="max_completion_tokens"
        )
    if error.param == "logprobs":
        return InvalidRequest(error.message.replace("logprobs", "top_logprobs"), param="top_logprobs")
    return error


def _chat_max_tokens(body: ChatBody) -> int | None:
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise InvalidRequest("max_tokens and max_completion_tokens differ: give one", param="max_tokens")
    return old if new is None else new


def _chat_logprobs(body: ChatBody) -> int | None:
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    return None


def _check_best_of(best_of: int | None, n: int) -> None:
    if best_of is None or best_of == n:
        return
    if best_of < n:
        raise InvalidRequest("best_of must not be below n", param="best_of")
    raise NotSupported("best_of above n is not supported: answers are not ranked", param="best_of")


def _stop(stop: str | list[str] | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    return (stop,) if isinstance(stop, str) else tuple(stop)


def _logit_bias(bias: dict[str, float] | None) -> tuple[tuple[int, float], ...]:
    if not bias:
        return ()
    if not all(key.isascii() and key.isdigit() and len(key) <= 10 for key in bias):
        raise InvalidRequest("logit_bias must have token ids as keys", param="logit_bias")
    return tuple((int(key), value) for key, value in bias.items())


# grammars


def _grammar(body: GenerationBody) -> Grammar | None:
    if _constraints(body) == _NO_CONSTRAINTS:
        return None
    found = [grammar for grammar in _grammars(body) if grammar is not None]
    if len(found) > 1:
        raise InvalidRequest(
            "response_format, structured_outputs, guided_json and guided_regex exclude each other: give one",
            param="response_format" if body.response_format else "structured_outputs",
        )
    return found[0] if found else None


def _grammars(body: GenerationBody) -> Iterator[Grammar | None]:
    if body.response_format is not None:
        yield _response_format(body.response_format)
    if body.structured_outputs is not None:
        yield from _structured_outputs(body.structured_outputs)
    if body.guided_json is not None:
        yield _json_grammar(body.guided_json, "guided_json")
    if body.guided_regex is not None:
        yield _regex_grammar(body.guided_regex, "guided_regex")


def _response_format(form: ResponseFormat) -> Grammar | None:
    if form.type == "text":
        return None
    if form.type == "json_object":
        return Grammar(GrammarKind.JSON_OBJECT)
    if form.type != "json_schema":
        raise InvalidRequest(
            "response_format.type must be text, json_object or json_schema", param="response_format.type"
        )
    if form.json_schema is None or form.json_schema.schema is None:
        raise InvalidRequest("response_format needs json_schema with a schema", param="response_format")
    return _json_grammar(form.json_schema.schema, "response_format", text_allowed=False)


def _structured_outputs(wanted: StructuredOutputs) -> Iterator[Grammar]:
    for name in ("choice", "grammar", "structural_tag"):
        if getattr(wanted, name) is not None:
            raise NotSupported(f"structured_outputs.{name} is not supported", param=f"structured_outputs.{name}")
    if wanted.json is not None:
        yield _json_grammar(wanted.json, "structured_outputs.json")
    if wanted.regex is not None:
        yield _regex_grammar(wanted.regex, "structured_outputs.regex")
    if wanted.json_object:
        yield Grammar(GrammarKind.JSON_OBJECT)


def _json_grammar(schema: Any, param: str, *, text_allowed: bool = True) -> Grammar:
    if text_allowed and isinstance(schema, str):
        try:
            schema = msgspec.json.decode(schema)
        except (msgspec.DecodeError, RecursionError) as error:
            raise InvalidRequest(f"{param} is not valid JSON: {error}", param=param) from None
    check_schema(schema, param)
    return Grammar(GrammarKind.JSON_SCHEMA, msgspec.json.encode(schema).decode())


def _regex_grammar(regex: str, param: str) -> Grammar:
    if not 0 < len(regex) <= MAX_REGEX_CHARS:
        raise InvalidRequest(f"{param} must have from 1 to {MAX_REGEX_CHARS} characters", param=param)
    return Grammar(GrammarKind.REGEX, regex)


# prompts


def _prompts(prompt: str | list[str | int | list[int]]) -> Iterator[dict[str, Any]]:
    """Keyword arguments of `Incoming`, one a prompt."""
    if isinstance(prompt, str):
        yield _text_prompt(prompt)
        return
    kinds = set(map(type, prompt))
    if len(kinds) != 1:
        rule = "be all texts, all token ids or all lists of token ids" if kinds else "not be empty"
        raise InvalidRequest(f"prompt must {rule}", param="prompt")
    if int in kinds:
        yield {"token_ids": tuple(prompt)}
        return
    for one in prompt:
        yield _text_prompt(one) if isinstance(one, str) else _token_prompt(one)


def _text_prompt(text: str) -> dict[str, Any]:
    if not text:
        raise InvalidRequest("prompt must not be empty", param="prompt")
    return {"text": text}


def _token_prompt(token_ids: Any) -> dict[str, Any]:
    if not token_ids:
        raise InvalidRequest("prompt must not be empty", param="prompt")
    return {"token_ids": tuple(token_ids)}


def _message(message: Message, where: str) -> ChatMessage:
    role = _ROLES.get(message.role)
    if role is None:
        raise _role_fault(message.role, f"{where}.role")
    if any(_empty_in_messages(message)):
        name = next(name for name in _EMPTY_IN_MESSAGES if getattr(message, name))
        raise NotSupported(f"{where}.{name} is not supported: only text is served", param=f"{where}.{name}")
    extra = (("name", message.name),) if message.name is not None else ()
    return ChatMessage(role, _content(message.content, f"{where}.content"), extra)


def _role_fault(role: str, param: str) -> RequestError:
    if role in ("tool", "function"):
        return NotSupported(f"{param}: tool calls are not served", param=param)
    return InvalidRequest(f"{param} must be system, developer, user or assistant", param=param)


def _content(content: str | list[dict[str, Any]] | None, where: str) -> str:
    if isinstance(content, str):
        return content
    if not content:
        raise InvalidRequest(f"{where} must be a text or a list of text parts", param=where)
    return "\n".join(_part(part, f"{where}[{i}]") for i, part in enumerate(content))


def _part(part: dict[str, Any], where: str) -> str:
    kind = part.get("type")
    if not isinstance(kind, str):
        raise InvalidRequest(f"{where}.type must be a string", param=f"{where}.type")
    if kind != "text":
        raise NotSupported(f"{where}: parts of type {kind[:40]!r} are not supported, only text is served", param=where)
    if set(part) != {"type", "text"} or not isinstance(part["text"], str):
        raise InvalidRequest(f"{where} must have type and text, a string, and nothing else", param=where)
    return part["text"]
