"""NVIDIA Dynamo as a peer of the router benchmark: its frontend before its own mock engines, as its makers ship them.

The frontend tokenises and detokenises; discovery is by files, requests go by TCP, events by ZeroMQ, so neither etcd nor
NATS is needed. The mock engines answer at a multiple of a real engine's speed that nothing can follow, or with a decode
pace of about the load's: `--speedup-ratio` scales their timing table.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from pdserve.models import resolve
from pdserve.tokens import Tokenizer

PYTHON = Path(__file__).parents[2] / ".venv-dynamo" / "bin" / "python"
PLANES = ["--discovery-backend", "file", "--request-plane", "tcp", "--event-plane", "zmq"]


@dataclass(frozen=True)
class DynamoMode:
    """One way of running it."""

    name: str
    router_mode: str
    tokenizer: str = "default"
    disaggregated: bool = False


MODES = (
    DynamoMode("dynamo", "round-robin"),
    DynamoMode("dynamo_fast", "round-robin", tokenizer="fastokens"),
    DynamoMode("dynamo_kv", "kv"),
    DynamoMode("dynamo_kv_pd", "kv", disaggregated=True),
    DynamoMode("dynamo_kv_pd_fast", "kv", tokenizer="fastokens", disaggregated=True),
)


def model_folder(folder: Path) -> Path:
    """The embedded model's tokenizer, template and shape, as a Hugging Face folder without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    resolved = resolve("embedded")
    tokenizer = Tokenizer.load(resolved.path)
    (folder / "tokenizer.json").write_text(tokenizer.backend.to_str())
    assert tokenizer.chat_template is not None
    (folder / "chat_template.jinja").write_text(tokenizer.chat_template.source)
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**special, "unk_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    shape = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "intermediate_size": 1536,
        "max_position_embeddings": 8192, "vocab_size": 49152, "bos_token_id": 1, "eos_token_id": 2,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(shape))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    return folder


def environment(folder: Path) -> dict[str, str]:
    """Of all its processes. `folder` is where they find each other."""
    return {**os.environ, "DYN_FILE_KV": str(folder), "HF_HUB_OFFLINE": "1", "DYN_LOG": "warn", "QA": "1"}


def frontend(mode: DynamoMode, port: int) -> list[str]:
    command = [str(PYTHON), "-m", "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", str(port)]
    return [*command, "--router-mode", mode.router_mode, "--tokenizer", mode.tokenizer, *PLANES]


def engines(mode: DynamoMode, model: Path, speedup: float, bootstrap_port: int) -> list[list[str]]:
    """Commands of the mock engines: two workers, or two of each kind."""
    command = [
        str(PYTHON), "-m", "dynamo.mocker", "--model-path", str(model), "--model-name", "smol", "--num-workers", "2",
        "--speedup-ratio", f"{speedup:g}", "--block-size", "16", "--num-gpu-blocks-override", "65536", *PLANES,
    ]  # fmt: skip
    if not mode.disaggregated:
        return [command]
    ports = f"{bootstrap_port},{bootstrap_port + 1}"
    prefill = [*command, "--disaggregation-mode", "prefill", "--bootstrap-ports", ports]
    return [prefill, [*command, "--disaggregation-mode", "decode"]]
