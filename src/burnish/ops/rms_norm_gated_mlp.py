"""Llama's second branch up to its residual connection: RMS normalization and the gated MLP that alone reads it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from burnish.numerics import randn
from burnish.op import Cost, Sample, op
from burnish.ops._norm_products import Way, check_norm_weight, cost_of, ways
from burnish.ops._norms import rms_norm_reference
from burnish.ops.gated_mlp import gated_mlp
from burnish.ops.rms_norm import rms_norm


def _check(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
) -> None:
    gated_mlp.check(x, gate_up_weight, down_weight, gate_up_bias, down_bias, activation)
    check_norm_weight(x, norm_weight)


def _cost(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
) -> Cost:
    products = (gate_up_weight, down_weight, gate_up_bias, down_bias, activation)
    return cost_of(gated_mlp, (x, norm_weight, eps), products)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def tensor(*shape: int, seed: int) -> Tensor:
        return randn(*shape, dtype=dtype, device=device, seed=seed)

    def weights(n: int, k: int, seed: int) -> Tensor:
        return tensor(n, k, seed=seed) / k**0.5

    products = weights(320, 96, seed=0), weights(64, 160, seed=1)
    biases, scale = (tensor(320, seed=2), tensor(64, seed=3)), tensor(96, seed=4)
    yield Sample("5 rows", (tensor(5, 96, seed=5), scale, 1e-5, *products, *biases, "gelu"))
    yield Sample("one row", (tensor(1, 1, 96, seed=6) * 0.1, scale, 1e-2, *products))
    yield Sample("16 rows", (tensor(2, 8, 96, seed=7), scale, 1e-6, *products, None, None, "gelu_tanh"))
    yield Sample("float32 norm weight", (tensor(5, 96, seed=9), scale.float(), 1e-6, *products, biases[0]))
    yield Sample("transposed", (tensor(2, 96, 4, seed=10).transpose(1, 2), scale, 1e-6, *products))
    yield Sample("66 rows", (tensor(2, 33, 96, seed=11), scale, 1e-6, *products))
    wide = weights(1408, 256, 13), weights(256, 704, 14)
    yield Sample("no norm weight", (tensor(6, 256, seed=12), None, 1e-6, *wide))


def _shape(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], down_weight.shape[0]))


@op(cost=_cost, samples=_samples, check=_check, shape=_shape)
def rms_norm_gated_mlp(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    """`gated_mlp(rms_norm(x, norm_weight, eps), ...)`: the normalized x is never in memory.

    Shapes: x (..., K); norm_weight (K,) or None; gate_up_weight (2*I, K), the gate's rows first; down_weight (N, I);
    gate_up_bias (2*I,); down_bias (N,); the result (..., N), contiguous.
    Dtypes: all the same floating one, but norm_weight may differ. Normalized in float32 (float64 for float64) and
    rounded to x's dtype before the product; an Impl may leave that rounding out. `activation` is silu, gelu (erf) or
    gelu_tanh.
    Errors: ValueError for sizes that do not fit and for an unknown activation, TypeError for dtypes that differ.
    Source: the pre-norm branches of Touvron et al., "LLaMA", arXiv:2302.13971.
    """
    products = (gate_up_weight, down_weight, gate_up_bias, down_bias, activation)
    out: Tensor = gated_mlp.reference(rms_norm_reference(x, norm_weight, eps), *products)
    return out


def _register(name: str, way: Way) -> None:
    def plain(
        x: Tensor,
        norm_weight: Tensor | None,
        eps: float,
        gate_up_weight: Tensor,
        down_weight: Tensor,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        activation: str = "silu",
    ) -> Tensor:
        products = (gate_up_weight, down_weight, gate_up_bias, down_bias, activation)
        return way.run((x, norm_weight, eps), products, None)

    def configured(
        x: Tensor,
        norm_weight: Tensor | None,
        eps: float,
        gate_up_weight: Tensor,
        down_weight: Tensor,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        activation: str = "silu",
        *,
        config: Any = None,
    ) -> Tensor:
        products = (gate_up_weight, down_weight, gate_up_bias, down_bias, activation)
        return way.run((x, norm_weight, eps), products, config)

    impl = plain if way.configs is None else configured
    impl.__doc__ = way.description
    rms_norm_gated_mlp.impl(name, why_not=way.why_not, configs=way.configs)(impl)


for _name, _way in ways(gated_mlp).items():
    _register(_name, _way)


# --- training ---------------------------------------------------------------------------------------------------------


def _parts(x: Tensor, norm_weight: Tensor | None, eps: float, *products: Any) -> Tensor:
    out: Tensor = gated_mlp(rms_norm(x, norm_weight, eps), *products)
    return out


rms_norm_gated_mlp.compose(_parts)
