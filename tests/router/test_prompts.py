"""Prompts on their way to tokens: on the loop or, when long, in a thread; the same tokens either way."""

from __future__ import annotations

import asyncio

import pytest

from pdserve.errors import InvalidRequest, Overloaded
from pdserve.models import model_info, resolve
from pdserve.tokens import Tokenizer
from pdserve.types import SamplingParams
from router.base import ChatMessage, Incoming
from router.prompts import LONG_CHARS, MAX_IN_THREAD, Bounds, PromptMaker

RESOLVED = resolve("embedded")
TOKENIZER = Tokenizer.load(RESOLVED.path)
BOUNDS = Bounds(model_info(RESOLVED), 8192)
LONG = "The quick brown fox, 42 times.\n" * (LONG_CHARS // 31 + 1)


@pytest.fixture
def maker():
    made = PromptMaker(TOKENIZER, 16, b"secret")
    yield made
    made.close()


def incoming(**prompt):
    return Incoming("x", "m", SamplingParams(max_tokens=4), **prompt)


def chat(text):
    return incoming(messages=(ChatMessage("user", "hi"), ChatMessage("assistant", "ho"), ChatMessage("user", text)))


async def test_a_short_prompt_is_not_worth_a_thread(maker):
    loop = asyncio.get_running_loop()
    assert maker.prepare(chat("hi"), loop) is None
    assert maker.prepare(incoming(text="x" * (LONG_CHARS - 1)), loop) is None
    assert maker.prepare(incoming(token_ids=(1,) * (2 * LONG_CHARS)), loop) is None


@pytest.mark.parametrize("prompt", [chat(LONG), incoming(text=LONG), incoming(text=LONG, add_special_tokens=False)])
async def test_a_long_prompt_becomes_the_same_request_in_a_thread(maker, prompt):
    for _ in range(2):
        prepared = await maker.prepare(prompt, asyncio.get_running_loop())
        assert prepared.messages is None
        assert prepared.text is None
        in_thread, on_loop = maker.request(prepared, BOUNDS), maker.request(prompt, BOUNDS)
        assert in_thread.prompt_token_ids == on_loop.prompt_token_ids
        assert in_thread.block_keys == on_loop.block_keys


async def test_a_fault_found_in_the_thread_is_the_prompts(maker):
    with pytest.raises(InvalidRequest) as caught:
        await maker.prepare(incoming(text=LONG + "\ud800"), asyncio.get_running_loop())
    assert caught.value.param == "prompt"


async def test_the_thread_has_a_queue_with_an_end(maker):
    loop = asyncio.get_running_loop()
    waiting = [maker.prepare(incoming(text=LONG), loop) for _ in range(MAX_IN_THREAD)]
    with pytest.raises(Overloaded):
        maker.prepare(incoming(text=LONG), loop)
    for each in waiting[1:]:
        each.cancel()
    assert (await waiting[0]).token_ids
    await asyncio.gather(*waiting, return_exceptions=True)
    assert (await maker.prepare(incoming(text=LONG), loop)).token_ids


def test_what_is_filled_in_leaves_the_other_parameters_alone(maker):
    given = SamplingParams(temperature=0.5, stop=("a",), logit_bias=((3, 1.0),), min_tokens=1)
    request = maker.request(Incoming("x", "m", given, text="hi"), BOUNDS)
    assert request.params.max_tokens == BOUNDS.max_len - len(request.prompt_token_ids)
    assert request.params.seed is not None
    for name in SamplingParams.__struct_fields__:
        if name not in ("max_tokens", "seed"):
            assert getattr(request.params, name) == getattr(given, name)
    assert request.params == SamplingParams(
        temperature=0.5, stop=("a",), logit_bias=((3, 1.0),), min_tokens=1,
        max_tokens=request.params.max_tokens, seed=request.params.seed,
    )  # fmt: skip
