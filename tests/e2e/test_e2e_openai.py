"""The official OpenAI client, unchanged, against prefill and decode workers that run the embedded model."""

from __future__ import annotations

import asyncio
import json
import math
import re
from typing import Any

import openai
import pytest
from e2e_tools import MODEL

from pdserve.models import resolve
from pdserve.tokens import Tokenizer
from pdserve_cli.cluster import Cluster

pytestmark = [pytest.mark.e2e, pytest.mark.torch_model, pytest.mark.asyncio(loop_scope="session")]

QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


async def test_a_chat_answers_sensibly_with_usage(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=24)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage
    assert 0 < answer.usage.completion_tokens <= 24
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


async def test_a_stream_is_the_whole_answer_in_pieces(client: openai.AsyncOpenAI) -> None:
    given: Any = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 24}
    whole = await client.chat.completions.create(**given)
    stream = await client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert whole.usage
    assert chunks[-1].usage
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-2].choices[0].finish_reason == "stop"


async def test_a_completion_continues_its_prompt(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model=MODEL, prompt="Count: 1, 2, 3, 4, 5,", temperature=0, max_tokens=5)
    assert answer.choices[0].text == " 6, 7"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage
    assert answer.usage.completion_tokens == 5


async def test_the_second_of_two_equal_long_prompts_is_cached(client: openai.AsyncOpenAI) -> None:
    prompt = "Cached prompts are cheap. " * 30
    given: Any = {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 4}
    first, second = [await client.completions.create(**given) for _ in range(2)]
    assert first.usage
    assert first.usage.prompt_tokens_details
    assert second.usage
    assert second.usage.prompt_tokens_details
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    cached = second.usage.prompt_tokens_details.cached_tokens or 0
    assert second.usage.prompt_tokens - 17 <= cached < second.usage.prompt_tokens
    assert second.choices[0].text == first.choices[0].text


async def test_tenants_do_not_share_cached_prompts(client: openai.AsyncOpenAI) -> None:
    prompt = "What one tenant says, no other can probe. " * 12
    cached = []
    for salt in ("ours", "theirs", "ours"):
        answer = await client.completions.create(
            model=MODEL, prompt=prompt, temperature=0, max_tokens=2, extra_body={"cache_salt": salt}
        )
        assert answer.usage
        assert answer.usage.prompt_tokens_details
        cached.append(answer.usage.prompt_tokens_details.cached_tokens or 0)
    assert cached[:2] == [0, 0]
    assert cached[2] > 0


async def test_seeded_choices_differ_and_come_again(client: openai.AsyncOpenAI) -> None:
    given: Any = {"model": MODEL, "messages": QUESTION, "seed": 11, "temperature": 1.5, "max_tokens": 8, "n": 3}
    first, second = [await client.chat.completions.create(**given) for _ in range(2)]
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts == [choice.message.content for choice in second.choices]
    other = await client.chat.completions.create(**{**given, "seed": 12, "n": 1})
    assert other.choices[0].message.content not in texts


async def test_the_first_of_n_choices_is_the_only_choice_of_one(client: openai.AsyncOpenAI) -> None:
    given: Any = {"model": MODEL, "prompt": "Once upon a time", "seed": 5, "temperature": 1.0, "max_tokens": 10}
    one = await client.completions.create(**given)
    two = await client.completions.create(**given, n=2)
    assert two.choices[0].text == one.choices[0].text


async def test_greedy_choices_are_equal(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model=MODEL, prompt="One, two,", temperature=0, max_tokens=8, n=2)
    assert answer.choices[0].text == answer.choices[1].text
    assert answer.usage
    assert answer.usage.completion_tokens == 16


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", [", 8", "7, 8,", "6", " 6, 7, 8"])
async def test_stop_strings_end_the_text_wherever_tokens_cut_it(
    client: openai.AsyncOpenAI, stop: str, stream: bool
) -> None:
    prompt = "Count: 1, 2, 3, 4, 5,"
    answer: Any = await client.completions.create(
        model=MODEL, prompt=prompt, temperature=0, max_tokens=24, stop=[stop, "never"], stream=stream
    )
    parts = [part async for part in answer] if stream else [answer]
    text = "".join(part.choices[0].text for part in parts)
    whole = " 6, 7, 8, 9"
    assert text == whole[: whole.index(stop)]
    assert parts[-1].choices[0].finish_reason == "stop"
    assert parts[-1].choices[0].model_extra["stop_reason"] == stop


async def test_chat_logprobs_are_of_the_tokens_sent(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_tokens=6, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs
    assert logprobs.content
    assert len(logprobs.content) == 6
    assert (
        b"".join(bytes(entry.bytes or []) for entry in logprobs.content).decode() == answer.choices[0].message.content
    )
    for entry in logprobs.content:
        tops = [top.logprob for top in entry.top_logprobs]
        assert len(tops) == 3
        assert tops == sorted(tops, reverse=True)
        assert entry.token == entry.top_logprobs[0].token
        assert math.isclose(entry.logprob, tops[0], abs_tol=1e-5)
        assert sum(map(math.exp, tops)) <= 1.0001


async def test_completion_logprobs_have_tokens_and_offsets(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model=MODEL, prompt="The sky is", temperature=0, max_tokens=5, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs
    assert "".join(logprobs.tokens or []) == answer.choices[0].text
    assert logprobs.text_offset
    assert logprobs.text_offset[0] == 0
    assert len(logprobs.token_logprobs or []) == len(logprobs.top_logprobs or []) == 5


async def test_streamed_logprobs_are_those_of_the_whole_answer(client: openai.AsyncOpenAI) -> None:
    given: Any = {"model": MODEL, "messages": QUESTION, "seed": 3, "max_tokens": 6, "logprobs": True}
    given["extra_body"] = {"deterministic": True}
    whole = await client.chat.completions.create(**given)
    entries = []
    async for chunk in await client.chat.completions.create(**given, stream=True):
        if chunk.choices[0].logprobs:
            entries += chunk.choices[0].logprobs.content or []
    assert whole.choices[0].logprobs
    expected = whole.choices[0].logprobs.content or []
    assert [entry.token for entry in entries] == [entry.token for entry in expected]
    assert [entry.logprob for entry in entries] == pytest.approx([entry.logprob for entry in expected], abs=1e-3)


async def test_json_object_parses(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": 'Answer with JSON like {"city": "..."}: the capital of France?'}],
        temperature=0,
        max_tokens=40,
        response_format={"type": "json_object"},
    )
    text = answer.choices[0].message.content or ""
    assert text.startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_json_schema_validates(client: openai.AsyncOpenAI, temperature: float) -> None:
    answer = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Describe a person as JSON."}],
        temperature=temperature,
        seed=2,
        max_tokens=64,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}},
    )
    assert answer.choices[0].finish_reason == "stop"
    person = json.loads(answer.choices[0].message.content or "")
    assert set(person) == {"name", "age"}
    assert isinstance(person["name"], str)
    assert 0 <= person["age"] <= 99


async def test_a_regex_holds_for_every_choice(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(
        model=MODEL,
        prompt="My phone number is",
        seed=4,
        n=2,
        max_tokens=24,
        extra_body={"structured_outputs": {"regex": r" [0-9]{3}-[0-9]{4}\."}},
    )
    for choice in answer.choices:
        assert re.fullmatch(r" [0-9]{3}-[0-9]{4}\.", choice.text)
        assert choice.finish_reason == "stop"


async def test_min_tokens_holds_the_end_back(client: openai.AsyncOpenAI) -> None:
    given: Any = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 14}
    short = await client.chat.completions.create(**given)
    longer = await client.chat.completions.create(**given, extra_body={"min_tokens": 12})
    assert short.usage
    assert longer.usage
    assert short.usage.completion_tokens < 12 <= longer.usage.completion_tokens


async def test_logit_bias_forces_and_forbids_tokens(client: openai.AsyncOpenAI) -> None:
    tokenizer = Tokenizer.load(resolve("embedded").path)
    (banana,) = tokenizer.encode(" banana")[:1]
    forced = await client.completions.create(
        model=MODEL, prompt="I like", temperature=0, max_tokens=3, logit_bias={str(banana): 100}
    )
    assert forced.choices[0].text == tokenizer.decode([banana] * 3)
    plain: Any = {"model": MODEL, "prompt": "One, two,", "temperature": 0, "max_tokens": 1}
    first = await client.completions.create(**plain, extra_body={"return_token_ids": True})
    (token,) = first.choices[0].model_extra["token_ids"]  # type: ignore[index]
    other = await client.completions.create(**plain, logit_bias={str(token): -100})
    assert other.choices[0].text != first.choices[0].text


async def test_penalties_stop_repetition(client: openai.AsyncOpenAI) -> None:
    given: Any = {"model": MODEL, "prompt": "1, 1, 1, 1, 1, 1, 1, 1,", "temperature": 0, "max_tokens": 12}
    plain = await client.completions.create(**given)
    frequency = await client.completions.create(**given, frequency_penalty=2)
    repetition = await client.completions.create(**given, extra_body={"repetition_penalty": 1.8})
    count = plain.choices[0].text.count("1")
    assert count >= 4
    assert frequency.choices[0].text.count("1") < count
    assert repetition.choices[0].text.count("1") < count


async def test_sixteen_streams_at_once_give_what_each_gives_alone(client: openai.AsyncOpenAI) -> None:
    async def ask(number: int) -> str:
        stream = await client.completions.create(
            model=MODEL,
            prompt=f"Fact {number} about the sea:" + " salt water" * (4 * number),
            seed=number,
            temperature=0.8,
            max_tokens=6,
            stream=True,
            extra_body={"deterministic": True},
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    together = await asyncio.gather(*(ask(number) for number in range(16)))
    assert all(together)
    assert together[3] == await ask(3)
    assert together[12] == await ask(12)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"logit_bias": {"999999": 1}}, "logit_bias", "invalid_value"),
        ({"max_tokens": 10**6}, "max_tokens", "context_length_exceeded"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "not_supported"),
        ({"extra_body": {"frobnicate": 1}}, "frobnicate", "invalid_value"),
    ],
)
async def test_bad_requests_name_the_field(
    client: openai.AsyncOpenAI, fields: dict[str, Any], param: str, code: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(**{"model": MODEL, "messages": QUESTION, **fields})
    assert (caught.value.param, caught.value.code, caught.value.type) == (param, code, "invalid_request_error")


async def test_an_unknown_model_is_not_found(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await client.chat.completions.create(model="gpt-none", messages=QUESTION)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


async def test_models_are_listed(client: openai.AsyncOpenAI) -> None:
    (model,) = [model async for model in client.models.list()]
    assert model.id == MODEL
    assert (await client.models.retrieve(MODEL)).id == MODEL


async def test_the_clients_own_timeout_frees_both_workers(client: openai.AsyncOpenAI, torch_cluster: Cluster) -> None:
    """The client gives up in the middle; a request after it is served as ever."""
    with pytest.raises(openai.APITimeoutError):
        await client.with_options(timeout=0.3).chat.completions.create(
            model=MODEL, messages=QUESTION, max_tokens=2000, extra_body={"ignore_eos": True}
        )
    answer = await client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=8)
    assert answer.choices[0].message.content


async def test_deterministic_requests_share_no_kv_with_ordinary_ones(client: openai.AsyncOpenAI) -> None:
    """Their kernels give other bits, so a shared block would undo the promise."""
    ask: Any = {"model": MODEL, "prompt": "a chain of their own " * 40, "max_tokens": 2, "temperature": 0}
    cached = []
    for extra in ({}, {"deterministic": True}, {"deterministic": True}):
        usage = (await client.completions.create(**ask, extra_body=extra)).usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        cached.append(usage.prompt_tokens_details.cached_tokens)
    assert cached[1] == 0
    assert cached[2] > 0
