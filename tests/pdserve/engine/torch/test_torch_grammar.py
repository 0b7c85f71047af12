"""Grammars over a byte vocabulary: what they allow, when they end, what doesn't compile, and coming back to one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch_engine_tools import Driver, outputs, prompt, resolved

from pdserve.engine.torch.engine import build_runner
from pdserve.engine.torch.grammar import GrammarCompiler
from pdserve.engine.torch.runner import TorchRunner
from pdserve.errors import InvalidRequest
from pdserve.types import Grammar, GrammarKind

EOS = 2
FIRST_CHAR = 3
CHARS = [chr(code) for code in range(32, 127)] + ["\n"]
VOCABULARY = [b"", b"", b"", *[char.encode() for char in CHARS]]
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 4}, "age": {"type": "integer", "maximum": 9}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)


def ids(text: str) -> list[int]:
    return [FIRST_CHAR + CHARS.index(char) for char in text]


def text(token_ids: list[int]) -> str:
    return b"".join(VOCABULARY[token_id] if token_id < len(VOCABULARY) else b"" for token_id in token_ids).decode()


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(VOCABULARY, 160, [EOS])


@pytest.fixture
def runner(model_folder: Callable[[str], Any]) -> TorchRunner:
    """A tiny model whose tokens are characters."""
    built = build_runner(resolved(model_folder("llama")), dtype="fp32")
    built._vocabulary = lambda: VOCABULARY
    built.allocate(96, None)
    return built


def regex(source: str) -> Grammar:
    return Grammar(GrammarKind.REGEX, source)


def allowed_text(compiler: GrammarCompiler, grammar: Grammar, so_far: str) -> set[str]:
    matcher = compiler.matcher(grammar)
    matcher.read(ids(so_far))
    found = np.flatnonzero(matcher.allowed()).tolist()
    return {"EOS" if token_id == EOS else text([token_id]) for token_id in found}


def test_a_regex_allows_what_can_follow(compiler: GrammarCompiler) -> None:
    assert allowed_text(compiler, regex("ab?[0-2]"), "") == {"a"}
    assert allowed_text(compiler, regex("ab?[0-2]"), "a") == {"b", "0", "1", "2"}


def test_eos_alone_follows_a_complete_text(compiler: GrammarCompiler) -> None:
    assert allowed_text(compiler, regex("ab"), "ab") == {"EOS"}


def test_eos_is_one_choice_where_the_text_may_end_or_go_on(compiler: GrammarCompiler) -> None:
    assert allowed_text(compiler, regex("ab*"), "ab") == {"b", "EOS"}


def test_special_tokens_and_padding_are_never_allowed(compiler: GrammarCompiler) -> None:
    allowed = compiler.matcher(regex("(.|\n)+")).allowed()
    assert not allowed[[0, 1, EOS]].any()
    assert not allowed[len(VOCABULARY) :].any()


def test_eos_stays_the_only_token_after_eos(compiler: GrammarCompiler) -> None:
    matcher = compiler.matcher(regex("a"))
    matcher.read([*ids("a"), EOS])
    assert np.flatnonzero(matcher.allowed()).tolist() == [EOS]


def test_outputs_that_break_the_grammar_are_refused(compiler: GrammarCompiler) -> None:
    with pytest.raises(InvalidRequest, match=r"output 1 .* does not match"):
        compiler.matcher(regex("ab")).read(ids("ax"))


@pytest.mark.parametrize(
    "grammar",
    [
        regex("[a"),
        regex("(?=a)b"),
        Grammar(GrammarKind.JSON_SCHEMA, "{nope"),
        Grammar(GrammarKind.JSON_SCHEMA, '{"type": "nope"}'),
        Grammar(GrammarKind.JSON_SCHEMA, "[]"),
        Grammar(GrammarKind.JSON_SCHEMA, '{"$ref": "#/nowhere"}'),
    ],
)
def test_what_does_not_compile_is_the_callers_error(compiler: GrammarCompiler, grammar: Grammar) -> None:
    with pytest.raises(InvalidRequest, match=r"the grammar does not compile: [^\[]") as caught:
        compiler.matcher(grammar)
    assert caught.value.param == "response_format"


def test_compiled_grammars_are_remembered_and_bounded(compiler: GrammarCompiler) -> None:
    first = compiler.matcher(regex("x{1}"))
    for number in range(100):
        compiler.matcher(regex(f"y{{{number + 1}}}"))
    assert len(compiler._compiled) == 64
    assert np.flatnonzero(first.allowed()).tolist() == ids("x")


# --- through a model with random weights, which obeys nothing else ---


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 4}])
def test_outputs_match_the_schema(runner: TorchRunner, params: dict[str, Any]) -> None:
    driver = Driver(runner)
    seq = driver.start(prompt(9), grammar=Grammar(GrammarKind.JSON_SCHEMA, SCHEMA), **params)
    driver.finish_prompt(seq)
    while seq.token_ids[-1] != EOS and seq.num_output_tokens < 150:
        driver.step([driver.item(seq)])
    found = json.loads(text(outputs(seq)))
    assert set(found) == {"name", "age"}
    assert len(found["name"]) <= 4


def test_a_json_object_may_hold_anything(compiler: GrammarCompiler) -> None:
    matcher = compiler.matcher(Grammar(GrammarKind.JSON_OBJECT))
    matcher.read(ids('{"a": [1, {"b": null}], "c": "d"}'))
    assert matcher.allowed()[EOS]


def test_a_constrained_row_leaves_its_neighbours_alone(runner: TorchRunner) -> None:
    driver = Driver(runner)
    alone = driver.generate(driver.start(prompt(12)), 8)
    free, bound = driver.start(prompt(12)), driver.start(prompt(20), grammar=regex("[ab]{8}"))
    driver.step([driver.item(free), driver.item(bound)])
    for _ in range(7):
        driver.step([driver.item(free), driver.item(bound)])
    assert outputs(free) == alone
    assert re.fullmatch("[ab]{8}", text(outputs(bound)))


def test_a_resumed_choice_goes_on_where_its_outputs_stand(runner: TorchRunner) -> None:
    grammar = regex("(ab|cd)[0-9]{3}(x|y)")
    driver = Driver(runner)
    whole = driver.start(prompt(10), grammar=grammar, temperature=1.0, seed=8)
    driver.generate(whole, 6)
    resumed = driver.start(prompt(10), grammar=grammar, temperature=1.0, seed=8)
    resumed.token_ids += outputs(whole)[:3]
    runner.open(resumed)
    driver.generate(resumed, 6)
    assert outputs(resumed) == outputs(whole)
    assert re.fullmatch("(ab|cd)[0-9]{3}(x|y)", text(outputs(whole)))


def test_a_broken_resume_fails_that_choice_alone(runner: TorchRunner) -> None:
    driver = Driver(runner)
    good, bad = driver.start(prompt(5)), driver.start(prompt(5), grammar=regex("a+"))
    bad.token_ids += ids("b")
    items = [driver.item(good), driver.item(bad)]
    found = runner.run(items)
    assert found[0].error is None
    assert isinstance(found[1].error, InvalidRequest)


def test_a_complete_grammar_outranks_min_tokens(runner: TorchRunner) -> None:
    driver = Driver(runner)
    seq = driver.start(prompt(5), grammar=regex("a"), min_tokens=5)
    assert driver.generate(seq, 2) == [*ids("a"), EOS]


def test_forgotten_state_is_rebuilt(runner: TorchRunner) -> None:
    driver = Driver(runner)
    seq = driver.start(prompt(5), grammar=regex("abcd"))
    driver.generate(seq, 2)
    runner.drop(seq)
    runner.drop(seq)
    driver.generate(seq, 4)
    assert text(outputs(seq)) == "abcd"


def test_a_grammar_that_does_not_compile_is_refused_at_open(runner: TorchRunner) -> None:
    with pytest.raises(InvalidRequest):
        Driver(runner).start(prompt(5), grammar=regex("(unclosed"))
    assert torch.isfinite(runner.kv.pool).all()
