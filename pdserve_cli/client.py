"""A small OpenAI client on the standard library: enough for first answers and parity, with no dependency."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from pdserve.errors import PdserveError, ServiceError, from_fields


class StreamCut(ServiceError):
    """The stream ended without `[DONE]` and without an error: the router itself went away."""

    reason = "stream_cut"
    retryable = True


@dataclass(slots=True)
class Answer:
    """What came back: text and token ids of choice 0, their logprobs when asked for, and when the first came."""

    request_id: str = ""
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    ttft_s: float | None = None
    usage: dict[str, Any] = field(default_factory=dict)


def stream(
    url: str,
    path: str,
    body: dict[str, Any],
    timeout_s: float = 120.0,
    into: Answer | None = None,
    leave_after: int | None = None,
) -> Answer:
    """POST with `stream: true` and collect, in `into` if it is given: then what came before an error is known. With
    `leave_after` the connection is closed, rudely, as soon as so many token ids are there.

    Raises the typed error that the server sent, also in mid-stream; `StreamCut` when the stream ends without `[DONE]`;
    `TimeoutError` when nothing came for `timeout_s`, `OSError` or `http.client.HTTPException` when nobody is there.
    """
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "127.0.0.1", parts.port, timeout=timeout_s)
    begun = time.monotonic()
    try:
        payload = {**body, "stream": True, "stream_options": {"include_usage": True}}
        connection.request("POST", path, json.dumps(payload), {"content-type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise _error(response.read())
        answer = into or Answer()
        answer.request_id = response.getheader("x-request-id") or ""
        for event in _events(response):
            _take(answer, event, begun)
            if leave_after is not None and len(answer.token_ids) >= leave_after:
                break
        return answer
    finally:
        connection.close()


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    for raw in response:
        if not raw.endswith(b"\n"):
            break  # cut in the middle of a line
        line = raw.strip()
        if line == b"data: [DONE]":
            return
        if line.startswith(b"data: "):
            event = json.loads(line[6:])
            if "error" in event:
                raise _error(line[6:])
            yield event
    raise StreamCut("the stream ended without [DONE]")


def _take(answer: Answer, event: dict[str, Any], begun: float) -> None:
    if event.get("usage"):
        answer.usage = event["usage"]
    for choice in event["choices"]:
        if choice["index"] != 0:
            continue
        text = choice.get("text") or choice.get("delta", {}).get("content") or ""
        if (text or choice.get("token_ids")) and answer.ttft_s is None:
            answer.ttft_s = time.monotonic() - begun
        answer.text += text
        answer.token_ids += choice.get("token_ids") or ()
        answer.logprobs += (choice.get("logprobs") or {}).get("token_logprobs") or ()
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason


def _error(body: bytes) -> PdserveError:
    try:
        detail = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return ServiceError(body[:500].decode(errors="replace"))
    fields = {"reason": detail.get("code") or "", "message": detail.get("message") or ""}
    if detail.get("param"):
        fields["param"] = detail["param"]
    return from_fields(fields)
