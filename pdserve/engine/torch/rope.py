"""Rotary position embedding: one table of cosines and sines per model, made at load.

A table, not a computation per step, so that a position's values have the same bits whatever batch they are used in.
The scalings follow the papers as Hugging Face's `modeling_rope_utils.py` implements them, since configs are written
against that.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pdserve.engine.torch.shape import RopeShape


class RopeTable:
    """`cos` and `sin`: [max_model_len, 1, rotary_dim], in the model's dtype; `sin` carries rotate-half's sign."""

    def __init__(self, shape: RopeShape, max_model_len: int, dtype: torch.dtype, device: torch.device) -> None:
        inverse, attention_factor = inverse_frequencies(shape)
        angles = torch.arange(max_model_len, dtype=torch.float32)[:, None] * inverse[None, :]
        cos, sin = angles.cos() * attention_factor, angles.sin() * attention_factor
        self.cos = torch.cat((cos, cos), -1)[:, None].to(device, dtype)
        self.sin = torch.cat((-sin, sin), -1)[:, None].to(device, dtype)
        self.rotary_dim = shape.rotary_dim

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the table for int64 `positions` [N]."""
        return self.cos.index_select(0, positions), self.sin.index_select(0, positions)


def rotate_(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate `heads` [N, heads, head_dim] in place; with partial rotary only the leading `rotary_dim` turn."""
    rotary_dim = cos.shape[-1]
    turned = heads if rotary_dim == heads.shape[-1] else heads[..., :rotary_dim]
    swapped = turned.roll(rotary_dim // 2, -1)
    turned.mul_(cos).addcmul_(swapped, sin)


def inverse_frequencies(shape: RopeShape) -> tuple[Tensor, float]:
    """([rotary_dim / 2] float32, factor on cos and sin)."""
    exponents = torch.arange(0, shape.rotary_dim, 2, dtype=torch.int64).float() / shape.rotary_dim
    inverse = 1.0 / (shape.theta**exponents)
    scaling = dict(shape.scaling)
    if shape.rope_type == "linear":
        return inverse / scaling["factor"], 1.0
    if shape.rope_type == "llama3":
        return _llama3(inverse, scaling), 1.0
    if shape.rope_type == "yarn":
        return _yarn(shape, inverse, scaling)
    return inverse, 1.0


def _llama3(inverse: Tensor, scaling: dict[str, float]) -> Tensor:
    """Llama 3.1: long wavelengths divided by `factor`, short ones kept, a smooth passage between."""
    original = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelength = 2 * math.pi / inverse
    smooth = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - smooth) * inverse / scaling["factor"] + smooth * inverse


def _yarn(shape: RopeShape, inverse: Tensor, scaling: dict[str, float]) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071): interpolation below `beta_slow` rotations, extrapolation above `beta_fast`."""
    factor = scaling["factor"]
    low, high = _yarn_range(shape, scaling)
    index = torch.arange(shape.rotary_dim // 2, dtype=torch.float32)
    extrapolated = 1 - ((index - low) / (high - low if high != low else 0.001)).clamp(0.0, 1.0)
    mixed = inverse / factor * (1 - extrapolated) + inverse * extrapolated
    return mixed, scaling.get("attention_factor") or _yarn_attention_factor(factor, scaling)


def _yarn_range(shape: RopeShape, scaling: dict[str, float]) -> tuple[float, float]:
    original = scaling["original_max_position_embeddings"]

    def dimension(rotations: float) -> float:
        turns = math.log(original / (rotations * 2 * math.pi))
        return shape.rotary_dim * turns / (2 * math.log(shape.theta))

    low, high = dimension(scaling.get("beta_fast") or 32.0), dimension(scaling.get("beta_slow") or 1.0)
    if scaling.get("truncate", 1.0):
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, shape.rotary_dim - 1)


def _yarn_attention_factor(factor: float, scaling: dict[str, float]) -> float:
    def mscale(multiplier: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return mscale(scaling["mscale"]) / mscale(scaling["mscale_all_dim"])
    return mscale(1.0)
