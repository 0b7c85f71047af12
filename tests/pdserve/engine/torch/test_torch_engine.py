"""`LocalEngine` over the torch runner: continuous batching, n, prefix hits, and hand-over between two engines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch_engine_tools import make_reference, prompt

from pdserve.engine.base import ExportedChunk
from pdserve.engine.core.engine import LocalEngine
from pdserve.engine.memory import LocalMemory
from pdserve.engine.torch.engine import TorchEngineConfig, build_torch_engine
from pdserve.errors import ConfigError, InvalidRequest
from pdserve.types import FinishReason, Grammar, GrammarKind, Phase, Request, SamplingParams

Folder = Callable[[str], Path]


@pytest.fixture(scope="session")
def tiny(model_folder: Folder) -> Path:
    """A tiny model with a tokenizer of one token a character, as a complete folder."""
    folder = model_folder("llama")
    vocabulary = {f"<{i}>": i for i in range(3)} | {chr(32 + i): 3 + i for i in range(95)}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": i,
                "content": f"<{i}>",
                "special": True,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
            for i in range(3)
        ],
        "pre_tokenizer": None,
        "normalizer": None,
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def build(folder: Path, **changes: Any) -> LocalEngine:
    config = TorchEngineConfig(**{"model": str(folder), "dtype": "fp32", "num_blocks": 80, **changes})
    return build_torch_engine(config, LocalMemory)


def request(token_ids: list[int], name: str = "r", **params: Any) -> Request:
    deterministic = params.pop("deterministic", False)
    given = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, **params}
    return Request(name, "m", tuple(token_ids), SamplingParams(**given), deterministic=deterministic)


class Run:
    """Steps an engine and collects what each choice got."""

    def __init__(self, engine: LocalEngine) -> None:
        self.engine = engine
        self.tokens: dict[int, list[int]] = {}
        self.finishes: dict[int, Any] = {}
        self.exports: list[ExportedChunk] = []
        self.cached: dict[int, int] = {}

    def until_idle(self) -> Run:
        while self.engine.has_work():
            result = self.engine.step()
            for handle, token_id in zip(result.output.handles, result.output.token_ids, strict=True):
                self.tokens.setdefault(handle, []).append(token_id)
            self.finishes |= {finish.handle: finish for finish in result.output.finishes}
            self.cached |= {stats.handle: stats.num_cached_tokens for stats in result.output.prompts}
            self.exports += result.exports
        return self


def alone(folder: Path, wanted: Request, **changes: Any) -> dict[int, list[int]]:
    run = Run(build(folder, **changes))
    run.engine.submit(wanted, 0, Phase.FULL)
    return run.until_idle().tokens


def move(source: LocalEngine, target: LocalEngine, chunk: ExportedChunk, handle: int) -> None:
    """What the transports do: copy the chunk's blocks between the two memories."""
    place = target.import_blocks(handle, chunk.first_token, chunk.num_tokens)
    assert place is not None
    for i in range(place.num_cached_blocks, len(chunk.blocks)):
        target.memory.blocks[place.blocks[i]] = source.memory.blocks[chunk.blocks[i]]
    target.import_commit(handle, chunk.first_token, chunk.num_tokens)


def disaggregated(folder: Path, wanted: Request, **changes: Any) -> dict[int, list[int]]:
    """Prefill in one engine, decode in another; both have other work first."""
    prefill, decode = Run(build(folder, **changes)), Run(build(folder, **changes))
    for run, seed in ((prefill, 50), (decode, 60)):
        run.engine.submit(request(prompt(40, seed=seed), "other"), 500, Phase.FULL)
        run.until_idle()
    prefill.engine.submit(wanted, 0, Phase.PREFILL)
    decode.engine.submit(wanted, 0, Phase.DECODE)
    prefill.until_idle()
    for chunk in prefill.exports:
        move(prefill.engine, decode.engine, chunk, 0)
    n = wanted.params.n
    first = [prefill.tokens[handle] for handle in range(n)]
    decode.engine.resume(0, first, [handle in prefill.finishes for handle in range(n)])
    prefill.engine.export_release(0)
    decode.until_idle()
    assert prefill.engine.load().num_exported_blocks == 0
    return {handle: first[handle] + decode.tokens.get(handle, []) for handle in range(n)}


GRAMMAR = Grammar(GrammarKind.REGEX, "[a-f]{3}-[0-9]{6}!*")


@pytest.mark.parametrize("length", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("chunk", [8, 512])
def test_decode_goes_on_from_prefill_as_if_never_moved(length: int, chunk: int, tiny: Path) -> None:
    wanted = request(prompt(length, seed=length))
    assert disaggregated(tiny, wanted, chunk_tokens=chunk) == alone(tiny, wanted)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.9, "seed": 77},
        {"temperature": 1.2, "seed": 3, "top_p": 0.9, "top_k": 20, "min_p": 0.01},
        {"temperature": 0.8, "seed": 5, "presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
        {"temperature": 1.0, "seed": 9, "grammar": GRAMMAR},
        {"temperature": 1.0, "seed": 9, "min_tokens": 6, "ignore_eos": False, "logit_bias": ((2, 8.0),)},
        {"temperature": 1.0, "seed": 1, "n": 3},
    ],
    ids=["seeded", "filters", "penalties", "grammar", "min_tokens", "three_choices"],
)
def test_sampling_state_survives_the_move(params: dict[str, Any], tiny: Path) -> None:
    wanted = request(prompt(45, seed=4), **params)
    assert disaggregated(tiny, wanted, chunk_tokens=16) == alone(tiny, wanted)


def test_bf16_moves_bit_for_bit_when_deterministic(tiny: Path) -> None:
    wanted = request(prompt(150, seed=2), deterministic=True, temperature=1.0, seed=2, max_tokens=30)
    moved = disaggregated(tiny, wanted, dtype="bf16", chunk_tokens=37)
    assert moved == alone(tiny, wanted, dtype="bf16", chunk_tokens=512)


def test_a_wrong_block_changes_the_output(tiny: Path) -> None:
    wanted = request(prompt(60, seed=1))
    prefill, decode = Run(build(tiny)), Run(build(tiny))
    prefill.engine.submit(wanted, 0, Phase.PREFILL)
    decode.engine.submit(wanted, 0, Phase.DECODE)
    prefill.until_idle()
    prefill.engine.memory.blocks[prefill.exports[0].blocks[1]] = 0
    for chunk in prefill.exports:
        move(prefill.engine, decode.engine, chunk, 0)
    decode.engine.resume(0, [prefill.tokens[0]], [False])
    assert prefill.tokens[0] + decode.until_idle().tokens[0] != alone(tiny, wanted)[0]


def test_many_requests_together_get_what_each_gets_alone(tiny: Path) -> None:
    wanted = [request(prompt(7 + 13 * i, seed=i), f"r{i}", temperature=0.7 * (i % 2), seed=i) for i in range(9)]
    run = Run(build(tiny, chunk_tokens=20, max_num_batched_tokens=64, max_num_seqs=16))
    for i, one in enumerate(wanted):
        run.engine.submit(one, 10 * i, Phase.FULL)
    run.until_idle()
    for i, one in enumerate(wanted):
        assert run.tokens[10 * i] == alone(tiny, one)[0], f"request {i} differs"


def test_a_small_pool_preempts_and_loses_nothing(tiny: Path) -> None:
    wanted = [request(prompt(30, seed=i), f"r{i}", max_tokens=40) for i in range(5)]
    run = Run(build(tiny, num_blocks=14))
    for i, one in enumerate(wanted):
        run.engine.submit(one, i, Phase.FULL)
    run.until_idle()
    assert run.engine.load().num_preemptions > 0
    for i, one in enumerate(wanted):
        assert run.tokens[i] == alone(tiny, one)[0]


def test_a_second_request_finds_the_firsts_prefix(tiny: Path) -> None:
    run = Run(build(tiny))
    run.engine.submit(request(prompt(64)), 0, Phase.FULL)
    run.until_idle()
    run.engine.submit(request([*prompt(64), 5, 6, 7]), 1, Phase.FULL)
    run.until_idle()
    assert run.cached[1] == 64
    assert run.tokens[1] == alone(tiny, request([*prompt(64), 5, 6, 7]))[0]


def test_choices_differ_and_each_is_its_own_seeded_stream(tiny: Path) -> None:
    wanted = request(prompt(20), temperature=1.0, seed=4, n=4, max_tokens=10)
    tokens = alone(tiny, wanted)
    assert len({tuple(found) for found in tokens.values()}) == 4


def test_a_migrated_request_goes_on_after_its_outputs(tiny: Path) -> None:
    wanted = request(prompt(33), temperature=1.0, seed=6, grammar=GRAMMAR, presence_penalty=0.4)
    whole = alone(tiny, wanted)[0]
    run = Run(build(tiny))
    migrated = Request("m", "m", wanted.prompt_token_ids, wanted.params, output_token_ids=(tuple(whole[:5]),))
    run.engine.submit(migrated, 0, Phase.FULL)
    assert run.until_idle().tokens[0] == whole[5:]


def test_a_complete_grammar_ends_with_eos(tiny: Path) -> None:
    wanted = request(prompt(8), grammar=Grammar(GrammarKind.REGEX, "[a-c]{4}"), ignore_eos=False)
    run = Run(build(tiny))
    run.engine.submit(wanted, 0, Phase.FULL)
    run.until_idle()
    assert run.finishes[0].reason is FinishReason.STOP
    assert run.finishes[0].stop_token_id == 2
    assert len(run.tokens[0]) == 5


def test_a_bad_grammar_is_refused_and_leaves_nothing_behind(tiny: Path) -> None:
    engine = build(tiny)
    free = engine.load().num_free_blocks
    with pytest.raises(InvalidRequest, match="does not compile"):
        engine.submit(request([5], grammar=Grammar(GrammarKind.REGEX, "(")), 0, Phase.FULL)
    assert not engine.has_work()
    assert engine.load().num_free_blocks == free


def test_cancelled_requests_free_their_blocks_and_grammars(tiny: Path) -> None:
    engine = build(tiny)
    free = engine.load().num_free_blocks
    engine.submit(request(prompt(40), grammar=GRAMMAR, n=2), 0, Phase.FULL)
    engine.step()
    engine.step()
    engine.cancel(0)
    assert not engine.has_work()
    assert engine.load().num_free_blocks == free
    assert not engine._runner._grammars


def test_greedy_tokens_are_those_of_transformers(tiny: Path) -> None:
    reference = make_reference("llama")
    reference.generation_config.eos_token_id = None
    token_ids = prompt(90, seed=8)
    wanted = reference.generate(torch.tensor([token_ids]), do_sample=False, max_new_tokens=12)[0, 90:].tolist()
    assert alone(tiny, request(token_ids), chunk_tokens=32)[0] == wanted


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"dtype": "int3"}, "dtype"),
        ({"threads": 0}, "threads"),
        ({"device": "toaster"}, "device"),
        ({"model": "/no/such/model"}, "model"),
        ({"num_blocks": None, "kv_bytes": 10}, "kv_bytes"),
        ({"max_model_len": 100_000}, "max_model_len"),
    ],
)
def test_a_wrong_setting_is_named(changes: dict[str, Any], key: str, tiny: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        build(tiny, **changes)
    assert caught.value.key == key


def test_a_missing_cuda_device_is_named(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="torch sees"):
        build(tiny, device="cuda:99")
