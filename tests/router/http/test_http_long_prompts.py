"""A request whose prompt is tokenised off the event loop: answered in its turn, or ended while it waits."""

from __future__ import annotations

import json
from typing import Any

import pytest
from msgspec.structs import replace

from pdserve.errors import InvalidRequest, Overloaded

TEXT = "/v1/completions"


def _body(prompt: object, **fields: object) -> dict[str, object]:
    return {"model": "twin", "prompt": prompt, "max_tokens": 2, **fields}


async def test_it_is_answered_once_its_tokens_are_there(serve: Any, dial: Any, core: Any) -> None:
    raw = await dial(await serve())
    raw.post(TEXT, _body("long:a b", return_token_ids=True))
    raw.get("/healthz")
    future, incoming = await core.prepared()
    assert core.handles == []
    future.set_result(replace(incoming, text="a b", token_ids=(7, 8)))
    choice = json.loads((await raw.answer()).body)["choices"][0]
    assert choice["prompt_token_ids"] == [7, 8]
    assert choice["finish_reason"] == "length"
    assert (await raw.answer()).status == 200


async def test_of_several_prompts_only_the_long_ones_wait(serve: Any, dial: Any, core: Any) -> None:
    raw = await dial(await serve())
    raw.post(TEXT, _body(["short", "long:a", "long:b"]))
    for _ in range(2):
        future, incoming = await core.prepared()
        future.set_result(replace(incoming, text="done"))
    assert len(json.loads((await raw.answer()).body)["choices"]) == 3
    assert [handle.incoming.text for handle in core.handles] == ["short", "done", "done"]


@pytest.mark.parametrize(
    ("error", "status"), [(InvalidRequest("bad", param="prompt"), 400), (RuntimeError("secret"), 500)]
)
async def test_its_fault_is_answered_as_any_other(
    serve: Any, dial: Any, core: Any, error: Exception, status: int
) -> None:
    raw = await dial(await serve())
    raw.post(TEXT, _body("long:a", stream=True))
    future, _ = await core.prepared()
    future.set_exception(error)
    answer = await raw.answer()
    assert answer.status == status
    assert b"secret" not in answer.body


async def test_too_many_of_them_are_refused(serve: Any, dial: Any, core: Any) -> None:
    def refuse(incoming: object) -> None:
        raise Overloaded("too many", retry_after_s=1.0)

    core.prepare = refuse
    raw = await dial(await serve())
    raw.post(TEXT, _body("long:a"))
    assert (await raw.answer()).status == 429


async def test_a_client_that_goes_meanwhile_is_not_served(serve: Any, dial: Any, core: Any) -> None:
    port = await serve()
    raw = await dial(port)
    raw.post(TEXT, _body("long:a"))
    future, _ = await core.prepared()
    raw.writer.close()
    while not future.cancelled():
        other = await dial(port)
        other.get("/healthz")
        assert (await other.answer()).status == 200
    assert core.handles == []


async def test_a_server_that_goes_meanwhile_says_so(serve: Any, dial: Any, core: Any, servers: Any) -> None:
    raw = await dial(await serve())
    raw.post(TEXT, _body("long:a"))
    future, _ = await core.prepared()
    await servers[0].drain(0.0)
    assert (await raw.answer()).status == 503
    assert future.cancelled()
    assert core.handles == []
