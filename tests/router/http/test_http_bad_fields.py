"""Bad bodies: each gets a 4xx whose error names the field, and the server goes on."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
import uvloop
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"


@pytest.fixture
def event_loop_policy() -> asyncio.AbstractEventLoopPolicy:
    return uvloop.EventLoopPolicy()


def nested(depth: int) -> Any:
    value: Any = {"type": "string"}
    for _ in range(depth):
        value = {"type": "array", "items": value}
    return value


def schema(value: Any) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": value}}


BAD_COMMON: list[tuple[dict[str, Any], str | None]] = [
    ({"model": None}, "model"),
    ({"model": 5}, "model"),
    ({"foo": 1}, "foo"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 2**31}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"n": 1.5}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 2**40}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"seed": "x"}, "seed"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"stop": 5}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"stop": [1]}, "stop[0]"),
    ({"stop": ["s"] * 17}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ({"stop_token_ids": 1}, "stop_token_ids"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"\u0665": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"5": "x"}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": "json"}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format.json_schema.name"),
    ({"response_format": schema("text")}, "response_format"),
    ({"response_format": schema([])}, "response_format"),
    ({"response_format": schema({"type": "strin"})}, "response_format"),
    ({"response_format": schema({"type": []})}, "response_format"),
    ({"response_format": schema({"properties": []})}, "response_format"),
    ({"response_format": schema({"properties": {"a": 1}})}, "response_format"),
    ({"response_format": schema({"required": "a"})}, "response_format"),
    ({"response_format": schema({"enum": []})}, "response_format"),
    ({"response_format": schema({"anyOf": []})}, "response_format"),
    ({"response_format": schema({"minLength": -1})}, "response_format"),
    ({"response_format": schema({"maximum": "9"})}, "response_format"),
    ({"response_format": schema({"pattern": 9})}, "response_format"),
    ({"response_format": schema({"items": [{"not": 1}]})}, "response_format"),
    ({"response_format": schema(nested(65))}, "response_format"),
    ({"response_format": schema({"anyOf": [True] * 20_001})}, "response_format"),
    ({"guided_json": "{"}, "guided_json"),
    ({"guided_json": 5}, "guided_json"),
    ({"guided_regex": ""}, "guided_regex"),
    ({"guided_regex": "a" * 20_000}, "guided_regex"),
    ({"guided_regex": "a", "guided_json": {}}, "structured_outputs"),
    ({"structured_outputs": {"choice": ["a"]}}, "structured_outputs.choice"),
    ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex"),
    ({"cache_salt": "x" * 257}, "cache_salt"),
    ({"request_id": 'a"b'}, "request_id"),
    ({"request_id": ""}, "request_id"),
    ({"priority": 2**31}, "priority"),
    ({"metadata": {"a": 1}}, "metadata"),
    ({"ignore_eos": 1}, "ignore_eos"),
]

BAD_CHAT: list[tuple[dict[str, Any], str | None]] = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": ["hi"]}, "messages[0]"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": "x"}, {"role": "tool", "content": "x"}]}, "messages[1].role"),
    ({"messages": [{"role": "user", "content": "x", "foo": 1}]}, "messages[0].foo"),
    ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url"}]}]},
        "messages[0].content[1]",
    ),
    ({"prompt": "x"}, "prompt"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_completion_tokens": 5, "max_tokens": 6}, "max_tokens"),
    ({"logprobs": 1}, "logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"functions": [{}]}, "functions"),
    ({"function_call": "auto"}, "function_call"),
    ({"audio": {}}, "audio"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"verbosity": "low"}, "verbosity"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"store": True}, "store"),
    ({"chat_template": "x"}, "chat_template"),
    ({"add_generation_prompt": False}, "add_generation_prompt"),
    ({"continue_final_message": True}, "continue_final_message"),
]

BAD_TEXT: list[tuple[dict[str, Any], str | None]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [""]}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [1.5]}, "prompt[0]"),
    ({"prompt": [-1]}, "prompt[0]"),
    ({"prompt": [2**31]}, "prompt[0]"),
    ({"prompt": ["a"] * 129}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"messages": []}, "messages"),
    ({"echo": True}, "echo"),
    ({"suffix": "x"}, "suffix"),
    ({"best_of": 2}, "best_of"),
    ({"best_of": 1, "n": 2}, "best_of"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
]

GOOD_CHAT: list[dict[str, Any]] = [
    {"user": "u", "store": False, "metadata": {"a": "b"}, "service_tier": "auto", "parallel_tool_calls": True},
    {"safety_identifier": "s", "prompt_cache_key": "k", "tools": [], "tool_choice": "none", "modalities": ["text"]},
    {
        "prediction": {"type": "content", "content": "x"},
        "verbosity": "medium",
        "max_tokens": 3,
        "max_completion_tokens": 3,
    },
    {"temperature": None, "stop": None, "n": None, "seed": None, "stream": None, "response_format": None},
    {"logprobs": False, "top_logprobs": 0, "logit_bias": {}, "top_k": -1, "seed": 2**63 - 1},
    {"response_format": schema(nested(60))},
    {"response_format": schema(True)},
]


def chat(fields: dict[str, Any]) -> dict[str, Any]:
    return {"model": "twin", "messages": [{"role": "user", "content": "hi"}], **fields}


def text(fields: dict[str, Any]) -> dict[str, Any]:
    return {"model": "twin", "prompt": "hi", **fields}


CASES = [(CHAT, chat(fields), param) for fields, param in BAD_COMMON + BAD_CHAT] + [
    (TEXT, text(fields), param) for fields, param in BAD_COMMON + BAD_TEXT
]


async def test_every_bad_field_is_named(serve: Any, dial: Any, core: Any) -> None:
    raw = await dial(await serve())
    wrong = []
    for path, body, param in CASES:
        raw.post(path, body)
        answer = await raw.answer()
        error = answer.error
        if (answer.status, error["param"], error["type"]) != (400, param, "invalid_request_error"):
            wrong.append((path, str(body)[:150], param, answer.status, answer.body[:200]))
        assert param is None or param in str(error["message"])
    assert wrong == []
    assert core.handles == []


async def test_missing_fields_are_named(serve: Any, dial: Any) -> None:
    raw = await dial(await serve())
    for path, body, param in (
        (CHAT, {"model": "twin"}, "messages"),
        (TEXT, {"prompt": "x"}, "model"),
        (TEXT, {}, "model"),
    ):
        raw.post(path, body)
        assert (await raw.answer()).error["param"] == param


async def test_harmless_fields_pass(serve: Any, dial: Any) -> None:
    raw = await dial(await serve())
    for fields in GOOD_CHAT:
        raw.post(CHAT, chat(fields))
        answer = await raw.answer()
        assert answer.status == 200, (fields, answer.body)


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b'{"model":"twin",}', "byte 16"),
        (b'{"model":"twin","prompt":"a"} x', "trailing characters"),
        (b"[]", "object"),
        (b"null", "object"),
        (b'{"model":"twin","prompt":"x","temperature":NaN}', "byte 43"),
        (b'{"model":"twin","prompt":"x","temperature":Infinity}', "byte 43"),
        (b'{"model":"twin","prompt":"x","temperature":1e999}', "temperature"),
        (b'{"model":"\xff"}', "UTF-8"),
        (b'{"\xff":1}', "UTF-8"),
        (b'{"model":"twin","prompt":"\\ud800"}', "JSON"),
        (b"[" * 100_000, "object"),
        (b'{"model":"twin","prompt":"x","tools":' + b"[" * 100_000, "tools"),
        (b'{"model":"twin","prompt":"x","guided_json":' + b"[" * 100_000, "deeply"),
        (b'{"model":"twin","prompt":"x","guided_json":{"enum":' + b"[" * 5000 + b"]" * 5000 + b"}}", "deeply"),
        (b'{"model":"twin","prompt":"x","guided_json":"' + b"[" * 5000 + b'"}', "guided_json"),
        (b'{"' + b"a" * 50_000 + b'":1}', "Unrecognized"),
    ],
)
async def test_bodies_that_are_no_json_object_are_refused(serve: Any, dial: Any, body: bytes, fault: str) -> None:
    raw = await dial(await serve())
    raw.post(TEXT, body)
    answer = await raw.answer()
    assert (answer.status, answer.error["code"]) == (400, "invalid_value")
    assert fault in str(answer.error["message"])
    raw.post(TEXT, text({}))
    assert (await raw.answer()).status == 200


async def test_a_bad_timeout_header_is_named(serve: Any, dial: Any) -> None:
    raw = await dial(await serve())
    for value in ("soon", "0", "-5", "99999999999"):
        raw.post(TEXT, text({}), f"x-request-timeout-ms: {value}")
        assert (await raw.answer()).error["param"] == "x-request-timeout-ms"


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
FIELDS = st.sampled_from(sorted({name for fields, _ in BAD_COMMON + BAD_CHAT + BAD_TEXT for name in fields}))
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["user", "system", "tool", "x"]) | VALUES,
            "content": st.lists(st.fixed_dictionaries({}, optional={"type": VALUES, "text": VALUES}), max_size=2)
            | VALUES,
            "name": VALUES,
        },
    ),
    max_size=3,
)
BODIES = st.fixed_dictionaries(
    {},
    optional={
        "model": st.just("twin") | VALUES,
        "messages": st.just([{"role": "user", "content": "hi"}]) | MESSAGES,
        "prompt": st.just("hi") | VALUES,
        "response_format": st.builds(schema, VALUES) | VALUES,
        "structured_outputs": st.fixed_dictionaries({}, optional={"json": VALUES, "regex": VALUES}) | VALUES,
    },
).flatmap(
    lambda base: st.dictionaries(FIELDS | st.text(max_size=8), VALUES, max_size=3).map(lambda more: {**more, **base})
)
RAW = st.binary(max_size=60) | BODIES.map(lambda body: json.dumps(body).encode()).flatmap(
    lambda raw: st.integers(0, len(raw)).map(lambda cut: raw[:cut])
)


def check_answer(answer: Any) -> None:
    """Never a 5xx; an error is OpenAI's, and names its field unless the body as a whole is at fault."""
    assert answer.status in (200, 400, 404)
    if answer.status == 200:
        return
    error = answer.error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"] == "invalid_request_error"
    whole = ("could not be parsed", "UTF-8", "the body", "nested")
    assert error["param"] is not None or any(part in str(error["message"]) for part in whole)


FUZZ = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


async def survives(serve: Any, dial: Any, path: str, body: object) -> None:
    """One server for all examples: the fixtures outlive them."""
    serve.port = getattr(serve, "port", None) or await serve()
    raw = await dial(serve.port)
    raw.post(path, body)
    check_answer(await raw.answer())
    raw.get("/healthz")
    assert (await raw.answer()).status == 200
    raw.writer.close()


@FUZZ
@given(path=st.sampled_from([CHAT, TEXT]), body=BODIES)
@example(path=CHAT, body={"model": "twin", "messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]})
async def test_no_body_harms_the_server(serve: Any, dial: Any, path: str, body: dict[str, Any]) -> None:
    await survives(serve, dial, path, body)


@FUZZ
@given(path=st.sampled_from([CHAT, TEXT]), raw=RAW)
async def test_no_bytes_harm_the_server(serve: Any, dial: Any, path: str, raw: bytes) -> None:
    await survives(serve, dial, path, raw)
