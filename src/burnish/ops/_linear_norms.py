"""What the Ops share that end a branch: product, residual addition, normalization."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from burnish.kernels.layout import wgmma_reasons
from burnish.op import Cost, Op
from burnish.ops._common import HALF_TYPES
from burnish.ops._triton import hopper_why_not
from burnish.ops._triton_norms import triton_norm_why_not
from burnish.ops.linear import linear

FEWEST_WHOLE = 512  # rows; with fewer a product has too few tiles, and its sum over K is split
MOST_ROWS = 2048  # beyond, parts in float32 cost more memory traffic than a second kernel does


def check_product(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> None:
    linear.check(x, weight, bias, "none", residual)


def cost_of(
    norm: Op, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, *norm_args: Tensor | float | None
) -> Cost:
    """The product's and the norm's, less the product that is neither written nor read."""
    both = linear.cost(x, weight, bias) + norm.cost(residual, residual, *norm_args)
    return Cost(both.flops, both.bytes - 2 * residual.numel() * residual.element_size())


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear; a name of its own because this is where cuBLAS or MKL is meant."""
    return F.linear(x, weight, bias)


def triton_why_not(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, *vectors: Tensor | None
) -> list[str]:
    """Reasons against kernels that normalize the parts of a product."""
    reasons = triton_norm_why_not(residual, bias, *vectors)
    if x.dtype not in HALF_TYPES:
        reasons.append(f"the inputs are {x.dtype}; the kernel takes float16 and bfloat16")
    rows = x.numel() // max(1, x.shape[-1])
    if rows > MOST_ROWS:
        reasons.append(f"x has {rows} rows; the kernel is made for up to {MOST_ROWS}")
    if weight.stride(1) != 1 or weight.numel() == 0:
        reasons.append(f"weight has strides {weight.stride()}; its rows must be contiguous")
    for name, tensor in (("x", x), ("residual", residual)):
        if not tensor.is_contiguous():
            reasons.append(f"{name} has strides {tensor.stride()}; it must be contiguous")
    return reasons


def triton_configs(x: Tensor, weight: Tensor) -> list[Any]:
    from burnish.kernels.linear_norm import linear_norm_configs
    from burnish.kernels.matmul_configs import Product

    return linear_norm_configs(Product.of(x, weight))


def gluon_parts_why_not(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, *vectors: Tensor | None
) -> list[str]:
    """Reasons against the same with parts by the Gluon kernel."""
    reasons = triton_why_not(x, weight, bias, residual, *vectors) + wgmma_reasons(x, (weight,))
    return list(dict.fromkeys(reasons + hopper_why_not(x)))


def gluon_parts_configs(x: Tensor, weight: Tensor) -> list[Any]:
    from burnish.kernels.matmul_configs import Product
    from burnish.kernels.matmul_wgmma_configs import matmul_wgmma_parts_configs

    return matmul_wgmma_parts_configs(Product.of(x, weight))


def gluon_parts(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    rms: bool,
    keep_sum: bool,
    config: Any,
    live_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    from burnish.kernels.linear_norm import norm_of_parts
    from burnish.kernels.matmul_wgmma import matmul_wgmma_parts

    parts = matmul_wgmma_parts(x, weight, config or gluon_parts_configs(x, weight)[0], live_rows)
    return norm_of_parts(parts, bias, residual, norm_weight, norm_bias, eps, rms, keep_sum, live_rows)
