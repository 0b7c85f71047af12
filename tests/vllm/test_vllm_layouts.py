"""KV layouts on tiny random models: each is supported, and then gives the tokens of one vLLM, or refused by name."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny_models import tiny_model
from vllm_pair import Driven, SelfPair, keys_of, make_request, renamed, running_engine

from pdserve.engine.vllm.model import _transfer_config, plan_model
from pdserve.engine.vllm.settings import VllmSettings
from pdserve.errors import ConfigError
from pdserve.types import Phase, Request

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

BESIDE = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}
LAYOUTS: dict[str, tuple[str, dict[str, object]]] = {
    "gemma3": ("sliding window in some layers", {"max_model_len": 512}),
    "mistral": ("full attention", {"max_model_len": 256, "kv_transfer_config": BESIDE}),
    "deepseek": ("MLA", {"max_model_len": 512, "attention_backend": "CPU_MLA", "max_num_batched_tokens": 512}),
}
"""Name of the layout that a tiny model has with these engine arguments. Mistral's window is as long as the context;
it runs beside NIXL's connector, as those do who have decode workers of another make.
vLLM's reference kernels for MLA on CPU take no prompt in parts: neither chunks nor a cached prefix."""
REFUSED = {"mistral": "sliding window in all layers", "jamba": "hybrid", "mamba": "state space (mamba)"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def change() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module", params=LAYOUTS)
def engine(request: pytest.FixtureRequest, models: Path, change: pytest.MonkeyPatch) -> Iterator[Driven]:
    """Without digests: what is wrong must show in the tokens."""
    _, arguments = LAYOUTS[request.param]
    if "kv_transfer_config" in arguments:
        pytest.importorskip("nixl")
        change.setenv("UCX_TLS", "tcp,self")
        change.setenv("VLLM_NIXL_SIDE_CHANNEL_PORT", str(free_port()))
    engine_args = {
        "enforce_eager": True,
        "max_num_batched_tokens": 64,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 64 << 20,
        **arguments,
    }
    model = str(tiny_model(request.param, models))
    with running_engine(model=model, staging_bytes=32 << 20, verify_loads=False, engine_args=engine_args) as engine:
        yield engine


@pytest.mark.parametrize("name", REFUSED)
def test_a_layout_that_is_not_supported_is_refused_by_name_before_anything_starts(models: Path, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_model(VllmSettings(model=str(tiny_model(name, models))))
    assert caught.value.key == "model"
    assert f"{REFUSED[name]!r}" in caught.value.message


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_supported_layout_is_known_by_its_name(models: Path, name: str) -> None:
    layout, arguments = LAYOUTS[name]
    arguments = {key: value for key, value in arguments.items() if key != "kv_transfer_config"}
    plan = plan_model(VllmSettings(model=str(tiny_model(name, models)), engine_args=arguments))
    assert plan.shape.layout == layout


@pytest.mark.parametrize("several", [False, True])
def test_connectors_of_the_user_run_beside_ours(several: bool) -> None:
    given = BESIDE
    if several:
        children = [BESIDE, {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}]
        given = {"kv_connector": "MultiConnector", "kv_connector_extra_config": {"connectors": children}}
    settings = VllmSettings(model="m", load_failure="recompute", engine_args={"kv_transfer_config": given})
    made = _transfer_config(settings, {"board": "here"})
    first, *others = made.kv_connector_extra_config["connectors"]
    assert (made.kv_connector, made.kv_load_failure_policy) == ("MultiConnector", "recompute")
    assert first["kv_connector_extra_config"] == {"board": "here"}
    assert [other["kv_connector"] for other in others] == ["NixlConnector", "OffloadingConnector"][: 1 + several]


def limit_of(engine: Driven) -> int:
    return engine.engine.model.max_model_len


def trace(engine: Driven, *handles: int) -> list[tuple[int, float]]:
    """Tokens and their logprobs, prefill's and decode's joined."""
    tokens = [token for handle in handles for token in engine.tokens[handle]]
    return list(zip(tokens, [entry.logprob for handle in handles for entry in engine.logprobs[handle]], strict=True))


def trace_alone(engine: Driven, request: Request) -> list[tuple[int, float]]:
    handle = engine.submit(renamed(request, "alone " + request.request_id), Phase.FULL)
    engine.run_until(lambda: handle in engine.finishes)
    return trace(engine, handle)


def trace_moved(engine: Driven, request: Request, before_resume: Callable[[int], None]) -> list[tuple[int, float]]:
    handle = engine._next_handle
    SelfPair(engine, engine).run(request, before_resume=before_resume)
    return trace(engine, handle, handle + 1)


def alike(engine: Driven, found: list[tuple[int, float]], expected: list[tuple[int, float]]) -> bool:
    """vLLM's CPU kernels for MLA compute the last prompt token otherwise in decode than in prefill (so do one vLLM's
    own tokens differ if it is asked to go on after its first output): near ties may part."""
    latent = engine.engine.layout.order.startswith("layer,latent")
    count, tolerance = (3, 0.1) if latent else (12, 1e-3)
    pairs = zip(found[:count], expected[:count], strict=True)
    return all(a[0] == b[0] and abs(a[1] - b[1]) < tolerance for a, b in pairs)


def test_a_prompt_that_moves_gives_the_same_tokens(engine: Driven) -> None:
    for length in (5, 64, 100, limit_of(engine) - 30):
        request = make_request(f"layout {length}", length, 12, logprobs=0)
        expected = trace_alone(engine, request)
        assert alike(engine, trace_moved(engine, request, lambda handle: None), expected), length
    engine.settle()


def test_what_a_store_brings_gives_the_same_tokens(engine: Driven) -> None:
    """Also where vLLM caches no prefixes: there nothing is published, and nothing taken."""
    request = make_request("written", 150, 12)
    engine.keeps = {}
    expected = engine.run_alone(request)[0]
    content, engine.keeps = engine.keeps, None
    reader = renamed(request, "read")
    handle, own = engine._next_handle, dict(zip(keys_of(reader), map(content.get, keys_of(request)), strict=True))
    if content:
        engine.engine.cache_commit(handle, len(engine.fill(handle, keys_of(reader)[:8], own).blocks))
    else:
        assert engine.engine.cache_open(handle, keys_of(reader)) is None
    engine.submit(reader, Phase.FULL)
    engine.run_until(lambda: handle in engine.finishes)
    assert [engine.tokens[handle]] == expected
    assert engine.prompts[handle].num_fetched_tokens == (128 if content else 0)
    engine.settle()


def test_a_wrong_block_shows_in_the_tokens(engine: Driven) -> None:
    """Or the tests above would prove nothing."""

    def spoil(handle: int) -> None:
        target = engine.engine.import_blocks(handle, 0, 150)
        assert target is not None
        engine.pool.blocks[target.blocks[2]].view(np.float32)[:] *= 3

    request = make_request("wrong", 150, 12, logprobs=0)
    expected = trace_alone(engine, request)
    assert not alike(engine, trace_moved(engine, request, spoil), expected)
    engine.settle()
