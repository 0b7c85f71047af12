"""A prefill and a decode worker whose KV lies on the GPU: parity, overlap and speed of the hand-over.

By each transport that can be had. `engine=torch, device=cuda` stages blocks through host memory, which the transports
register; `nccl` refuses two ranks on one device, so it needs two. With `pytest -m gpu tests/gpu -s` the speed is
printed; it is never asserted.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "worker_core"))

from session_client import PairRequest, RouterSession
from worker_pair import make_request, until
from worker_process import worker_process

from kvstore.transports.registry import NAMES, OPTIONAL, make_transport
from pdserve.errors import ConfigError
from pdserve.types import Phase

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: torch.cuda.is_available() is false"),
]

CONFIG: dict[str, Any] = {
    "engine": "torch",
    "device": "cuda",
    "dtype": "fp32",
    "num_blocks": 2048,
    "chunk_tokens": 256,
    "deterministic": True,
}
PROMPT = 6_000


@pytest.fixture(params=(*NAMES, *OPTIONAL))
def transport(request: pytest.FixtureRequest) -> str:
    if request.param == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("nccl needs two devices")
    try:
        make_transport(request.param).close()
    except ConfigError as error:
        pytest.skip(error.message)
    return str(request.param)


def devices(transport: str) -> tuple[str, str]:
    return ("cuda:0", "cuda:1") if transport == "nccl" else ("cuda:0", "cuda:0")


async def test_a_pair_on_the_gpu_gives_one_workers_tokens_and_overlaps(transport: str) -> None:
    first, second = devices(transport)
    async with (
        worker_process("prefill", transports=[transport], **{**CONFIG, "device": first}) as p,
        worker_process("decode", transports=[transport], **{**CONFIG, "device": second}) as d,
    ):
        prefill, decode = await RouterSession.open(p.address), await RouterSession.open(d.address)
        request = make_request(length=PROMPT, max_tokens=32)
        alone = await prefill.submit(make_request("alone", length=PROMPT, max_tokens=32), Phase.FULL).result()
        handed = PairRequest(prefill, decode, request).start()
        await until(lambda: len(handed.first.announcements) >= 2)
        assert not handed.first.tokens[0], "chunks are announced while prefill computes the next"
        assert await handed.result() == alone
        _, text = await d.get("/metrics")
        moved, seconds = (sample(text, f"{name}{{transport=\"{transport}\"}}") for name in (
            "pdserve_kv_pulled_bytes_total", "pdserve_kv_pull_seconds_sum",
        ))  # fmt: skip
        print(f"{transport}: {moved / 1e6:.0f} MB in pulls of {moved / seconds / 1e9:.2f} GB/s")
        await prefill.close()
        await decode.close()


def sample(text: str, name: str) -> float:
    return next(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))
