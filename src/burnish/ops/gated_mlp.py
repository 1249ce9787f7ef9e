"""The gated MLP of Llama and its kin, gate and up projection in one matrix product."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.autograd import Gradients, Saved
from burnish.kernels.layout import (
    gemv_mma_reasons,
    gemv_reasons,
    layout_reasons,
    skinny_reasons,
    tma_reasons,
    wgmma_reasons,
)
from burnish.numerics import randn
from burnish.op import Cost, Sample, op
from burnish.ops._activations import GATES, activate, check_activation
from burnish.ops._common import check_floating, check_same_dtype, check_vector, nbytes
from burnish.ops._onednn import onednn_float32_why_not, onednn_linear, onednn_why_not
from burnish.ops._triton import hopper_why_not, triton_why_not
from burnish.ops.gate import gate
from burnish.ops.gate_backward import gate_backward
from burnish.ops.linear import linear
from burnish.selection import chosen_impls


def _check(
    x: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
) -> None:
    check_activation(activation, GATES)
    check_floating("x", x)
    if x.dim() == 0 or gate_up_weight.dim() != 2 or gate_up_weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"gate_up_weight has shape {tuple(gate_up_weight.shape)}; for x of {tuple(x.shape)} it must be (2*I, K), "
            "K last in x"
        )
    if gate_up_weight.shape[0] % 2:
        raise ValueError(f"gate_up_weight has {gate_up_weight.shape[0]} rows; it must be two halves, gate and up")
    if down_weight.dim() != 2 or 2 * down_weight.shape[1] != gate_up_weight.shape[0]:
        raise ValueError(
            f"down_weight has shape {tuple(down_weight.shape)}; it must be (N, I), "
            f"I half of gate_up_weight's {gate_up_weight.shape[0]} rows"
        )
    check_vector("gate_up_bias", gate_up_bias, gate_up_weight.shape[0], "one entry per row of gate_up_weight")
    check_vector("down_bias", down_bias, down_weight.shape[0], "one entry per row of down_weight")
    for name, tensor in (("gate_up_weight", gate_up_weight), ("down_weight", down_weight)):
        check_same_dtype(name, tensor, "x", x)
    for name, vector in (("gate_up_bias", gate_up_bias), ("down_bias", down_bias)):
        check_same_dtype(name, vector, "x", x)


def _cost(
    x: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
) -> Cost:
    rows = x.numel() // x.shape[-1]
    inner, columns = down_weight.shape[1], down_weight.shape[0]
    return Cost(
        2 * rows * (2 * inner * x.shape[-1] + inner * columns),
        nbytes(x, gate_up_weight, down_weight, gate_up_bias, down_bias) + rows * columns * x.element_size(),
    )


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def tensor(*shape: int, seed: int) -> Tensor:
        return randn(*shape, dtype=dtype, device=device, seed=seed)

    def weights(n: int, k: int, seed: int) -> Tensor:
        return tensor(n, k, seed=seed) / k**0.5

    x, gate_up, down = tensor(2, 33, 96, seed=0), weights(320, 96, seed=1), weights(64, 160, seed=2)
    for activation in GATES:
        yield Sample(activation, (x, gate_up, down), {"activation": activation})
    yield Sample("biases", (x, gate_up, down, tensor(320, seed=3), tensor(64, seed=4)))
    yield Sample("one row", (tensor(1, 96, seed=5), gate_up, down))
    yield Sample("20 rows", (tensor(20, 96, seed=12), gate_up, down))
    k_major = weights(96, 320, seed=6).t(), weights(160, 64, seed=7).t()
    yield Sample("K-major weights", (x, *k_major))
    yield Sample("transposed x", (tensor(2, 96, 33, seed=8).transpose(1, 2), gate_up, down))
    yield Sample("64x512x1408", (tensor(1, 64, 512, seed=9), weights(2816, 512, seed=10), weights(512, 1408, seed=11)))


def _shape(
    x: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], down_weight.shape[0]))


@op(cost=_cost, samples=_samples, check=_check, shape=_shape)
def gated_mlp(
    x: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    """`linear(act(gate) * up, down_weight, down_bias)` where `gate, up` are the halves of `linear(x, gate_up_weight)`.

    Shapes: x (..., K); gate_up_weight (2*I, K), the gate's rows first; down_weight (N, I); gate_up_bias (2*I,);
    down_bias (N,); the result (..., N), contiguous.
    Dtypes: all the same floating one. `activation` is silu, gelu (erf) or gelu_tanh.
    Errors: ValueError for sizes that do not fit and for an unknown activation, TypeError for dtypes that differ.
    Source: Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202.
    """
    gate, up = F.linear(x, gate_up_weight, gate_up_bias).chunk(2, dim=-1)
    return F.linear(activate(gate, activation) * up, down_weight, down_bias).contiguous()


def _onednn_why_not(
    x: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
) -> list[str]:
    return onednn_why_not(x, gate_up_weight, down_weight)


@gated_mlp.impl("onednn", why_not=_onednn_why_not)
def _onednn(
    x: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    """oneDNN for both products, the gate applied to its half of the first one's result."""
    gate, up = onednn_linear(x, gate_up_weight, gate_up_bias, "none").chunk(2, dim=-1)
    return onednn_linear(activate(gate, activation).mul_(up), down_weight, down_bias, "none")


def _onednn_float32_why_not(
    x: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
) -> list[str]:
    return onednn_float32_why_not(x, gate_up_weight, down_weight)


@gated_mlp.impl("onednn_float32", why_not=_onednn_float32_why_not)
def _onednn_float32(
    x: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    """The same on float16 inputs converted to float32, for a CPU without float16 products."""
    biases = (None if bias is None else bias.float() for bias in (gate_up_bias, down_bias))
    return _onednn(x.float(), gate_up_weight.float(), down_weight.float(), *biases, activation).to(x.dtype)


@gated_mlp.impl("torch")
def _torch(
    x: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    """F.linear for both products, one fresh tensor between them."""
    gate, up = F.linear(x, gate_up_weight, gate_up_bias).chunk(2, dim=-1)
    return F.linear(activate(gate, activation).mul_(up), down_weight, down_bias).contiguous()


def _register_triton(
    name: str,
    description: str,
    family: str,
    down: bool,
    further_reasons: Callable[[Tensor, tuple[Tensor, ...]], list[str]] | None = None,
) -> None:
    """An Impl by one family of kernels; `down` says that they do the second product too, else torch does."""

    def why_not(
        x: Tensor,
        gate_up_weight: Tensor,
        down_weight: Tensor,
        gate_up_bias: Tensor | None,
        down_bias: Tensor | None,
        activation: str,
    ) -> list[str]:
        gate_weight = gate_up_weight[: gate_up_weight.shape[0] // 2]
        weights = (gate_weight, down_weight) if down else (gate_weight,)
        reasons = (hopper_why_not if family == "wgmma" else triton_why_not)(x)
        reasons += layout_reasons(x, (gate_up_weight, down_weight))
        return reasons + further_reasons(x, weights) if further_reasons is not None else reasons

    def configs(
        x: Tensor,
        gate_up_weight: Tensor,
        down_weight: Tensor,
        gate_up_bias: Tensor | None,
        down_bias: Tensor | None,
        activation: str,
    ) -> Sequence[Any]:
        from burnish.kernels.gated import gated_mlp_configs

        return gated_mlp_configs(family, x, gate_up_weight, down_weight if down else None)

    def impl(
        x: Tensor,
        gate_up_weight: Tensor,
        down_weight: Tensor,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        activation: str = "silu",
        config: Any = None,
    ) -> Tensor:
        from burnish.kernels import gated

        args = (x, gate_up_weight, down_weight, gate_up_bias, down_bias, activation)
        return gated.gated_mlp(family, *args, down=down, config=config)

    impl.__doc__ = description
    gated_mlp.impl(name, why_not=why_not, configs=configs)(impl)


_register_triton(
    "triton", "Two Triton kernels: gate, up and their product in tiles; the down projection.", "matmul", True
)
_register_triton(
    "triton_gate", "A Triton kernel for gate, up and their product in tiles, then F.linear.", "matmul", False
)
_register_triton(
    "triton_gemv", "Two Triton kernels for a few rows of x, which stream the weights.", "gemv", True, gemv_reasons
)
_register_triton(
    "gluon_gemv",
    "Two Gluon kernels for up to 16 rows of x, which read the weights right into tensor cores' left operand.",
    "gemv_mma",
    True,
    gemv_mma_reasons,
)
_register_triton(
    "triton_skinny",
    "Two Triton kernels for up to 64 rows of x, which stream the weights.",
    "skinny",
    True,
    skinny_reasons,
)
_register_triton(
    "triton_tma", "Two persistent Triton kernels for many rows, which copy tiles by TMA.", "tma", True, tma_reasons
)
_register_triton(
    "triton_tma_gate", "A persistent Triton kernel that copies tiles by TMA, then F.linear.", "tma", False, tma_reasons
)
_register_triton("gluon", "Two Gluon kernels for Hopper, whose warps have roles.", "wgmma", True, wgmma_reasons)
_register_triton("gluon_gate", "The first of these Gluon kernels, then F.linear.", "wgmma", False, wgmma_reasons)


def _torch_triton_why_not(
    x: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
) -> list[str]:
    empty = gate_up_weight.numel() == 0 or down_weight.numel() == 0
    return triton_why_not(x) + (["a weight is empty"] if empty else [])


def _torch_triton_configs(
    x: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
) -> Sequence[Any]:
    from burnish.kernels.gate import gate_configs

    return gate_configs(down_weight.shape[1])


@gated_mlp.impl("torch_triton", why_not=_torch_triton_why_not, configs=_torch_triton_configs)
def _torch_triton(
    x: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    config: Any = None,
) -> Tensor:
    """F.linear for both products, a Triton kernel for what lies between them."""
    from burnish.kernels.gate import gate

    hidden = gate(F.linear(x, gate_up_weight, gate_up_bias), activation, config=config)
    return F.linear(hidden, down_weight, down_bias).contiguous()


# --- training ---------------------------------------------------------------------------------------------------------


def _forward(
    x: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Keeps the first product, 2*I numbers a row, which is what Liger keeps. An Impl that was chosen has no such tensor
    to give: its first product is computed again."""
    kept = x, gate_up_weight, down_weight, gate_up_bias, down_bias
    if gated_mlp.name in chosen_impls():
        return gated_mlp(*kept, activation), (*kept, None)
    gate_up = linear(x, gate_up_weight, gate_up_bias)
    return linear(gate(gate_up, activation), down_weight, down_bias), (*kept, gate_up)


def _backward(saved: Saved, grad: Tensor | None) -> Gradients:
    if grad is None:
        return (None,) * 6
    x, gate_up_weight, down_weight, gate_up_bias, _, gate_up = saved.kept
    activation: str = saved.args[5]
    need_x, need_gate_up, need_down, need_gate_up_bias, need_down_bias, _ = saved.needed
    if gate_up is None and (need_x or need_gate_up or need_down or need_gate_up_bias):
        gate_up = linear(x, gate_up_weight, gate_up_bias)
    hidden: Any = None
    d_gate_up: Any = None
    if need_x or need_gate_up or need_gate_up_bias:
        grad_hidden = linear(grad, down_weight.t())
        d_gate_up, hidden = gate_backward(grad_hidden, gate_up, activation, keep_hidden=need_down)
        del grad_hidden
    elif need_down:
        hidden = gate(gate_up, activation)
    return (
        linear(d_gate_up, gate_up_weight.t()) if need_x else None,
        linear(_rows(d_gate_up).t(), _rows(x).t()) if need_gate_up else None,
        linear(_rows(grad).t(), _rows(hidden).t()) if need_down else None,
        _rows(d_gate_up).sum(0) if need_gate_up_bias else None,
        _rows(grad).sum(0) if need_down_bias else None,
        None,
    )


def _rows(x: Tensor) -> Tensor:
    """As a matrix, also where x is a single row."""
    return x[None].flatten(0, -2)


gated_mlp.differentiate(_forward, _backward)
