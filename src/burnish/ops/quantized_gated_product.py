"""The first half of a gated MLP, gate and up in one product, of a weight that is stored in 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.numerics import randn
from burnish.op import Cost, Sample, op
from burnish.ops._activations import GATES, activate, check_activation
from burnish.ops._common import nbytes, wide
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
    gate_up_weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    kind: str,
    bias: Tensor | None,
    activation: str,
) -> None:
    check_activation(activation, GATES)
    check_quantized(x, "gate_up_weight", gate_up_weight, scales, zeros, kind, bias)
    if gate_up_weight.shape[0] % 2:
        raise ValueError(f"gate_up_weight has {gate_up_weight.shape[0]} rows; it must be two halves, gate and up")


def _cost(
    x: Tensor,
    gate_up_weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    kind: str,
    bias: Tensor | None,
    activation: str,
) -> Cost:
    rows, columns = x.numel() // x.shape[-1], gate_up_weight.shape[0]
    return Cost(
        2 * rows * columns * x.shape[-1],
        nbytes(x, gate_up_weight, scales, zeros, bias) + rows * columns // 2 * x.element_size(),
    )


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    bias = randn(86, dtype=dtype, device=device, seed=20)
    samples = samples_of(86, device, dtype, {"bias": bias, "activation": "gelu"})
    yield from samples
    by_label = {sample.label: sample.args for sample in samples}
    for label in ("int4, 4 rows", "int8, 16 rows"):
        yield Sample(f"{label}, bias, gelu_tanh", (*by_label[label], bias, "gelu_tanh"))


def _shape(
    x: Tensor,
    gate_up_weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    kind: str,
    bias: Tensor | None,
    activation: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], gate_up_weight.shape[0] // 2))


@op(cost=_cost, samples=_samples, check=_check, shape=_shape)
def quantized_gated_product(
    x: Tensor,
    gate_up_weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    kind: str,
    bias: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    """`act(gate) * up`, the halves of `x @ dequantize(gate_up_weight).T + bias`; then comes a `quantized_linear`.

    Shapes: x (..., K); gate_up_weight (2*I, K), of int4 (2*I, K / 2), the gate's rows first; scales and zeros as in
    `quantized_linear`, for 2*I rows; bias (2*I,); the result (..., I), contiguous.
    Dtypes: as in `quantized_linear`: x and bias the same floating one. Computed in float32 (float64 for float64) and
    rounded once; an Impl may round the dequantized weight and the product to x's dtype. `activation` is silu, gelu
    (erf) or gelu_tanh.
    Errors: ValueError for sizes that do not fit, K that is no multiple of 16 (of int4 128), and an unknown kind or
    activation, TypeError for dtypes that do not fit.
    Source: Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202; the weights as in `quantized_linear`.
    """
    dtype = wide(x.dtype)
    weight = dequantize(gate_up_weight, scales, zeros, kind, dtype)
    gate, up = F.linear(x.to(dtype), weight, None if bias is None else bias.to(dtype)).chunk(2, dim=-1)
    return (activate(gate, activation) * up).to(x.dtype).contiguous()


@quantized_gated_product.impl("torch")
def _torch(
    x: Tensor,
    gate_up_weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    kind: str,
    bias: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    """The dequantized weight in x's dtype, then F.linear and the gate."""
    gate, up = F.linear(x, dequantize(gate_up_weight, scales, zeros, kind, x.dtype), bias).chunk(2, dim=-1)
    return activate(gate, activation).mul_(up).contiguous()


def _dequantize_why_not(
    x: Tensor,
    gate_up_weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    kind: str,
    bias: Tensor | None,
    activation: str,
) -> list[str]:
    return dequantize_reasons(x, gate_up_weight, scales, zeros)


def _dequantize_configs(
    x: Tensor,
    gate_up_weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    kind: str,
    bias: Tensor | None,
    activation: str,
) -> list[Any]:
    return dequantize_configs(gate_up_weight, scales, kind)


@quantized_gated_product.impl("triton_dequantize", why_not=_dequantize_why_not, configs=_dequantize_configs)
def _triton_dequantize(
    x: Tensor,
    gate_up_weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    kind: str,
    bias: Tensor | None = None,
    activation: str = "silu",
    config: Any = None,
) -> Tensor:
    """The same by two Triton kernels: the weight is read once, and F.linear's result too."""
    from burnish.kernels.dequantize import dequantize_weight
    from burnish.kernels.gate import gate

    weight = dequantize_weight(gate_up_weight, scales, zeros, kind, x.dtype, config=config)
    return gate(F.linear(x, weight, bias), activation)


def _gluon_why_not(
    x: Tensor,
    gate_up_weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    kind: str,
    bias: Tensor | None,
    activation: str,
) -> list[str]:
    return kernel_reasons(x, gate_up_weight, scales, zeros, kind)


def _gluon_configs(
    x: Tensor,
    gate_up_weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    kind: str,
    bias: Tensor | None,
    activation: str,
) -> list[Any]:
    return kernel_configs(x, gate_up_weight, kind, gated=True)


@quantized_gated_product.impl("gluon_gemv", why_not=_gluon_why_not, configs=_gluon_configs)
def _gluon(
    x: Tensor,
    gate_up_weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    kind: str,
    bias: Tensor | None = None,
    activation: str = "silu",
    config: Any = None,
) -> Tensor:
    """A Gluon kernel for up to 16 rows of x, which widens the weight in registers as it streams it."""
    from burnish.kernels.gemv_mma import gemv_mma

    return gemv_mma(x, gate_up_weight, bias, activation, gated=True, config=config, kind=kind, scales=scales)
