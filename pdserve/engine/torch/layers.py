"""What a decoder layer is made of: weights as they are used, and the operations on rows of hidden states.

Projections that read the same input are fused at load (q, k and v; gate and up). On CPUs with bf16 instructions a
weight is kept in oneDNN's own packed layout: that saves a reorder in each call (19 instead of 28 ms for all layers of
SmolLM2-135M at one row, 21 instead of 31 at 16).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_PACK_ROWS = 16
"""Rows that oneDNN is told to expect when it picks a packed layout; others work as well."""


class Linear:
    """y = x W^T + b for W [out, in]. Rows in, rows out, in W's dtype (sums in float32)."""

    __slots__ = ("_bias", "_packed", "_weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, pack: bool = True) -> None:
        self._bias = bias
        self._packed: Tensor | None = None
        self._weight: Tensor | None = weight
        if pack and _can_pack(weight):
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACK_ROWS)
            self._weight = None

    def __call__(self, rows: Tensor) -> Tensor:
        if self._packed is not None:
            return torch.ops.mkldnn._linear_pointwise(rows, self._packed, self._bias, "none", [], "")
        assert self._weight is not None
        return F.linear(rows, self._weight, self._bias)


def _can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return False
    ops = torch.ops.mkldnn
    return hasattr(ops, "_reorder_linear_weight") and bool(ops._is_mkldnn_bf16_supported())


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """`qkv`: rows of q heads, then k heads, then v heads; `gate_up`: gate, then up."""

    attn_norm: Tensor
    qkv: Linear
    out: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


def rms_norm(rows: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last dimension, computed in float32, in the rows' dtype. By hand, as `F.rms_norm` takes four
    times as long on the CPU at 512 rows."""
    wide = rows.float()
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = norm.square_().div_(rows.shape[-1]).add_(eps).rsqrt_()
    return (wide * scale).mul_(weight).to(rows.dtype)


def mlp(rows: Tensor, weights: LayerWeights) -> Tensor:
    """SwiGLU."""
    gate, up = weights.gate_up(rows).chunk(2, -1)
    return weights.down(F.silu(gate).mul_(up))
