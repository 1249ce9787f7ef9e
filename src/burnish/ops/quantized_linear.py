"""A linear layer whose weight is stored in 8 or 4 bits, with activation and residual addition in its epilogue."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.numerics import randn
from burnish.op import Cost, Sample, op
from burnish.ops._activations import activate, activate_, check_activation
from burnish.ops._common import check_same_dtype, nbytes, wide
from burnish.ops._quantized import (
    check_quantized,
    dequantize_configs,
    dequantize_reasons,
    kernel_configs,
    kernel_reasons,
    samples_of,
)
from burnish.quantize import dequantize


def _check(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    kind: str,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
) -> None:
    check_activation(activation)
    check_quantized(x, "weight", weight, scales, zeros, kind, bias)
    if residual is not None:
        shape = (*x.shape[:-1], weight.shape[0])
        if residual.shape != shape:
            raise ValueError(f"residual has shape {tuple(residual.shape)}; it must be the result's, {tuple(shape)}")
        check_same_dtype("residual", residual, "x", x)


def _cost(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    kind: str,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
) -> Cost:
    results = x.numel() // x.shape[-1] * weight.shape[0]
    return Cost(
        2 * results * x.shape[-1],
        nbytes(x, weight, scales, zeros, bias, residual) + results * x.element_size(),
    )


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def tensor(*shape: int, seed: int) -> Tensor:
        return randn(*shape, dtype=dtype, device=device, seed=seed)

    bias, residual = tensor(130, seed=20), tensor(1, 1, 130, seed=21)
    samples = samples_of(130, device, dtype, {"bias": bias, "activation": "gelu", "residual": residual})
    yield from samples
    by_label = {sample.label: sample.args for sample in samples}
    x, *weight = by_label["int4, 4 rows"]
    yield Sample("int4, bias, silu", (x, *weight, bias, "silu"))
    x, *weight = by_label["int8, 16 rows"]
    yield Sample("expanded residual", (x, *weight, None, "relu", tensor(130, seed=22).expand(2, 8, 130)))


def _shape(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    kind: str,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@op(cost=_cost, samples=_samples, check=_check, shape=_shape)
def quantized_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    kind: str,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """`act(x @ dequantize(weight).T + bias) + residual` of a weight as `burnish.quantize.quantize_weight` stores it.

    Shapes: x (..., K); weight (N, K), of int4 (N, K / 2); scales (N,), of int4 (N, G), where G is K / 32, K / 64 or
    K / 128; zeros (N, G) or None, of int4 only; bias (N,); residual and the result (..., N), the result contiguous.
    Dtypes: x, bias and residual the same floating one; weight int8 of kind int8, uint8 of fp8 (the bits of a
    float8_e4m3fn, none of them NaN) and int4 (two in a byte); scales floating, zeros uint8. Computed in float32
    (float64 for float64) and rounded once; an Impl may round the dequantized weight to x's dtype, and between its
    steps. `activation` as in `linear`.
    Errors: ValueError for sizes that do not fit, K that is no multiple of 16 (of int4 128), and an unknown kind or
    activation, TypeError for dtypes that do not fit.
    Source: weight-only quantization as in Dettmers et al., "LLM.int8()", arXiv:2208.07339, by rows, and Frantar et al.,
    "GPTQ", arXiv:2210.17323, by groups; float8_e4m3fn is of Micikevicius et al., "FP8 Formats for Deep Learning",
    arXiv:2209.05433.
    """
    dtype = wide(x.dtype)
    out = F.linear(
        x.to(dtype), dequantize(weight, scales, zeros, kind, dtype), None if bias is None else bias.to(dtype)
    )
    out = activate(out, activation)
    return (out if residual is None else out + residual.to(dtype)).to(x.dtype).contiguous()


@quantized_linear.impl("torch")
def _torch(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    kind: str,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """The dequantized weight in x's dtype, then F.linear, activation and residual in place."""
    return _in_place(x, dequantize(weight, scales, zeros, kind, x.dtype), bias, activation, residual)


def _in_place(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None) -> Tensor:
    out = activate_(F.linear(x, weight, bias), activation)
    return (out if residual is None else out.add_(residual)).contiguous()


def _dequantize_why_not(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    kind: str,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
) -> list[str]:
    return dequantize_reasons(x, weight, scales, zeros)


def _dequantize_configs(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    kind: str,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
) -> list[Any]:
    return dequantize_configs(weight, scales, kind)


@quantized_linear.impl("triton_dequantize", why_not=_dequantize_why_not, configs=_dequantize_configs)
def _triton_dequantize(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    kind: str,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    config: Any = None,
) -> Tensor:
    """The same, the weight dequantized by a Triton kernel that reads it once."""
    from burnish.kernels.dequantize import dequantize_weight

    dense = dequantize_weight(weight, scales, zeros, kind, x.dtype, config=config)
    return _in_place(x, dense, bias, activation, residual)


def _gluon_why_not(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    kind: str,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
) -> list[str]:
    return kernel_reasons(x, weight, scales, zeros, kind, residual)


def _gluon_configs(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    kind: str,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
) -> list[Any]:
    return kernel_configs(x, weight, kind)


@quantized_linear.impl("gluon_gemv", why_not=_gluon_why_not, configs=_gluon_configs)
def _gluon(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    kind: str,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    config: Any = None,
) -> Tensor:
    """A Gluon kernel for up to 16 rows of x, which widens the weight in registers as it streams it."""
    from burnish.kernels.gemv_mma import gemv_mma

    return gemv_mma(x, weight, bias, activation, residual, config=config, kind=kind, scales=scales)
