"""The bodies that the normalizing Ops share, and their input checks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.ops._common import HALF_TYPES, check_floating, check_same_dtype, check_vector, wide


def check_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None = None) -> None:
    check_floating("x", x)
    if x.dim() == 0:
        raise ValueError("x has no dimensions; it must have at least one, the last being normalized")
    check_vector("weight", weight, x.shape[-1], "x's last dimension")
    check_vector("bias", bias, x.shape[-1], "x's last dimension")


def check_residual(x: Tensor, residual: Tensor) -> None:
    if residual.shape != x.shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}; it must be x's, {tuple(x.shape)}")
    check_same_dtype("residual", residual, "x", x)


def empty_contiguous(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def layer_norm_reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    dtype = wide(x.dtype)
    weight, bias = (None if t is None else t.to(dtype) for t in (weight, bias))
    return F.layer_norm(x.to(dtype), x.shape[-1:], weight, bias, eps).to(x.dtype).contiguous()


def rms_norm_reference(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    wide_x = x.to(wide(x.dtype)).contiguous()
    normed = wide_x * torch.rsqrt(wide_x.square().mean(-1, keepdim=True) + eps)
    return (normed if weight is None else normed * weight).to(x.dtype)


def not_mixed_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> list[str]:
    """F.layer_norm takes weight and bias of x's dtype, or, with half-precision x, both of float32."""
    given = {t.dtype for t in (weight, bias) if t is not None}
    if given <= {x.dtype} or (x.dtype in HALF_TYPES and x.device.type == "cpu" and given == {torch.float32}):
        return []
    return [f"weight and bias are {' and '.join(map(str, sorted(given, key=str)))} where x is {x.dtype}"]


def rms_norm_by_vector_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Reads x once for its norm and writes one fresh tensor; plain PyTorch writes three."""
    dtype = wide(x.dtype)
    scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
    scale = scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    normed = x * scale if x.dtype == dtype else x.to(dtype).mul_(scale)
    if weight is not None:
        normed.mul_(weight)
    return normed.to(x.dtype)
