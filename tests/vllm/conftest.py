from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

pytest.importorskip("vllm", reason="needs the environment of `make test-vllm`")

from vllm_pair import Driven, Pair, running_engine


@pytest.fixture(scope="session")
def prefill() -> Iterator[Driven]:
    """Fails a request whose KV cannot be loaded."""
    with running_engine(load_failure="fail") as engine:
        yield engine


@pytest.fixture(scope="session")
def decode() -> Iterator[Driven]:
    """Computes anew what cannot be loaded."""
    with running_engine(load_failure="recompute") as engine:
        yield engine


@pytest.fixture
def pair(prefill: Driven, decode: Driven) -> Iterator[Pair]:
    """Both engines; after the test nothing of it may be left in either."""
    yield Pair(prefill, decode)
    prefill.settle()
    decode.settle()
