"""How output is shaped: slots that hold whatever text, logprobs that JSON can hold."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.errors import Overloaded, WorkerLost
from pdserve.types import FinishReason, Logprobs
from router.base import Usage
from router.http.errors import error_body, error_headers
from router.http.responses import ChatChunk, ChatChunkChoice, Delta
from router.http.shapes import ChatShape, Envelope, Piece, TextShape

SHAPES = [ChatShape, TextShape]


def envelope(**fields: Any) -> Envelope:
    texts = {1: ("a", b"a"), 2: ("\ufffd", b"\xf0\x9f")}
    return Envelope("id", 1, "\x00", "fp", texts.__getitem__, **fields)


@pytest.mark.parametrize("shape_type", SHAPES)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_a_filled_slot_is_the_chunk_of_that_text(shape_type: Any, text: str) -> None:
    shape = shape_type(envelope(with_usage=True))
    before, after = shape.slot(3)
    assert before + msgspec.json.encode(text) + after == shape.chunk(Piece(3, text))


@pytest.mark.parametrize("shape_type", SHAPES)
def test_impossible_tokens_have_finite_logprobs(shape_type: Any) -> None:
    shape = shape_type(envelope(with_logprobs=True))
    piece = Piece(0, "a", [(1, Logprobs(0, 0, -math.inf, 9, (2,), (-math.inf,)))], (1,), FinishReason.STOP)
    body = json.loads(shape.whole([piece], [()], Usage(1, 1, 0)))
    found = body["choices"][0]["logprobs"]
    assert "Infinity" not in json.dumps(found)
    assert "-9999.0" in json.dumps(found)


def test_completions_name_parts_of_characters_by_their_bytes() -> None:
    shape = TextShape(envelope(with_logprobs=True))
    piece = Piece(0, "", [(2, Logprobs(0, 0, -1.0, 1, (1,), (-1.0,)))], (2,), text_offset=7)
    found = json.loads(shape.chunk(piece))["choices"][0]["logprobs"]
    assert found["tokens"] == ["bytes:\\xf0\\x9f"]
    assert found["top_logprobs"] == [{"a": -1.0, "bytes:\\xf0\\x9f": -1.0}]
    assert found["text_offset"] == [7]


def test_a_finish_chunk_tells_reason_and_stop() -> None:
    for shape_type in SHAPES:
        choice = json.loads(shape_type(envelope()).chunk(Piece(0, finish=FinishReason.LENGTH, stop=None)))["choices"][0]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("length", None)


def test_errors_tell_when_to_come_back() -> None:
    headers = dict(error_headers(Overloaded("full", retry_after_s=0.25)))
    assert headers == {"x-should-retry": "true", "retry-after": "1", "retry-after-ms": "250"}
    assert json.loads(error_body(WorkerLost("gone", leg="decode")))["error"] == {
        "message": "gone",
        "type": "server_error",
        "param": None,
        "code": "worker_lost",
    }


_names = st.text(max_size=8) | st.sampled_from(["[]", '"[]', 'a"choices":[]'])


@settings(deadline=None)
@given(st.integers(0, 200), st.text(max_size=20), _names, _names, st.booleans())
def test_chunks_put_together_from_bytes_are_those_of_their_types(
    index: int, text: str, id_: str, model: str, usage: bool
) -> None:
    shape = ChatShape(Envelope(id_, 5, model, "fp_1", lambda _: ("", b""), with_usage=usage))

    def encoded(choice: ChatChunkChoice) -> bytes:
        body = ChatChunk(id=id_, created=5, model=model, system_fingerprint="fp_1", choices=[choice])
        body.usage = None if usage else msgspec.UNSET
        return msgspec.json.encode(body)

    assert shape.chunk(Piece(index, text)) == encoded(ChatChunkChoice(index=index, delta=Delta(content=text)))
    opening = ChatChunkChoice(index=index, delta=Delta(role="assistant", content=""))
    assert shape.opening([index], ()) == [encoded(opening)]
    for reason in FinishReason:
        end = ChatChunkChoice(index=index, delta=Delta(), finish_reason=reason.name.lower(), stop_reason=None)
        assert shape.chunk(Piece(index, finish=reason)) == encoded(end)
