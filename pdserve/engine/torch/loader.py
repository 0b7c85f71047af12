"""Weights from a folder of safetensors or a GGUF file, as the model uses them: one dtype, fused, nothing kept twice.

Both sources are seen as one `Source`: HF's tensor names to tensors. A layer is read, converted, fused and packed
before the next is touched, so that peak memory stays near the size of the result.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from pdserve.engine.torch.layers import LayerWeights, Linear
from pdserve.engine.torch.model import Decoder, Weights
from pdserve.engine.torch.rope import RopeTable
from pdserve.engine.torch.shape import ModelShape, shape_from_gguf, shape_from_hf
from pdserve.errors import ConfigError, NotSupported
from pdserve.gguf_metadata import GGUFFile, TensorInfo, read_gguf

_UNQUANTISED: dict[int, np.dtype[Any]] = {0: np.dtype(np.float32), 1: np.dtype(np.float16)}
"""ggml's numbers of plain types; the others go through the `gguf` package."""
_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class Source(Protocol):
    """Tensors by HF's names."""

    def __contains__(self, name: object) -> bool: ...

    def get(self, name: str) -> Tensor:
        """Raises `ConfigError` when there is none of that name."""
        ...


def load_decoder(path: Path, max_model_len: int, dtype: torch.dtype, device: torch.device) -> Decoder:
    """From a folder (config.json and *.safetensors) or a .gguf file. Raises `NotSupported` for a shape that we don't
    compute, `ConfigError` (key "model") for files that are missing or damaged."""
    if path.is_dir():
        config = _read_json(path / "config.json")
        shape, source = shape_from_hf(config, max_model_len), SafetensorsSource(path)
        return _decoder(shape, source, dtype, device)
    gguf = read_gguf(path)
    shape = shape_from_gguf(gguf, max_model_len)
    return _decoder(shape, GGUFSource(gguf, shape), dtype, device)


# --- from names to a model ---


def _decoder(shape: ModelShape, source: Source, dtype: torch.dtype, device: torch.device) -> Decoder:
    def fetch(name: str) -> Tensor:
        return source.get(name).to(device, dtype)

    embedding = fetch("model.embed_tokens.weight")
    head = embedding if shape.tied else fetch("lm_head.weight")
    layers = tuple(_layer(shape, source, fetch, index) for index in range(shape.num_layers))
    weights = Weights(
        embedding=embedding,
        layers=layers,
        final_norm=fetch("model.norm.weight"),
        head=Linear(head, pack=True),
    )
    return Decoder(shape, weights, RopeTable(shape.rope, shape.max_model_len, dtype, device))


def _layer(shape: ModelShape, source: Source, fetch: Callable[[str], Tensor], index: int) -> LayerWeights:
    prefix = f"model.layers.{index}."

    def linear(*names: str) -> Linear:
        weights = [fetch(f"{prefix}{name}.weight") for name in names]
        biases = [fetch(f"{prefix}{name}.bias") for name in names if f"{prefix}{name}.bias" in source]
        if biases and len(biases) != len(names):
            raise NotSupported(f"{prefix}: biases for some of {', '.join(names)} but not all", param="model")
        return Linear(torch.cat(weights), torch.cat(biases) if biases else None)

    def norm(name: str) -> Tensor:
        return fetch(f"{prefix}{name}.weight")

    return LayerWeights(
        attn_norm=norm("input_layernorm"),
        qkv=linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        out=linear("self_attn.o_proj"),
        mlp_norm=norm("post_attention_layernorm"),
        gate_up=linear("mlp.gate_proj", "mlp.up_proj"),
        down=linear("mlp.down_proj"),
        q_norm=norm("self_attn.q_norm") if shape.qk_norm else None,
        k_norm=norm("self_attn.k_norm") if shape.qk_norm else None,
    )


# --- safetensors ---


class SafetensorsSource:
    """A folder; files stay mapped until the source goes."""

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self._folder = folder
        self._file_of: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                file = safe_open(str(path), framework="pt")
            except (OSError, SafetensorError) as error:
                raise ConfigError(f"{path} is not a whole safetensors file; fetch it again", key="model") from error
            self._file_of |= dict.fromkeys(list(file.keys()), file)  # type: ignore[no-untyped-call]

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def get(self, name: str) -> Tensor:
        if name not in self._file_of:
            raise ConfigError(f"{self._folder} has no tensor {name}; a shard may be missing", key="model")
        tensor: Tensor = self._file_of[name].get_tensor(name)
        return tensor


# --- GGUF ---


class GGUFSource:
    """A GGUF file, dequantised tensor by tensor."""

    def __init__(self, gguf: GGUFFile, shape: ModelShape) -> None:
        self._shape = shape
        self._path = gguf.path
        self._tensors = {tensor.name: tensor for tensor in gguf.tensors}
        self._data = np.memmap(gguf.path, np.uint8, mode="r")

    def __contains__(self, name: object) -> bool:
        return _gguf_name(str(name)) in self._tensors

    def get(self, name: str) -> Tensor:
        tensor = self._tensors.get(_gguf_name(name))
        if tensor is None:
            raise ConfigError(f"{self._path} has no tensor {_gguf_name(name)}", key="model")
        values = self._values(tensor)
        if self._shape.family == "llama" and ("q_proj" in name or "k_proj" in name):
            values = _unpermute(values, self._shape.num_heads if "q_proj" in name else self._shape.num_kv_heads)
        return values

    def _values(self, tensor: TensorInfo) -> Tensor:
        """The tensor in float32."""
        if tensor.ggml_type in _UNQUANTISED:
            dtype = _UNQUANTISED[tensor.ggml_type]
            raw = self._bytes(tensor, int(np.prod(tensor.shape)) * dtype.itemsize)
            return torch.from_numpy(raw.view(dtype).reshape(tensor.shape).astype(np.float32))
        kind = GGMLQuantizationType(tensor.ggml_type)
        if kind is GGMLQuantizationType.Q4_1:
            return _dequantise_q4_1(self._bytes(tensor, int(np.prod(tensor.shape)) // 32 * 20), tensor.shape)
        return self._dequantised(tensor, kind)

    def _dequantised(self, tensor: TensorInfo, kind: GGMLQuantizationType) -> Tensor:
        from gguf.constants import GGML_QUANT_SIZES

        block, size = GGML_QUANT_SIZES[kind]
        raw = self._bytes(tensor, int(np.prod(tensor.shape)) // block * size)
        try:
            values = dequantize(raw.reshape(*tensor.shape[:-1], -1), kind)
        except NotImplementedError as error:
            raise NotSupported(f"GGUF quantisation {kind.name} is not supported", param="model") from error
        return torch.from_numpy(np.ascontiguousarray(values.reshape(tensor.shape), dtype=np.float32))

    def _bytes(self, tensor: TensorInfo, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        if tensor.offset + size > len(self._data):
            raise ConfigError(f"{self._path} ends before its tensor {tensor.name}; fetch it again", key="model")
        return self._data[tensor.offset : tensor.offset + size]


def _gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, index, inner = stem.split(".", 3)
        return f"blk.{index}.{_GGUF_NAMES[inner]}.{kind}"
    return f"{_GGUF_NAMES[stem]}.{kind}"


def _unpermute(values: Tensor, num_heads: int) -> Tensor:
    """llama.cpp stores the rows of q and k so that rotary pairs are neighbours; HF's rotate-half has them half a head
    apart (`LlamaModel.permute` in convert_hf_to_gguf.py, turned round)."""
    pairs = values.view(num_heads, values.shape[0] // num_heads // 2, 2, *values.shape[1:])
    return pairs.transpose(1, 2).reshape(values.shape)


def _dequantise_q4_1(raw: np.ndarray[Any, np.dtype[np.uint8]], shape: tuple[int, ...]) -> Tensor:
    """Blocks of 32 values: float16 scale and minimum, then 16 bytes whose low nibbles are the first 16 values. The
    embedded model's type, written out because it is four times as fast as the package's general way."""
    blocks = torch.from_numpy(raw.reshape(-1, 20).copy())
    scale_min = blocks[:, :4].contiguous().view(torch.float16).float()
    nibbles = torch.cat((blocks[:, 4:] & 15, blocks[:, 4:] >> 4), 1).float()
    return nibbles.mul_(scale_min[:, :1]).add_(scale_min[:, 1:]).view(shape)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} is missing or not valid JSON: {error}", key="model") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{file} holds no JSON object", key="model")
    return loaded
