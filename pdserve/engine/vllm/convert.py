"""Turns a GGUF (the embedded model is one) into the folder that vLLM loads: safetensors, config and tokenizer.

vLLM wants a Hugging Face folder. `save_pretrained` refuses a model that was read from a GGUF ("quantized with
gguf"), so the dequantised tensors are copied into a fresh model of the same config, which saves as any other.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pdserve.errors import ConfigError
from pdserve.models import DEFAULT_CACHE_DIR, ResolvedModel


def model_folder(resolved: ResolvedModel, cache_dir: Path = DEFAULT_CACHE_DIR) -> Path:
    """The model as a folder: itself, or the conversion of its GGUF, made once (20 s for the embedded model).

    Raises `ConfigError` when what reads GGUFs is not installed.
    """
    if resolved.kind == "folder":
        return resolved.path
    folder = cache_dir.expanduser() / f"{resolved.revision}-safetensors"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        _convert(resolved.path, folder)
    return folder


def _convert(source: Path, target: Path) -> None:
    """Write `target` whole or not at all: it is filled under another name, then renamed; who is second gives way."""
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ConfigError("a GGUF on vLLM needs transformers (and accelerate, gguf) installed", key="model") from error
    folder, name = str(source.parent), source.name
    try:
        read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    except ImportError as error:
        raise ConfigError(f"a GGUF on vLLM needs more packages: {error}", key="model") from error
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(read.state_dict())
    unfinished = target.with_name(f"{target.name}.{os.getpid()}")
    plain.save_pretrained(unfinished)
    AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(unfinished)
    _settle(unfinished, target)


def _settle(unfinished: Path, target: Path) -> None:
    try:
        unfinished.rename(target)
    except OSError:
        if not (target / "config.json").exists():
            raise
        shutil.rmtree(unfinished)
