"""The gated MLP: gate, up and their product in one kernel, then the down projection."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from burnish.kernels.families import FAMILIES
from burnish.kernels.gemv import Norm
from burnish.kernels.launch import Config
from burnish.kernels.matmul_configs import Product


@dataclass(frozen=True)
class GatedConfig:
    """How the two products are computed: a Config each, and None where the second one is torch's."""

    gate: Config
    down: Config | None

    def __str__(self) -> str:
        return f"{self.gate}, then {self.down or 'F.linear'}"


def gated_mlp_configs(family: str, x: Tensor, gate_up_weight: Tensor, down_weight: Tensor | None) -> list[GatedConfig]:
    """Configs of `gated_mlp`, the most promising first. Without a down_weight they leave that product to torch.

    Each of the first product's with the best of the second's, then the best of the first's with each of the second's:
    the two do not influence each other.
    """
    first = Product.of(x, gate_up_weight, gated=True)
    gates = FAMILIES[family].configs(first)
    if down_weight is None:
        return [GatedConfig(gate, None) for gate in gates]
    second = Product(first.rows, down_weight.shape[0], first.columns, first.dtype, first.target)
    downs = FAMILIES[family].configs(second)
    return [GatedConfig(gate, downs[0]) for gate in gates] + [GatedConfig(gates[0], down) for down in downs[1:4]]


def gated_mlp(
    family: str,
    x: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    down: bool,
    config: GatedConfig | None,
    norm: Norm | None = None,
) -> Tensor:
    """`linear(act(gate) * up, down_weight, down_bias)` where `gate, up` are the halves of `linear(x, gate_up_weight)`.

    Shapes: x (..., K), gate_up_weight (2*I, K), down_weight (N, I), the contiguous result (..., N); dtypes and strides
    as the family's launcher wants them; torch does the second product unless `down`. Between the products lies one
    tensor (..., I) instead of torch's three. With a norm (family gemv), of x normalized.
    Source: Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202.
    """
    multiply = FAMILIES[family].multiply
    gate = None if config is None else config.gate
    normed = {} if norm is None else {"norm": norm}
    hidden = multiply(x, gate_up_weight, gate_up_bias, activation, gated=True, config=gate, **normed)
    if not down:
        return F.linear(hidden, down_weight, down_bias)
    return multiply(hidden, down_weight, down_bias, config=None if config is None else config.down)
