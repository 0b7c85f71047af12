"""The official OpenAI client, unchanged, against the live HTTP face."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from pdserve.types import GrammarKind

WORDS5 = 'Hello world "q"\n \u00e9\u4f60\U0001f600 five'
HI: Any = [{"role": "user", "content": "hi there"}]


async def test_chat_answers_whole(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="twin", messages=HI)
    choice = answer.choices[0]
    assert choice.message.content == WORDS5
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    assert choice.logprobs is None
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.system_fingerprint
    assert answer.usage
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (2, 5, 7)
    assert answer.usage.prompt_tokens_details
    assert answer.usage.prompt_tokens_details.cached_tokens == 3


async def test_chat_streams_role_then_text_then_finish(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model="twin", messages=HI, stream=True)
    chunks = [chunk async for chunk in stream]
    first = chunks[0].choices[0].delta
    assert (first.role, first.content) == ("assistant", "")
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == WORDS5
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert all("usage" not in chunk.model_fields_set for chunk in chunks)


async def test_chat_stream_ends_with_usage_when_asked(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="twin", messages=HI, stream=True, stream_options={"include_usage": True, "include_obfuscation": False}
    )
    chunks = [chunk async for chunk in stream]
    assert all(chunk.usage is None and "usage" in chunk.model_fields_set for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage
    assert chunks[-1].usage.completion_tokens == 5
    assert chunks[-1].usage.prompt_tokens_details
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 3


async def test_completion_answers_whole(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="twin", prompt="a b c", max_tokens=2)
    assert answer.id.startswith("cmpl-")
    assert answer.object == "text_completion"
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("Hello world", "length")
    assert answer.usage
    assert answer.usage.prompt_tokens == 3


async def test_completion_streams(client: openai.AsyncOpenAI) -> None:
    stream = await client.completions.create(
        model="twin", prompt="a", stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == WORDS5
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage
    assert chunks[-1].usage.completion_tokens == 5


async def test_several_prompts_and_choices_are_indexed_as_openai_does(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="twin", prompt=["a", "b c"], n=2, max_tokens=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 4)


async def test_several_prompts_stream_into_one_answer(client: openai.AsyncOpenAI) -> None:
    stream = await client.completions.create(
        model="twin", prompt=[[1, 2], [3]], n=2, stream=True, stream_options={"include_usage": True}
    )
    texts: dict[int, str] = {}
    usages = []
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
        usages.append(chunk.usage)
    assert texts == dict.fromkeys(range(4), WORDS5)
    assert usages[-1]
    assert (usages[-1].prompt_tokens, usages[-1].completion_tokens) == (3, 20)


async def test_n_choices_stream_side_by_side(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model="twin", messages=HI, n=3, stream=True)
    texts = ["", "", ""]
    roles = []
    async for chunk in stream:
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        roles += [choice.index] if choice.delta.role else []
    assert texts == [WORDS5] * 3
    assert roles == [0, 1, 2]


async def test_stop_strings_reach_the_core_and_end_the_text(client: openai.AsyncOpenAI, core: Any) -> None:
    answer = await client.chat.completions.create(model="twin", messages=HI, stop=["orl", "never"])
    assert answer.choices[0].message.content == "Hello w"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].model_extra == {"stop_reason": "orl"}
    assert core.handles[0].incoming.params.stop == ("orl", "never")


async def test_chat_logprobs(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="twin", messages=HI, logprobs=True, top_logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs
    assert logprobs.content
    assert [entry.token for entry in logprobs.content][:2] == ["Hello", " world"]
    assert logprobs.content[3].bytes == list(" \u00e9\u4f60\U0001f600".encode())
    assert [(top.token, top.logprob) for top in logprobs.content[1].top_logprobs] == [
        (" world", -0.5),
        (' "q"\n', -1.5),
    ]


async def test_chat_logprobs_stream(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model="twin", messages=HI, logprobs=True, stream=True)
    entries = []
    roles = []
    async for chunk in stream:
        roles += [chunk.choices[0].delta.role] if chunk.choices[0].delta.role else []
        if chunk.choices[0].logprobs:
            entries += chunk.choices[0].logprobs.content or []
    assert "".join(entry.token for entry in entries) == WORDS5
    assert all(entry.top_logprobs == [] for entry in entries)
    assert roles == ["assistant"]


@pytest.mark.parametrize("stream", [False, True])
async def test_completion_logprobs_have_offsets(client: openai.AsyncOpenAI, stream: bool) -> None:
    answer: Any = await client.completions.create(model="twin", prompt="a", logprobs=1, stream=stream)
    parts = [chunk async for chunk in answer] if stream else [answer]
    found = [part.choices[0].logprobs for part in parts if part.choices[0].logprobs]
    tokens = [token for one in found for token in one.tokens]
    offsets = [offset for one in found for offset in one.text_offset]
    assert "".join(tokens) == WORDS5
    assert offsets == [0, 5, 11, 16, 20]
    assert found[0].top_logprobs[0] == {"Hello": -0.5}


async def test_sampling_fields_reach_the_core(client: openai.AsyncOpenAI, core: Any) -> None:
    await client.chat.completions.create(
        model="twin",
        messages=HI,
        seed=7,
        temperature=0.5,
        top_p=0.25,
        presence_penalty=1,
        frequency_penalty=-1,
        logit_bias={"5": 3},
        max_completion_tokens=4,
        extra_body={
            "top_k": 9,
            "min_p": 0.1,
            "repetition_penalty": 1.5,
            "min_tokens": 2,
            "ignore_eos": True,
            "stop_token_ids": [8],
            "skip_special_tokens": False,
            "include_stop_str_in_output": True,
            "cache_salt": "pepper",
            "priority": -3,
            "deterministic": True,
            "request_id": "mine",
        },
        extra_headers={
            "x-request-timeout-ms": "2500",
            "traceparent": f"00-{'a' * 32}-{'b' * 16}-01",
            "x-session-id": "s1",
        },
    )
    incoming = core.handles[0].incoming
    params = incoming.params
    assert (params.seed, params.temperature, params.top_p, params.top_k, params.min_p) == (7, 0.5, 0.25, 9, 0.1)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (1, -1, 1.5)
    assert (params.max_tokens, params.min_tokens, params.ignore_eos) == (4, 2, True)
    assert (params.logit_bias, params.stop_token_ids) == (((5, 3.0),), (8,))
    assert (incoming.skip_special_tokens, incoming.include_stop_str_in_output) == (False, True)
    assert (incoming.cache_salt, incoming.priority, incoming.deterministic) == ("pepper", -3, True)
    assert (incoming.request_id, incoming.timeout_ms) == ("mine", 2500)
    assert incoming.traceparent.startswith("00-aaaa")
    assert incoming.session == "s1"


async def test_absent_fields_leave_the_defaults(client: openai.AsyncOpenAI, core: Any) -> None:
    await client.completions.create(model="twin", prompt="a")
    params = core.handles[0].incoming.params
    assert (params.max_tokens, params.seed, params.temperature, params.logprobs, params.grammar) == (
        None,
        None,
        1.0,
        None,
        None,
    )


async def test_response_formats_become_grammars(client: openai.AsyncOpenAI, core: Any) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    answer = await client.chat.completions.create(
        model="twin",
        messages=HI,
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}},
    )
    await client.chat.completions.create(model="twin", messages=HI, response_format={"type": "json_object"})
    await client.chat.completions.create(model="twin", messages=HI, response_format={"type": "text"})
    await client.chat.completions.create(model="twin", messages=HI, extra_body={"guided_regex": "a+"})
    await client.chat.completions.create(model="twin", messages=HI, extra_body={"guided_json": '{"type": "null"}'})
    await client.chat.completions.create(
        model="twin", messages=HI, extra_body={"structured_outputs": {"json": {"enum": [1]}}}
    )
    grammars = [handle.incoming.params.grammar for handle in core.handles]
    assert answer.choices[0].message.content == '{"a":1}'
    assert grammars[0].kind is GrammarKind.JSON_SCHEMA
    assert grammars[0].source == '{"type":"object","properties":{"a":{"type":"integer"}},"required":["a"]}'
    assert grammars[1].kind is GrammarKind.JSON_OBJECT
    assert grammars[2] is None
    assert (grammars[3].kind, grammars[3].source) == (GrammarKind.REGEX, "a+")
    assert [grammar.source for grammar in grammars[4:]] == ['{"type":"null"}', '{"enum":[1]}']


async def test_token_ids_are_returned_when_asked(client: openai.AsyncOpenAI) -> None:
    extra: Any = {"return_token_ids": True}
    chat: Any = await client.chat.completions.create(model="twin", messages=HI, extra_body=extra)
    assert chat.prompt_token_ids == [0, 1]
    assert chat.choices[0].token_ids == [0, 1, 2, 3, 4]
    text: Any = await client.completions.create(model="twin", prompt=[[5, 6], [7]], n=2, max_tokens=1, extra_body=extra)
    assert [choice.prompt_token_ids for choice in text.choices] == [[5, 6], [5, 6], [7], [7]]
    assert [choice.token_ids for choice in text.choices] == [[0]] * 4
    stream: Any = await client.chat.completions.create(model="twin", messages=HI, stream=True, extra_body=extra)
    chunks = [chunk async for chunk in stream]
    assert chunks[0].prompt_token_ids == [0, 1]
    assert [i for chunk in chunks for i in chunk.choices[0].model_extra.get("token_ids", [])] == [0, 1, 2, 3, 4]


async def test_held_back_text_opens_the_stream_and_is_sent_when_free(client: openai.AsyncOpenAI) -> None:
    stream = await client.completions.create(model="twin", prompt="held back", stream=True)
    assert [chunk.choices[0].text async for chunk in stream] == ["all at once", ""]


async def test_message_forms_reach_the_template(client: openai.AsyncOpenAI, core: Any) -> None:
    messages: Any = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "ann"},
        {"role": "assistant", "content": "yes", "refusal": None, "tool_calls": None, "annotations": []},
        {"role": "user", "content": ""},
    ]
    await client.chat.completions.create(model="twin", messages=messages)
    sent = core.handles[0].incoming.messages
    assert [(m.role, m.content) for m in sent] == [
        ("system", "be brief"),
        ("user", "a\nb"),
        ("assistant", "yes"),
        ("user", ""),
    ]
    assert sent[1].extra == (("name", "ann"),)


async def test_models_are_listed_and_found(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["twin"]
    assert (await client.models.retrieve("twin")).model_extra == {"max_model_len": 4096}
    with pytest.raises(openai.NotFoundError) as caught:
        await client.models.retrieve("org/none")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("reason", "kind", "status"),
    [
        ("invalid_value", openai.BadRequestError, 400),
        ("context_length_exceeded", openai.BadRequestError, 400),
        ("overloaded", openai.RateLimitError, 429),
        ("no_worker", openai.InternalServerError, 503),
        ("worker_lost", openai.InternalServerError, 503),
        ("deadline_exceeded", openai.InternalServerError, 504),
        ("engine_failed", openai.InternalServerError, 500),
        ("stale_block", openai.InternalServerError, 503),
    ],
)
@pytest.mark.parametrize("when", ["raise", "fail"])
@pytest.mark.parametrize("stream", [False, True])
async def test_errors_before_the_first_token_have_their_status(
    client: openai.AsyncOpenAI, when: str, stream: bool, reason: str, kind: type[openai.APIStatusError], status: int
) -> None:
    messages: Any = [{"role": "user", "content": f"{when}:{reason}"}]
    with pytest.raises(kind) as caught:
        await client.chat.completions.create(model="twin", messages=messages, stream=stream)
    error = caught.value
    assert (error.status_code, error.code) == (status, reason)
    assert "scripted" in error.message
    retryable = reason in ("overloaded", "no_worker", "worker_lost", "deadline_exceeded", "stale_block")
    assert error.response.headers["x-should-retry"] == str(retryable).lower()
    assert error.response.headers.get("retry-after") == (None if status == 400 else "2")


async def test_an_error_mid_stream_is_an_event_and_never_a_clean_end(client: openai.AsyncOpenAI) -> None:
    messages: Any = [{"role": "user", "content": "break:worker_lost"}]
    stream = await client.chat.completions.create(model="twin", messages=messages, stream=True)
    texts: list[str | None] = []

    async def read() -> None:
        async for chunk in stream:
            texts.append(chunk.choices[0].delta.content)  # noqa: PERF401 (what came before the error counts)

    with pytest.raises(openai.APIError, match="scripted worker_lost") as caught:
        await read()
    assert texts == ["", "Hello", " world"]
    assert caught.value.code == "worker_lost"


async def test_one_failing_prompt_cancels_the_others(client: openai.AsyncOpenAI, core: Any) -> None:
    with pytest.raises(openai.InternalServerError):
        await client.completions.create(model="twin", prompt=["hang", "fail:no_worker", "hang"])
    assert [handle.cancelled.is_set() for handle in core.handles] == [True, False, True]
    with pytest.raises(openai.InternalServerError):
        await client.completions.create(model="twin", prompt=["hang", "raise:no_worker"])
    assert core.handles[3].cancelled.is_set()


async def test_an_unknown_model_is_not_found(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await client.chat.completions.create(model="other", messages=HI)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


async def test_embeddings_are_refused_clearly(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.embeddings.create(model="twin", input="x")
    assert caught.value.code == "not_supported"


async def test_the_clients_request_id_is_kept_if_it_is_sane(client: openai.AsyncOpenAI) -> None:
    raw = await client.chat.completions.with_raw_response.create(
        model="twin", messages=HI, extra_headers={"x-request-id": "abc-1"}
    )
    assert raw.headers["x-request-id"] == "abc-1"
    assert raw.parse().id == "chatcmpl-abc-1"
    other = await client.chat.completions.with_raw_response.create(
        model="twin", messages=HI, extra_headers={"x-request-id": 'a"b'}
    )
    assert '"' not in other.headers["x-request-id"]
    assert len(other.headers["x-request-id"]) == 32
