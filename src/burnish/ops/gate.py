"""What lies between the products of a gated MLP: the activated gate times the other half."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from burnish.autograd import Gradients, Saved
from burnish.numerics import randn
from burnish.op import Cost, Sample, op
from burnish.ops._activations import GATES, activate, check_activation
from burnish.ops._common import check_floating, nbytes
from burnish.ops._triton import triton_why_not
from burnish.ops.gate_backward import gate_backward


def _check(gate_up: Tensor, activation: str) -> None:
    check_activation(activation, GATES)
    check_floating("gate_up", gate_up)
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(
            f"gate_up has shape {tuple(gate_up.shape)}; its last dimension must be two halves, gate and up"
        )


def _cost(gate_up: Tensor, activation: str) -> Cost:
    # 12 operations for an activation and its product, as the kernels have it.
    return Cost(6 * gate_up.numel(), nbytes(gate_up) * 3 // 2)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def tensor(*shape: int, seed: int) -> Tensor:
        return randn(*shape, dtype=dtype, device=device, seed=seed)

    for seed, activation in enumerate(GATES):
        yield Sample(activation, (tensor(2, 33, 320, seed=seed), activation))
    yield Sample("odd", (tensor(5, 2 * 35, seed=3),))
    yield Sample("transposed", (tensor(2, 192, 7, seed=4).transpose(1, 2), "gelu"))
    yield Sample("one row", (tensor(256, seed=5), "gelu_tanh"))
    yield Sample("64x2816", (tensor(1, 64, 2816, seed=6),))


def _shape(gate_up: Tensor, activation: str) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@op(cost=_cost, samples=_samples, check=_check, shape=_shape)
def gate(gate_up: Tensor, activation: str = "silu") -> Tensor:
    """`act(gate) * up`, where `gate, up` are the halves of gate_up's last dimension.

    Shapes: gate_up (..., 2*I), the gate's columns first; the result (..., I), contiguous.
    Dtypes: any floating one. `activation` is silu, gelu (erf) or gelu_tanh.
    Errors: ValueError for an odd last dimension and for an unknown activation, TypeError for a dtype that is none of
    float's.
    Source: Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202.
    """
    gates, up = gate_up.chunk(2, dim=-1)
    return (activate(gates, activation) * up).contiguous()


def _triton_why_not(gate_up: Tensor, activation: str) -> list[str]:
    return triton_why_not(gate_up)


def _triton_configs(gate_up: Tensor, activation: str) -> Sequence[Any]:
    from burnish.kernels.gate import gate_configs

    return gate_configs(gate_up.shape[-1] // 2)


@gate.impl("triton", why_not=_triton_why_not, configs=_triton_configs)
def _triton(gate_up: Tensor, activation: str = "silu", config: Any = None) -> Tensor:
    """A Triton kernel that reads both halves and writes the result."""
    from burnish.kernels.gate import gate

    return gate(gate_up, activation, config=config)


@gate.impl("torch")
def _torch(gate_up: Tensor, activation: str = "silu") -> Tensor:
    """The activation in a fresh tensor, which the product is computed in."""
    gates, up = gate_up.chunk(2, dim=-1)
    return activate(gates, activation).mul_(up).contiguous()


def _forward(gate_up: Tensor, activation: str) -> tuple[Tensor, tuple[Tensor]]:
    return gate(gate_up, activation), (gate_up,)


def _backward(saved: Saved, grad: Tensor | None) -> Gradients:
    if grad is None:
        return None, None
    return gate_backward(grad, saved.kept[0], saved.args[1], keep_hidden=False)[0], None


gate.differentiate(_forward, _backward)
