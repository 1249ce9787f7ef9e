"""oneDNN's linear through torch, with the activation in its epilogue."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from burnish.ops._common import not_on_cpu

_ATTRIBUTES: dict[str, tuple[str, str | None]] = {
    "none": ("none", None),
    "relu": ("relu", None),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "silu": ("swish", None),
    "tanh": ("tanh", None),
}


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """`act(x @ weight.T + bias)` in one oneDNN primitive. A weight stored K-major, (K, N) rows, is read as it lies."""
    attribute, algorithm = _ATTRIBUTES[activation]
    if bias is not None:
        bias = bias.contiguous()  # a strided one would be read as if it were contiguous
    return _linear_pointwise()(x.contiguous(), weight, bias, attribute, [], algorithm)


def onednn_why_not(x: Tensor, *weights: Tensor) -> list[str]:
    """Reasons against oneDNN's linear in x's own dtype."""
    reasons = not_on_cpu(x) + _layout_reasons(x, weights)
    if fault := _unsupported(x.dtype):
        reasons.append(fault)
    return reasons


def onednn_float32_why_not(x: Tensor, *weights: Tensor) -> list[str]:
    """Reasons against oneDNN's linear on inputs converted to float32, for a CPU that has no float16 products."""
    reasons = not_on_cpu(x) + _layout_reasons(x, weights)
    if fault := _unsupported(torch.float32):
        reasons.append(fault)
    if x.dtype != torch.float16:
        reasons.append(f"the inputs are {x.dtype}; it converts from torch.float16")
    elif _unsupported(torch.float16) is None:
        reasons.append("this CPU has torch.float16 matrix products")
    return reasons


def _layout_reasons(x: Tensor, weights: tuple[Tensor, ...]) -> list[str]:
    reasons = ["x is empty"] if x.numel() == 0 else []
    for weight in weights:
        if weight.numel() == 0:
            reasons.append("a weight is empty")
        elif not (weight.is_contiguous() or weight.t().is_contiguous()):
            reasons.append(f"a weight has strides {weight.stride()}; it must be contiguous, or its transpose")
    return reasons


@functools.cache
def _linear_pointwise() -> torch._ops.OpOverload:
    return torch.ops.mkldnn._linear_pointwise.default


@functools.cache
def _unsupported(dtype: torch.dtype) -> str | None:
    if not torch.backends.mkldnn.is_available():
        return "this build of torch has no oneDNN"
    if dtype == torch.float32:
        return None
    if dtype == torch.bfloat16:
        supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    elif dtype == torch.float16:
        supported = torch.ops.mkldnn._is_mkldnn_fp16_supported()
    else:
        return f"oneDNN has no linear for {dtype}"
    return None if supported else f"this CPU has no instructions for {dtype} matrix products"
