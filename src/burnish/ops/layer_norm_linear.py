"""The start of a pre-norm branch: layer normalization and the linear layer that alone reads it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from burnish.numerics import randn
from burnish.op import Cost, Sample, op
from burnish.ops._norm_products import Way, check_norm_vectors, cost_of, ways
from burnish.ops._norms import layer_norm_reference
from burnish.ops.layer_norm import layer_norm
from burnish.ops.linear import linear


def _check(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
) -> None:
    linear.check(x, weight, bias, activation)
    check_norm_vectors(x, norm_weight, norm_bias)


def _cost(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
) -> Cost:
    return cost_of(layer_norm, linear, (x, norm_weight, norm_bias, eps), (weight, bias, activation))


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def tensor(*shape: int, seed: int) -> Tensor:
        return randn(*shape, dtype=dtype, device=device, seed=seed)

    weight, bias = tensor(130, 96, seed=0) / 96**0.5, tensor(130, seed=1)
    vectors = tensor(96, seed=2), tensor(96, seed=3)
    yield Sample("5 rows", (tensor(5, 96, seed=4), *vectors, 1e-5, weight, bias, "gelu"))
    yield Sample("one row", (tensor(1, 1, 96, seed=5) * 0.1, *vectors, 1e-2, weight))
    yield Sample("16 rows", (tensor(2, 8, 96, seed=6), *vectors, 1e-5, weight, None, "gelu_tanh"))
    yield Sample("no norm bias", (tensor(5, 96, seed=7), vectors[0], None, 1e-5, weight, bias))
    yield Sample("float32 norm", (tensor(5, 96, seed=9), *(v.float() for v in vectors), 1e-5, weight))
    yield Sample("transposed", (tensor(2, 96, 4, seed=10).transpose(1, 2), *vectors, 1e-5, weight, bias))
    yield Sample("K-major weight", (tensor(5, 96, seed=11), *vectors, 1e-5, tensor(96, 40, seed=12).t() / 96**0.5))
    yield Sample("66 rows", (tensor(2, 33, 96, seed=13), *vectors, 1e-5, weight, bias, "relu"))
    square = tensor(256, 1024, seed=14) / 1024**0.5
    yield Sample("cancellation", (tensor(6, 1024, seed=15) * 0.5 - 20, None, None, 1e-5, square))


def _shape(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@op(cost=_cost, samples=_samples, check=_check, shape=_shape)
def layer_norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """`act(layer_norm(x, norm_weight, norm_bias, eps) @ weight.T + bias)`: the normalized x is never in memory.

    Shapes: x (..., K); norm_weight and norm_bias (K,) or None; weight (N, K); bias (N,) or None; the result (..., N),
    contiguous.
    Dtypes: x, weight and bias the same floating one; norm_weight and norm_bias may differ. Normalized in float32
    (float64 for float64) and rounded to that dtype before the product. `activation` as in `linear`.
    Errors: ValueError for sizes that do not fit and for an unknown activation, TypeError for dtypes that differ.
    Source: the pre-norm branches of Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2).
    """
    out: Tensor = linear.reference(layer_norm_reference(x, norm_weight, norm_bias, eps), weight, bias, activation)
    return out


def _register(name: str, way: Way) -> None:
    def plain(
        x: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        eps: float,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str = "none",
    ) -> Tensor:
        return way.run((x, norm_weight, norm_bias, eps), (weight, bias, activation), None)

    def configured(
        x: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        eps: float,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str = "none",
        *,
        config: Any = None,
    ) -> Tensor:
        return way.run((x, norm_weight, norm_bias, eps), (weight, bias, activation), config)

    impl = plain if way.configs is None else configured
    impl.__doc__ = way.description
    layer_norm_linear.impl(name, why_not=way.why_not, configs=way.configs)(impl)


for _name, _way in ways(layer_norm, linear).items():
    _register(_name, _way)
