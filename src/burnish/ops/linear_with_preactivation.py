"""A linear layer with GELU behind it that also gives what GELU was given, as its backward pass needs it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.kernels.layout import wgmma_reasons
from burnish.numerics import randn
from burnish.op import Cost, Sample, op
from burnish.ops._activations import activate, check_activation
from burnish.ops._common import check_same_dtype, nbytes
from burnish.ops._triton import hopper_why_not
from burnish.ops.linear import linear
from burnish.ops.linear_gelu_backward import GELUS


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> None:
    check_activation(activation, GELUS)
    linear.check(x, weight, bias)
    check_same_dtype("weight", weight, "x", x)


def _cost(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Cost:
    results = x.numel() // x.shape[-1] * weight.shape[0]
    return Cost(
        (2 * x.shape[-1] + 10) * results, nbytes(x, weight) + nbytes(bias) + 2 * results * x.element_size()
    )  # 10 operations for GELU, as the kernel has it


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def tensor(*shape: int, seed: int) -> Tensor:
        return randn(*shape, dtype=dtype, device=device, seed=seed)

    def weights(n: int, k: int, seed: int) -> Tensor:
        return tensor(n, k, seed=seed) / k**0.5

    x, weight, bias = tensor(2, 33, 96, seed=0), weights(136, 96, seed=1), tensor(136, seed=2)
    yield Sample("gelu", (x, weight, bias))
    yield Sample("gelu_tanh", (x, weight, bias, "gelu_tanh"))
    yield Sample("no bias", (x, weight, None))
    yield Sample("odd", (tensor(5, 35, seed=3), weights(33, 35, seed=4), tensor(33, seed=5)))
    yield Sample("transposed", (tensor(2, 96, 33, seed=6).transpose(1, 2), weights(96, 136, seed=7).t(), bias))
    yield Sample("one row", (tensor(96, seed=8), weight, bias))
    large = tensor(1, 384, 384, seed=9), weights(1536, 384, seed=10), tensor(1536, seed=11)
    yield Sample("384x1536x384", large)


def _shape(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    hidden, pre = (x.new_empty((*x.shape[:-1], weight.shape[0])) for _ in range(2))
    return hidden, pre


@op(cost=_cost, samples=_samples, check=_check, shape=_shape)
def linear_with_preactivation(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "gelu"
) -> tuple[Tensor, Tensor]:
    """`act(x @ weight.T + bias)`, and what the activation was given: `(hidden, pre)`.

    Shapes: x (..., K); weight (N, K), of any strides; bias (N,); both results (..., N), contiguous.
    Dtypes: all the same floating one; pre is rounded before the activation. `activation` is gelu (erf) or gelu_tanh.
    Errors: ValueError for sizes that do not fit and for another activation, TypeError for dtypes that differ.
    Source: torch.nn.functional.linear and gelu; the epilogues GELU_AUX_BIAS of cuBLASLt.
    """
    pre = F.linear(x, weight, bias).contiguous()
    return activate(pre, activation), pre


def _gluon_why_not(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> list[str]:
    reasons = hopper_why_not(x) + wgmma_reasons(x, (weight,))
    if weight.shape[0] % 8:
        reasons.append(f"weight has {weight.shape[0]} rows; the kernel takes a multiple of 8")
    return reasons


def _gluon_configs(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Sequence[Any]:
    from burnish.kernels.linear_gelu_wgmma import linear_gelu_wgmma_configs

    return linear_gelu_wgmma_configs(weight.numel(), backward=False)


@linear_with_preactivation.impl("gluon", why_not=_gluon_why_not, configs=_gluon_configs)
def _gluon(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "gelu", config: Any = None
) -> tuple[Tensor, Tensor]:
    """One Gluon kernel for Hopper: a team of warps finishes tiles of the product while others go on multiplying."""
    from burnish.kernels.linear_gelu_wgmma import linear_with_preactivation

    return linear_with_preactivation(x, weight, bias, activation, config=config)


@linear_with_preactivation.impl("torch")
def _torch(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "gelu") -> tuple[Tensor, Tensor]:
    """F.linear, then the activation."""
    pre = F.linear(x, weight, bias).contiguous()
    return activate(pre, activation), pre


# --- training ---------------------------------------------------------------------------------------------------------


def _parts(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    pre = F.linear(x, weight, bias).contiguous()
    return activate(pre, activation), pre


linear_with_preactivation.compose(_parts)
