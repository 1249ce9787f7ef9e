"""What the products of quantized weights share: checks, bytes, reasons and samples' weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from burnish.kernels.layout import gemv_mma_reasons, layout_reasons
from burnish.numerics import randn
from burnish.op import Sample
from burnish.ops._common import HALF_TYPES, check_floating, check_same_dtype, check_vector
from burnish.ops._triton import triton_why_not
from burnish.quantize import GROUP_SIZES, KINDS, QuantizedWeight, columns_of, quantize_weight

Operands = tuple[Tensor, Tensor, Tensor | None, str]
"""What stands for a weight: how its entries are stored, its scales, zeros and kind."""


def check_quantized(
    x: Tensor, name: str, weight: Tensor, scales: Tensor, zeros: Tensor | None, kind: str, bias: Tensor | None
) -> None:
    check_floating("x", x)
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    dtype = torch.int8 if kind == "int8" else torch.uint8
    if weight.dtype != dtype:
        raise TypeError(f"{name} has dtype {weight.dtype}; of {kind} it must be {dtype}, as quantize_weight stores it")
    multiple = 128 if kind == "int4" else 16
    if x.dim() == 0 or weight.dim() != 2 or columns_of(weight, kind) != x.shape[-1] or x.shape[-1] % multiple:
        stored = "(N, K / 2)" if kind == "int4" else "(N, K)"
        raise ValueError(
            f"{name} has shape {tuple(weight.shape)}; for x of {tuple(x.shape)} it must be {stored}, K last in x and a "
            f"multiple of {multiple}"
        )
    check_floating("scales", scales)
    if kind == "int4":
        _check_groups(x, weight, scales, zeros)
    else:
        check_vector("scales", scales, weight.shape[0], f"one entry per row of {name}")
        if zeros is not None:
            raise ValueError(f"zeros are given, which {kind} does not have")
    check_vector("bias", bias, weight.shape[0], f"one entry per row of {name}")
    check_same_dtype("bias", bias, "x", x)


def _check_groups(x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor | None) -> None:
    groups = [x.shape[-1] // size for size in GROUP_SIZES]
    if scales.dim() != 2 or scales.shape[0] != weight.shape[0] or scales.shape[1] not in groups:
        raise ValueError(
            f"scales have shape {tuple(scales.shape)}; they must be ({weight.shape[0]}, G), G one of "
            f"{', '.join(map(str, groups))}"
        )
    if zeros is not None and zeros.shape != scales.shape:
        raise ValueError(f"zeros have shape {tuple(zeros.shape)}; it must be that of scales, {tuple(scales.shape)}")
    if zeros is not None and zeros.dtype != torch.uint8:
        raise TypeError(f"zeros have dtype {zeros.dtype}; it must be torch.uint8")


def as_operands(weight: QuantizedWeight) -> Operands:
    return weight.data, weight.scales, weight.zeros, weight.kind


def operands_of(device: torch.device, rows: int, k: int, seed: int, *args: Any, **options: Any) -> Operands:
    """A random weight (rows, k), as `quantize_weight` stores it with these arguments."""
    quantized = quantize_weight(randn(rows, k, seed=seed) / k**0.5, *args, **options)
    data, scales, zeros, kind = as_operands(quantized)
    return data.to(device), scales.to(device), None if zeros is None else zeros.to(device), kind


def samples_of(rows: int, device: torch.device, dtype: torch.dtype, last: dict[str, Any]) -> list[Sample]:
    """Samples with a weight of `rows` rows in each kind; `last` is the arguments by name of the first one."""

    def tensor(*shape: int, seed: int) -> Tensor:
        return randn(*shape, dtype=dtype, device=device, seed=seed)

    weight, narrow = partial(operands_of, device, rows), {"scale_dtype": dtype}
    grouped, zeros = weight(256, 4, "int4", **narrow), weight(384, 5, "int4", 64, symmetric=False, **narrow)
    return [
        Sample("int8", (tensor(1, 1, 256, seed=0), *weight(256, 1, "int8")), last),
        Sample("fp8", (tensor(1, 80, seed=2), *weight(80, 3, "fp8", **narrow))),
        Sample("int4", (tensor(1, 256, seed=6), *grouped)),
        Sample("int4, 4 rows", (tensor(2, 2, 256, seed=7), *grouped)),
        Sample("int4, 64 columns a group, zeros", (tensor(1, 384, seed=8), *zeros)),
        Sample("int4, 32 columns a group, 16 rows", (tensor(16, 128, seed=9), *weight(128, 10, "int4", 32))),
        Sample("int8, 16 rows", (tensor(2, 8, 272, seed=11), *weight(272, 12, "int8", **narrow))),
        Sample("fp8, transposed x", (tensor(2, 96, 3, seed=13).transpose(1, 2), *weight(96, 14, "fp8"))),
        Sample("int4, 66 rows", (tensor(2, 33, 384, seed=15), *zeros)),
    ]


def kernel_reasons(
    x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor | None, kind: str, residual: Tensor | None = None
) -> list[str]:
    """Reasons against the kernel that widens the weight in registers."""
    reasons = triton_why_not(x) + layout_reasons(x, (weight,), residual) + gemv_mma_reasons(x, (weight,))
    reasons += _stored_reasons(weight, scales, None)
    if zeros is not None:
        reasons.append("there are zeros, which the kernel does not subtract")
    if kind == "int4" and (group := x.shape[-1] // scales.shape[1]) != 128:
        reasons.append(f"{group} columns share a scale; the kernel takes groups of 128")
    return reasons


def dequantize_reasons(x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor | None) -> list[str]:
    """Reasons against the kernel that writes the weight out in x's dtype."""
    reasons = triton_why_not(x) + (["a weight is empty"] if weight.numel() == 0 else [])
    return reasons + _stored_reasons(weight, scales, zeros)


def _stored_reasons(weight: Tensor, scales: Tensor, zeros: Tensor | None) -> list[str]:
    """Reasons against any kernel that reads what is stored."""
    reasons = []
    if scales.dtype not in (*HALF_TYPES, torch.float32):
        reasons.append(f"scales are {scales.dtype}; the kernel takes float16, bfloat16 and float32")
    for name, tensor in (("the weight", weight), ("scales", scales), ("zeros", zeros)):
        if tensor is not None and not tensor.is_contiguous():
            reasons.append(f"{name} has strides {tensor.stride()}; it must be contiguous")
    if weight.storage_offset() % 16:
        reasons.append("the weight does not begin at a multiple of 16 bytes")
    return reasons


def kernel_configs(x: Tensor, weight: Tensor, kind: str, gated: bool = False) -> list[Any]:
    from burnish.kernels.gemv_mma import gemv_mma_configs
    from burnish.kernels.matmul_configs import Product

    return gemv_mma_configs(Product.of(x, weight, gated), kind)


def dequantize_configs(weight: Tensor, scales: Tensor, kind: str) -> list[Any]:
    from burnish.kernels import dequantize

    return dequantize.dequantize_configs(weight, scales, kind)
