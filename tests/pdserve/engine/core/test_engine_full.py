"""Requests that run in one engine from prompt to end."""

from pdserve.types import FinishReason


def prompt_of(length, first=1):
    return [(first + 3 * i) % 47 for i in range(length)]


def test_tokens_are_those_of_an_engine_alone(bench, alone):
    b = bench()
    request = b.submit(prompt_of(10), max_tokens=12)
    said = b.drain()
    assert said.tokens[0] == alone(request)[0]
    assert said.finishes[0].reason is FinishReason.LENGTH
    assert said.finishes[0].num_output_tokens == 12
    b.assert_empty()
