"""The start of a pre-norm branch: RMS normalization and the linear layer that alone reads it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from burnish.numerics import randn
from burnish.op import Cost, Sample, op
from burnish.ops._norm_products import Way, check_norm_weight, cost_of, ways
from burnish.ops._norms import rms_norm_reference
from burnish.ops.linear import linear
from burnish.ops.rms_norm import rms_norm


def _check(
    x: Tensor, norm_weight: Tensor | None, eps: float, weight: Tensor, bias: Tensor | None, activation: str
) -> None:
    linear.check(x, weight, bias, activation)
    check_norm_weight(x, norm_weight)


def _cost(
    x: Tensor, norm_weight: Tensor | None, eps: float, weight: Tensor, bias: Tensor | None, activation: str
) -> Cost:
    return cost_of(linear, (x, norm_weight, eps), (weight, bias, activation))


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def tensor(*shape: int, seed: int) -> Tensor:
        return randn(*shape, dtype=dtype, device=device, seed=seed)

    weight, bias, scale = tensor(130, 96, seed=0) / 96**0.5, tensor(130, seed=1), tensor(96, seed=2)
    yield Sample("5 rows", (tensor(5, 96, seed=3), scale, 1e-5, weight, bias, "silu"))
    yield Sample("one row", (tensor(1, 1, 96, seed=4) * 0.1, scale, 1e-2, weight))
    yield Sample("16 rows", (tensor(2, 8, 96, seed=5), scale, 1e-6, weight, None, "gelu_tanh"))
    yield Sample("float32 norm weight", (tensor(5, 96, seed=7), scale.float(), 1e-6, weight))
    yield Sample("transposed", (tensor(2, 96, 4, seed=8).transpose(1, 2), None, 1e-6, weight, bias))
    yield Sample("K-major weight", (tensor(5, 96, seed=9), scale, 1e-6, tensor(96, 40, seed=10).t() / 96**0.5))
    yield Sample("66 rows", (tensor(2, 33, 96, seed=11), scale, 1e-6, weight, bias, "relu"))
    square = tensor(256, 1024, seed=12) / 1024**0.5
    yield Sample("6x1024x256", (tensor(6, 1024, seed=13) * 0.5 - 20, tensor(1024, seed=14), 1e-6, square))


def _shape(
    x: Tensor, norm_weight: Tensor | None, eps: float, weight: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@op(cost=_cost, samples=_samples, check=_check, shape=_shape)
def rms_norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """`act(rms_norm(x, norm_weight, eps) @ weight.T + bias)`: the normalized x is never in memory.

    Shapes: x (..., K); norm_weight (K,) or None; weight (N, K); bias (N,) or None; the result (..., N), contiguous.
    Dtypes: x, weight and bias the same floating one; norm_weight may differ. Normalized in float32 (float64 for
    float64) and rounded to that dtype before the product; an Impl may leave that rounding out. `activation` as in
    `linear`.
    Errors: ValueError for sizes that do not fit and for an unknown activation, TypeError for dtypes that differ.
    Source: the pre-norm branches of Touvron et al., "LLaMA", arXiv:2302.13971.
    """
    out: Tensor = linear.reference(rms_norm_reference(x, norm_weight, eps), weight, bias, activation)
    return out


def _register(name: str, way: Way) -> None:
    def plain(
        x: Tensor,
        norm_weight: Tensor | None,
        eps: float,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str = "none",
    ) -> Tensor:
        return way.run((x, norm_weight, eps), (weight, bias, activation), None)

    def configured(
        x: Tensor,
        norm_weight: Tensor | None,
        eps: float,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str = "none",
        *,
        config: Any = None,
    ) -> Tensor:
        return way.run((x, norm_weight, eps), (weight, bias, activation), config)

    impl = plain if way.configs is None else configured
    impl.__doc__ = way.description
    rms_norm_linear.impl(name, why_not=way.why_not, configs=way.configs)(impl)


for _name, _way in ways(linear).items():
    _register(_name, _way)


# --- training ---------------------------------------------------------------------------------------------------------


def _parts(
    x: Tensor, norm_weight: Tensor | None, eps: float, weight: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    out: Tensor = linear(rms_norm(x, norm_weight, eps), weight, bias, activation)
    return out


rms_norm_linear.compose(_parts)
