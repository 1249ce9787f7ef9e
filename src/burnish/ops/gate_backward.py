"""The backward pass of `gate`, which gives its result once more, so that nobody has to keep it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from burnish.numerics import randn
from burnish.op import Cost, Sample, op
from burnish.ops._activations import GATES, activate, check_activation
from burnish.ops._common import check_floating, check_same_dtype, nbytes
from burnish.ops._triton import triton_why_not


def _check(grad_hidden: Tensor, gate_up: Tensor, activation: str, keep_hidden: bool) -> None:
    check_activation(activation, GATES)
    check_floating("grad_hidden", grad_hidden)
    expected = (*grad_hidden.shape[:-1], 2 * grad_hidden.shape[-1]) if grad_hidden.dim() else None
    if expected is None or tuple(gate_up.shape) != expected:
        raise ValueError(
            f"gate_up has shape {tuple(gate_up.shape)}; for grad_hidden of {tuple(grad_hidden.shape)}, (..., I), it "
            "must be (..., 2*I)"
        )
    check_same_dtype("gate_up", gate_up, "grad_hidden", grad_hidden)


def _cost(grad_hidden: Tensor, gate_up: Tensor, activation: str, keep_hidden: bool) -> Cost:
    # 24 operations for an activation, its slope and the products, as the kernel has it.
    return Cost(
        24 * grad_hidden.numel(),
        nbytes(grad_hidden) + 2 * nbytes(gate_up) + (nbytes(grad_hidden) if keep_hidden else 0),
    )


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def pair(*shape: int, seed: int) -> tuple[Tensor, Tensor]:
        *first, last = shape
        grad = randn(*shape, dtype=dtype, device=device, seed=seed)
        return grad, randn(*first, 2 * last, dtype=dtype, device=device, seed=seed + 1)

    for seed, activation in enumerate(GATES):
        yield Sample(activation, (*pair(2, 33, 160, seed=2 * seed), activation))
    yield Sample("odd", pair(5, 35, seed=6))
    transposed = (t.transpose(0, 1) for t in pair(7, 2, 96, seed=8))
    yield Sample("transposed", (*transposed, "gelu"))
    yield Sample("no hidden", (*pair(3, 70, seed=10), "gelu_tanh", False))
    yield Sample("one row", pair(128, seed=12))
    yield Sample("64x1408", pair(1, 64, 1408, seed=14))


def _shape(grad_hidden: Tensor, gate_up: Tensor, activation: str, keep_hidden: bool) -> tuple[Tensor, Tensor]:
    return gate_up.new_empty(gate_up.shape), gate_up.new_empty(grad_hidden.shape if keep_hidden else 0)


@op(cost=_cost, samples=_samples, check=_check, shape=_shape, follows="gate")
def gate_backward(
    grad_hidden: Tensor, gate_up: Tensor, activation: str = "silu", keep_hidden: bool = True
) -> tuple[Tensor, Tensor]:
    """The gradient of `gate(gate_up, activation)`, and that result once more: `(d_gate_up, hidden)`.

    Shapes: grad_hidden (..., I), the gradient of the result; gate_up (..., 2*I), the gate's columns first; d_gate_up
    (..., 2*I) and hidden (..., I), contiguous. Without `keep_hidden` hidden is empty, (0,), and is not computed.
    Dtypes: both the same floating one. `activation` is silu, gelu (erf) or gelu_tanh.
    Errors: ValueError for sizes that do not fit and for an unknown activation, TypeError for dtypes that differ.
    Source: Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202; recomputation as in Chen et al., "Training
    Deep Nets with Sublinear Memory Cost", arXiv:1604.06174.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    active = activate(gate, activation)
    d_gate = _through(grad_hidden * up, gate, activation)
    d_gate_up = torch.cat((d_gate, grad_hidden * active), dim=-1).contiguous()
    return d_gate_up, (active * up).contiguous() if keep_hidden else gate_up.new_empty(0)


def _through(grad: Tensor, gate: Tensor, activation: str) -> Tensor:
    """The gradient of `gate` for one of `act(gate)`, by PyTorch's own operators, as autograd calls them."""
    if activation == "silu" and torch.is_grad_enabled() and (grad.requires_grad or gate.requires_grad):
        share = torch.sigmoid(gate)
        return grad * share * (1 + gate * (1 - share))  # `silu_backward` has no derivative
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, gate)
    return torch.ops.aten.gelu_backward(grad, gate, approximate="tanh" if activation == "gelu_tanh" else "none")


def _triton_why_not(grad_hidden: Tensor, gate_up: Tensor, activation: str, keep_hidden: bool) -> list[str]:
    return triton_why_not(grad_hidden)


def _triton_configs(grad_hidden: Tensor, gate_up: Tensor, activation: str, keep_hidden: bool) -> Sequence[Any]:
    from burnish.kernels.gate_backward import gate_backward_configs

    return gate_backward_configs(grad_hidden.shape[-1])


@gate_backward.impl("triton", why_not=_triton_why_not, configs=_triton_configs)
def _triton(
    grad_hidden: Tensor, gate_up: Tensor, activation: str = "silu", keep_hidden: bool = True, config: Any = None
) -> tuple[Tensor, Tensor]:
    """A Triton kernel that reads gate, up and the gradient once, and writes everything."""
    from burnish.kernels.gate_backward import gate_backward

    return gate_backward(grad_hidden, gate_up, activation, keep_hidden, config=config)


@gate_backward.impl("torch")
def _torch(
    grad_hidden: Tensor, gate_up: Tensor, activation: str = "silu", keep_hidden: bool = True
) -> tuple[Tensor, Tensor]:
    """PyTorch's operators, each writing right into a result."""
    (gate, up), d_gate_up = gate_up.chunk(2, dim=-1), gate_up.new_empty(gate_up.shape)
    d_gate, d_up = d_gate_up.chunk(2, dim=-1)
    hidden = activate(gate, activation)
    torch.mul(grad_hidden, hidden, out=d_up)
    torch.mul(grad_hidden, up, out=d_gate)
    if activation == "silu":
        torch.ops.aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
    else:
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        torch.ops.aten.gelu_backward.grad_input(d_gate, gate, approximate=approximate, grad_input=d_gate)
    if not keep_hidden:
        return d_gate_up, gate_up.new_empty(0)
    return d_gate_up, hidden.mul_(up).contiguous()
