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


def check_like_x(x: Tensor, **others: Tensor | None) -> None:
    for name, other in others.items():
        if other is None:
            continue
        check_floating(name, other)
        if other.shape != x.shape:
            raise ValueError(f"{name} has shape {tuple(other.shape)}; it must be x's, {tuple(x.shape)}")


def check_residual(x: Tensor, residual: Tensor) -> None:
    check_like_x(x, residual=residual)
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


# --- backward ---------------------------------------------------------------------------------------------------------


def backward_reference(
    grad: Tensor, x: Tensor, weight: Tensor | None, eps: float, grad_sum: Tensor | None, rms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias, not yet rounded."""
    dtype = wide(x.dtype)
    grad, values = grad.to(dtype), x.to(dtype).contiguous()
    if not rms:
        values = values - values.mean(-1, keepdim=True)
    rstd = torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    normed = values * rstd
    scaled = grad if weight is None else grad * weight.to(dtype)
    dx = scaled - normed * (scaled * normed).mean(-1, keepdim=True)
    if not rms:
        dx = dx - scaled.mean(-1, keepdim=True)
    dx = dx * rstd
    if grad_sum is not None:
        dx = dx + grad_sum
    return dx, sum_rows(grad * normed), sum_rows(grad)


def sum_rows(x: Tensor) -> Tensor:
    return x[None].flatten(0, -2).sum(0)


def asked(gradient: Tensor | None, like: Tensor | None, wanted: bool, x: Tensor) -> Tensor:
    """The gradient in the dtype of what it is of; empty where that is None or nobody wants it."""
    if gradient is None or like is None or not wanted:
        return x.new_empty(0)
    return gradient.to(like.dtype)


def empty_like_asked(like: Tensor | None, wanted: bool, x: Tensor) -> Tensor:
    return x.new_empty(0) if like is None or not wanted else x.new_empty(like.shape, dtype=like.dtype)


def check_half(**dtypes: torch.dtype | None) -> None:
    for name, dtype in dtypes.items():
        if dtype not in (None, *HALF_TYPES):
            raise TypeError(f"{name} is {dtype}; it must be torch.float16, torch.bfloat16 or None")


def further(
    dx: Tensor, x: Tensor, narrow: torch.dtype | None, dx_sum: bool, normed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dx in the dtype `narrow`, its sum over all rows and the norm's result, each empty where nobody wants it."""
    return (
        x.new_empty(0) if narrow is None else dx.to(narrow, copy=True, memory_format=torch.contiguous_format),
        sum_rows(dx.to(wide(x.dtype))).to(x.dtype) if dx_sum else x.new_empty(0),
        x.new_empty(0) if normed is None else normed.contiguous(),
    )


def empty_further(
    x: Tensor, narrow: torch.dtype | None, dx_sum: bool, normed: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty results like those of `further`."""
    like_x = (
        x.new_empty(0) if dtype is None else torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
        for dtype in (narrow, normed)
    )
    total = x.new_empty(x.shape[-1:] if dx_sum else 0)
    return next(like_x), total, next(like_x)


def bytes_of_further(x: Tensor, narrow: torch.dtype | None, dx_sum: bool, normed: torch.dtype | None) -> int:
    """Bytes that the results of `further` have."""
    entries = sum(dtype.itemsize for dtype in (narrow, normed) if dtype is not None) * x.numel()
    return entries + (x.element_size() * x.shape[-1] if dx_sum else 0)


def native_layer_norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """PyTorch's kernel, for mean and rstd (..., 1). The gradients of weight and bias are None without a weight."""
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        grad, x, x.shape[-1:], mean, rstd, weight, weight, [wanted[0], *(w and weight is not None for w in wanted[1:])]
    )
    return dx, dweight, dbias
