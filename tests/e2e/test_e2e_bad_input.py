"""Bad input through the front door: a typed 4xx that names the field, and a server that goes on as before."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from e2e_tools import CHAT, MODEL, TEXT, all_blocks_free, completion, sim_tokens

from pdserve_cli.cluster import Cluster

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": HELLO, "max_tokens": 4, **fields}


def text(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "hello", "max_tokens": 4, **fields}


def schema(value: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "s", "schema": value}}


BAD: dict[str, tuple[str, Any, int, str | None, str]] = {
    "empty prompt": (TEXT, text(prompt=""), 400, "prompt", "invalid_value"),
    "no tokens": (TEXT, text(prompt=[]), 400, "prompt", "invalid_value"),
    "empty list in a batch": (TEXT, text(prompt=[[1], []]), 400, "prompt", "invalid_value"),
    "no prompt": (TEXT, {"model": MODEL}, 400, "prompt", "invalid_value"),
    "null prompt": (TEXT, text(prompt=None), 400, "prompt", "invalid_value"),
    "token id unknown": (TEXT, text(prompt=[49_152]), 400, "prompt", "invalid_value"),
    "token id negative": (TEXT, text(prompt=[-1]), 400, "prompt[0]", "invalid_value"),
    "too long prompt": (TEXT, text(prompt=[7] * 140_000), 400, "prompt", "context_length_exceeded"),
    "too long prompt and answer": (TEXT, text(max_tokens=140_000), 400, "max_tokens", "context_length_exceeded"),
    "no messages": (CHAT, chat(messages=[]), 400, "messages", "invalid_value"),
    "messages of a wrong type": (CHAT, chat(messages="hi"), 400, "messages", "invalid_value"),
    "no role": (CHAT, chat(messages=[{"content": "x"}]), 400, "messages[0].role", "invalid_value"),
    "unknown role": (CHAT, chat(messages=[{"role": "owl", "content": "x"}]), 400, "messages[0].role", "invalid_value"),
    "image": (
        CHAT,
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        400,
        "messages[0].content[0]",
        "not_supported",
    ),
    "no model": (CHAT, {"messages": HELLO}, 400, "model", "invalid_value"),
    "unknown model": (CHAT, chat(model="gpt-none"), 404, "model", "model_not_found"),
    "malformed JSON": (CHAT, b'{"model": "x", ', 400, None, "invalid_value"),
    "no JSON": (CHAT, b"", 400, None, "invalid_value"),
    "JSON of another kind": (CHAT, b"[1, 2]", 400, None, "invalid_value"),
    "NaN": (CHAT, json.dumps(chat(temperature=float("nan"))).encode(), 400, None, "invalid_value"),
    "infinity": (CHAT, b'{"model": "m", "messages": [], "top_p": 1e999}', 400, "top_p", "invalid_value"),
    "invalid UTF-8": (TEXT, b'{"model": "m", "prompt": "\xff\xfe"}', 400, None, "invalid_value"),
    "lone surrogate": (TEXT, b'{"model": "%b", "prompt": "\\ud800"}' % MODEL.encode(), 400, None, "invalid_value"),
    "deep nesting": (CHAT, b"[" * 100_000, 400, None, "invalid_value"),
    "temperature as text": (CHAT, chat(temperature="hot"), 400, "temperature", "invalid_value"),
    "temperature negative": (CHAT, chat(temperature=-0.1), 400, "temperature", "invalid_value"),
    "temperature too high": (CHAT, chat(temperature=2.1), 400, "temperature", "invalid_value"),
    "max_tokens 0": (CHAT, chat(max_tokens=0), 400, "max_tokens", "invalid_value"),
    "max_tokens negative": (TEXT, text(max_tokens=-5), 400, "max_tokens", "invalid_value"),
    "max_tokens a fraction": (TEXT, text(max_tokens=1.5), 400, "max_tokens", "invalid_value"),
    "max_completion_tokens 0": (
        CHAT,
        {"model": MODEL, "messages": HELLO, "max_completion_tokens": 0},
        400,
        "max_completion_tokens",
        "invalid_value",
    ),
    "min_tokens over max_tokens": (TEXT, text(min_tokens=5), 400, "min_tokens", "invalid_value"),
    "n 0": (CHAT, chat(n=0), 400, "n", "invalid_value"),
    "n too high": (CHAT, chat(n=1000), 400, "n", "invalid_value"),
    "top_p 0": (CHAT, chat(top_p=0), 400, "top_p", "invalid_value"),
    "seed negative": (CHAT, chat(seed=-1), 400, "seed", "invalid_value"),
    "penalty too high": (CHAT, chat(presence_penalty=3), 400, "presence_penalty", "invalid_value"),
    "bias for a word": (CHAT, chat(logit_bias={"dog": 1}), 400, "logit_bias", "invalid_value"),
    "bias for an unknown id": (CHAT, chat(logit_bias={"49152": 1}), 400, "logit_bias", "invalid_value"),
    "empty stop string": (CHAT, chat(stop=[""]), 400, "stop", "invalid_value"),
    "too many logprobs": (TEXT, text(logprobs=21), 400, "logprobs", "invalid_value"),
    "stream as text": (CHAT, chat(stream="yes"), 400, "stream", "invalid_value"),
    "stream_options without stream": (
        CHAT,
        chat(stream_options={"include_usage": True}),
        400,
        "stream_options",
        "invalid_value",
    ),
    "unknown field": (CHAT, chat(frobnicate=1), 400, "frobnicate", "invalid_value"),
    "unknown field inside": (
        CHAT,
        chat(stream=True, stream_options={"frob": 1}),
        400,
        "stream_options.frob",
        "invalid_value",
    ),
    "unknown format": (CHAT, chat(response_format={"type": "xml"}), 400, "response_format.type", "invalid_value"),
    "invalid schema": (
        CHAT,
        chat(response_format=schema({"type": "potato"})),
        400,
        "response_format",
        "invalid_value",
    ),
    "schema of a wrong kind": (CHAT, chat(response_format=schema([1])), 400, "response_format", "invalid_value"),
    "tools": (CHAT, chat(tools=[{"type": "function", "function": {"name": "f"}}]), 400, "tools", "not_supported"),
    "echo": (TEXT, text(echo=True), 400, "echo", "not_supported"),
    "embeddings": ("/v1/embeddings", {"model": MODEL, "input": "x"}, 400, None, "not_supported"),
    "10 MB body": (TEXT, b'{"model": "m", "prompt": "' + b"x" * 10_000_000 + b'"}', 413, None, "payload_too_large"),
    "unknown path": ("/v1/dreams", {}, 404, None, "not_found"),
}


def has_streamed_form(name: str) -> bool:
    path, body, *_ = BAD[name]
    return path in (CHAT, TEXT) and isinstance(body, dict) and not body.keys() & {"stream", "stream_options"}


CASES = [(name, False) for name in BAD] + [(name, True) for name in BAD if has_streamed_form(name)]


@pytest.mark.parametrize(("name", "stream"), CASES)
async def test_bad_input_is_a_typed_error_and_harms_nobody(http: httpx.AsyncClient, name: str, stream: bool) -> None:
    path, body, status, param, code = BAD[name]
    content = body if isinstance(body, bytes) else json.dumps(body | {"stream": True} if stream else body).encode()
    response = await http.post(path, content=content, headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code), error
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    if param is not None:
        assert error["param"] == param
    good = await http.post(TEXT, json=completion([5, 6, 7], max_tokens=2, ignore_eos=True, return_token_ids=True))
    assert good.json()["choices"][0]["token_ids"] == sim_tokens([5, 6, 7], max_tokens=2, ignore_eos=True, temperature=0)


async def test_bad_input_leaves_nothing_behind(sim_cluster: Cluster, http: httpx.AsyncClient) -> None:
    for path, body, *_ in BAD.values():
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        assert (await http.post(path, content=content)).status_code >= 400
    await all_blocks_free(sim_cluster)
    page = (await http.get("/metrics")).text
    assert "pdserve_requests_inflight 0.0" in page.splitlines()


async def test_absent_max_tokens_means_what_the_context_leaves(http: httpx.AsyncClient) -> None:
    """65,536 tokens fit a worker here; the answer ends by itself or at that length, with no error."""
    body = {"model": MODEL, "prompt": [5] * 65_500, "temperature": 0, "ignore_eos": True}
    answer = (await http.post(TEXT, json=body)).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 36
