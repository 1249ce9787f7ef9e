"""The end of a pre-norm branch: a linear layer, the residual addition and the next RMS normalization in one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.numerics import randn
from burnish.op import Cost, Sample, op
from burnish.ops._common import not_same_dtype
from burnish.ops._linear_norm_impls import register_gluon_fused, register_products
from burnish.ops._linear_norms import (
    check_product,
    cost_of,
    gluon_parts,
    gluon_parts_configs,
    gluon_parts_why_not,
    product,
    triton_configs,
    triton_why_not,
)
from burnish.ops._norms import check_norm, rms_norm_reference
from burnish.ops._triton_norms import triton_norm_configs, triton_norm_why_not
from burnish.ops.add_rms_norm import add_rms_norm
from burnish.ops.linear import linear


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    keep_sum: bool,
) -> None:
    check_product(x, weight, bias, residual)
    check_norm(residual, norm_weight)


def _cost(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    keep_sum: bool,
) -> Cost:
    return cost_of(add_rms_norm, x, weight, bias, residual, norm_weight, eps, keep_sum)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def tensor(*shape: int, seed: int) -> Tensor:
        return randn(*shape, dtype=dtype, device=device, seed=seed)

    weight, bias = tensor(96, 160, seed=0) / 160**0.5, tensor(96, seed=1)
    x, residual = tensor(2, 33, 160, seed=2), tensor(2, 33, 96, seed=3)
    scale = tensor(96, seed=4)
    yield Sample("bias", (x, weight, bias, residual, scale, 1e-5))
    yield Sample("no bias", (x, weight, None, residual, scale))
    yield Sample("plain", (x, weight, None, residual))
    yield Sample("no sum", (x, weight, bias, residual, scale, 1e-6, False))
    yield Sample("one row", (x[:1, :1].contiguous(), weight, bias, residual[:1, :1].contiguous(), scale))
    square = tensor(768, 768, seed=6) / 768**0.5
    yield Sample(
        "32x768x768", (tensor(1, 32, 768, seed=7), square, None, tensor(1, 32, 768, seed=8), tensor(768, seed=9))
    )


def _shape(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    keep_sum: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(residual.shape), x.new_empty(residual.shape if keep_sum else 0)


@op(cost=_cost, samples=_samples, check=_check, shape=_shape)
def linear_add_rms_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    keep_sum: bool = True,
) -> tuple[Tensor, Tensor]:
    """`rms_norm(x @ weight.T + bias + residual)` and the sum itself: `(normed, sum)`.

    Shapes: x (..., K); weight (N, K); bias and norm_weight (N,) or None; residual and both results (..., N),
    the results contiguous. Without `keep_sum`, for where nobody reads the sum, the second is empty: of shape (0,).
    Dtypes: x, weight, bias and residual the same floating one; norm_weight may differ. The sum is rounded to
    that dtype and normalized from there, in float32 (float64 for float64), rounded once.
    Errors: ValueError for sizes that do not fit, TypeError for dtypes that differ.
    Source: the pre-norm residual connection of Touvron et al., "LLaMA", arXiv:2302.13971.
    """
    total = (F.linear(x, weight, bias) + residual).contiguous()
    return rms_norm_reference(total, norm_weight, eps), total if keep_sum else total.new_empty(0)


def _torch_why_not(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    keep_sum: bool,
) -> list[str]:
    return not_same_dtype("norm_weight", norm_weight, "x", x)


@linear_add_rms_norm.impl("torch", why_not=_torch_why_not)
def _torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    keep_sum: bool = True,
) -> tuple[Tensor, Tensor]:
    """F.linear, an addition in place, and PyTorch's own rms_norm."""
    total = product(x, weight, bias).add_(residual).contiguous()
    return F.rms_norm(total, total.shape[-1:], norm_weight, eps), total if keep_sum else total.new_empty(0)


def _torch_triton_why_not(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    keep_sum: bool,
) -> list[str]:
    return triton_norm_why_not(residual, norm_weight)


def _torch_triton_configs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    keep_sum: bool,
) -> list[Any]:
    return triton_norm_configs(residual, added=True)


@linear_add_rms_norm.impl("torch_triton", why_not=_torch_triton_why_not, configs=_torch_triton_configs)
def _torch_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    keep_sum: bool = True,
    *,
    config: Any = None,
) -> tuple[Tensor, Tensor]:
    """F.linear, then addition and normalization in one Triton kernel."""
    from burnish.kernels.norms import add_rms_norm as kernel

    return kernel(product(x, weight, bias), residual, norm_weight, eps, keep_sum, config)


def _triton_why_not(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    keep_sum: bool,
) -> list[str]:
    return triton_why_not(x, weight, bias, residual, norm_weight)


def _triton_configs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    keep_sum: bool,
) -> list[Any]:
    return triton_configs(x, weight)


@linear_add_rms_norm.impl("triton", why_not=_triton_why_not, configs=_triton_configs)
def _triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    keep_sum: bool = True,
    *,
    config: Any = None,
) -> tuple[Tensor, Tensor]:
    """Two kernels: the product in parts, split over K, and the norm of the parts' sum."""
    from burnish.kernels.linear_norm import linear_add_norm

    return linear_add_norm(x, weight, bias, residual, norm_weight, None, eps, True, keep_sum, config)


def _gluon_why_not(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    keep_sum: bool,
) -> list[str]:
    return gluon_parts_why_not(x, weight, bias, residual, norm_weight)


def _gluon_configs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    keep_sum: bool,
) -> list[Any]:
    return gluon_parts_configs(x, weight)


@linear_add_rms_norm.impl("gluon", why_not=_gluon_why_not, configs=_gluon_configs)
def _gluon(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    keep_sum: bool = True,
    *,
    config: Any = None,
) -> tuple[Tensor, Tensor]:
    """The same, with the product by a Gluon kernel for Hopper."""
    return gluon_parts(x, weight, bias, residual, norm_weight, None, eps, True, keep_sum, config)


register_gluon_fused(linear_add_rms_norm, rms=True)
register_products(linear_add_rms_norm, rms=True)


# --- training ---------------------------------------------------------------------------------------------------------


def _parts(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    keep_sum: bool,
) -> tuple[Tensor, Tensor]:
    out: tuple[Tensor, Tensor] = add_rms_norm(linear(x, weight, bias), residual, norm_weight, eps, keep_sum)
    return out


linear_add_rms_norm.compose(_parts)
