"""The backward pass of GELU between two linear layers, in the epilogue of the product that brings its gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from burnish.kernels.layout import wgmma_reasons
from burnish.numerics import randn
from burnish.op import Cost, Sample, op
from burnish.ops._activations import activate, check_activation
from burnish.ops._common import check_floating, check_same_dtype, nbytes, wide
from burnish.ops._triton import hopper_why_not, triton_why_not

GELUS = ("gelu", "gelu_tanh")


def _check(grad: Tensor, weight: Tensor, x: Tensor, activation: str, keep_hidden: bool) -> None:
    check_activation(activation, GELUS)
    check_floating("grad", grad)
    if grad.dim() == 0 or weight.dim() != 2 or weight.shape[0] != grad.shape[-1]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; for grad of {tuple(grad.shape)} it must be (K, N), K last in grad"
        )
    expected = (*grad.shape[:-1], weight.shape[1])
    if x.shape != expected:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be that of grad @ weight, {tuple(expected)}")
    check_same_dtype("weight", weight, "grad", grad)
    check_same_dtype("x", x, "grad", grad)


def _cost(grad: Tensor, weight: Tensor, x: Tensor, activation: str, keep_hidden: bool) -> Cost:
    # 24 operations for GELU, its slope, the product with it and the sum, as the kernels have it.
    return Cost(
        (2 * grad.shape[-1] + 24) * x.numel(),
        nbytes(grad, weight) + (3 if keep_hidden else 2) * nbytes(x) + x.shape[-1] * wide(x.dtype).itemsize,
    )


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def tensor(*shape: int, seed: int) -> Tensor:
        return randn(*shape, dtype=dtype, device=device, seed=seed)

    def weights(k: int, n: int, seed: int) -> Tensor:
        return tensor(k, n, seed=seed) / k**0.5

    grad, weight, x = tensor(2, 33, 96, seed=0), weights(96, 136, seed=1), tensor(2, 33, 136, seed=2)
    yield Sample("gelu", (grad, weight, x))
    yield Sample("gelu_tanh", (grad, weight, x, "gelu_tanh"))
    yield Sample("no hidden", (grad, weight, x, "gelu", False))
    yield Sample("odd", (tensor(5, 35, seed=3), weights(35, 33, seed=4), tensor(5, 33, seed=5)))
    yield Sample("weight of K rows side by side", (grad, weights(136, 96, seed=6).t() * 1.0, x))
    transposed = (tensor(2, n, 33, seed=n).transpose(1, 2) for n in (96, 136))
    across, x_across = transposed
    yield Sample("transposed", (across, weight, x_across))
    yield Sample("one row", (tensor(96, seed=7), weight, tensor(136, seed=8)))
    large = tensor(1, 384, 384, seed=9), weights(384, 1536, seed=10), tensor(1, 384, 1536, seed=11)
    yield Sample("384x384x1536", large)


def _shape(
    grad: Tensor, weight: Tensor, x: Tensor, activation: str, keep_hidden: bool
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = x.new_empty(x.shape if keep_hidden else 0)
    return x.new_empty(x.shape), hidden, x.new_empty(x.shape[-1:], dtype=wide(x.dtype))


@op(cost=_cost, samples=_samples, check=_check, shape=_shape)
def linear_gelu_backward(
    grad: Tensor, weight: Tensor, x: Tensor, activation: str = "gelu", keep_hidden: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of x in `linear(act(x), weight)`, act(x) itself, and that gradient's sum: `(dx, hidden, dx_sum)`.

    The first is `(grad @ weight) * act'(x)`; the second is what the weight's gradient needs, so that nobody has to keep
    it; the third, over all rows, is the gradient of a bias that was added to x.
    Shapes: grad (..., K), the gradient of the result; weight (K, N); x (..., N); dx and hidden (..., N), contiguous;
    dx_sum (N,). Without `keep_hidden` hidden is empty, (0,).
    Dtypes: all the same floating one; dx_sum is float32 (float64 for float64). The product is rounded before it is
    multiplied by the slope. `activation` is gelu (erf) or gelu_tanh. The same inputs give the same bits.
    Errors: ValueError for sizes that do not fit and for another activation, TypeError for dtypes that differ.
    Source: Hendrycks, Gimpel, "Gaussian Error Linear Units", arXiv:1606.08415; the epilogues DGELU_BGRAD of cuBLASLt.
    """
    dx = torch.ops.aten.gelu_backward(grad @ weight, x, approximate=_approximate(activation)).contiguous()
    hidden = activate(x, activation).contiguous() if keep_hidden else x.new_empty(0)
    return dx, hidden, _sum_of_rows(dx)


def _approximate(activation: str) -> str:
    return "tanh" if activation == "gelu_tanh" else "none"


def _sum_of_rows(dx: Tensor) -> Tensor:
    return dx.reshape(-1, dx.shape[-1]).sum(0, dtype=wide(dx.dtype))


def _gluon_why_not(grad: Tensor, weight: Tensor, x: Tensor, activation: str, keep_hidden: bool) -> list[str]:
    return hopper_why_not(x) + wgmma_reasons(grad, (weight,))


def _gluon_configs(grad: Tensor, weight: Tensor, x: Tensor, activation: str, keep_hidden: bool) -> Sequence[Any]:
    from burnish.kernels.linear_gelu_wgmma import linear_gelu_wgmma_configs

    return linear_gelu_wgmma_configs(weight.numel(), backward=True)


@linear_gelu_backward.impl("gluon", why_not=_gluon_why_not, configs=_gluon_configs)
def _gluon(
    grad: Tensor, weight: Tensor, x: Tensor, activation: str = "gelu", keep_hidden: bool = True, config: Any = None
) -> tuple[Tensor, Tensor, Tensor]:
    """One Gluon kernel for Hopper: a team of warps finishes tiles of the product while others go on multiplying."""
    from burnish.kernels.linear_gelu_wgmma import linear_gelu_backward

    return linear_gelu_backward(grad, weight, x.contiguous(), activation, keep_hidden, config=config)


def _triton_why_not(grad: Tensor, weight: Tensor, x: Tensor, activation: str, keep_hidden: bool) -> list[str]:
    return triton_why_not(x)


def _triton_configs(grad: Tensor, weight: Tensor, x: Tensor, activation: str, keep_hidden: bool) -> Sequence[Any]:
    from burnish.kernels.gelu_backward import gelu_backward_configs

    return gelu_backward_configs(x.shape[-1])


@linear_gelu_backward.impl("torch_triton", why_not=_triton_why_not, configs=_triton_configs)
def _torch_triton(
    grad: Tensor, weight: Tensor, x: Tensor, activation: str = "gelu", keep_hidden: bool = True, config: Any = None
) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's product, and a Triton kernel for all the rest: one pass over memory."""
    from burnish.kernels.gelu_backward import gelu_backward_

    dx = (grad @ weight).contiguous()
    return dx, *gelu_backward_(dx, x.contiguous(), activation, keep_hidden, config)


@linear_gelu_backward.impl("torch")
def _torch(
    grad: Tensor, weight: Tensor, x: Tensor, activation: str = "gelu", keep_hidden: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's operators, the gradient written over the product."""
    dx = (grad @ weight).contiguous()
    torch.ops.aten.gelu_backward.grad_input(dx, x, approximate=_approximate(activation), grad_input=dx)
    return dx, activate(x, activation).contiguous() if keep_hidden else x.new_empty(0), _sum_of_rows(dx)
