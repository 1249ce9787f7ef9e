"""Layer normalization over the last dimension."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.autograd import Gradients, Saved
from burnish.numerics import randn
from burnish.op import Cost, Sample, op
from burnish.ops._common import is_traced, nbytes
from burnish.ops._norms import check_norm, empty_contiguous, layer_norm_reference, not_mixed_layer_norm
from burnish.ops._triton_norms import triton_norm_configs, triton_norm_why_not
from burnish.ops.layer_norm_backward import layer_norm_backward


def _check(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    check_norm(x, weight, bias)


def _cost(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Cost:
    return Cost(8 * x.numel(), 2 * nbytes(x) + nbytes(weight, bias))


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def tensor(*shape: int, seed: int) -> Tensor:
        return randn(*shape, dtype=dtype, device=device, seed=seed)

    weight, bias = tensor(768, seed=1), tensor(768, seed=2)
    yield Sample("128x768", (tensor(1, 128, 768, seed=0), weight, bias, 1e-12))
    yield Sample("odd", (tensor(7, 33, seed=3), tensor(33, seed=4), tensor(33, seed=5)))
    yield Sample("no bias", (tensor(2, 16, 768, seed=6), weight, None))
    yield Sample("plain", (tensor(2, 16, 768, seed=7), None, None))
    yield Sample("cancellation", (tensor(4, 4096, seed=8) * 0.5 - 20, None, None))
    yield Sample("transposed", (tensor(5, 768, 3, seed=9).transpose(1, 2), weight, bias))
    yield Sample("float32 weights", (tensor(2, 16, 768, seed=10), weight.float(), bias.float()))


def _shape(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return empty_contiguous(x)


@op(cost=_cost, samples=_samples, check=_check, shape=_shape)
def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """`(x - mean) / sqrt(variance + eps) * weight + bias` over the last dimension.

    Shapes: x (..., N); weight and bias (N,) or None; the result is x's, contiguous.
    Dtypes: all floating; weight and bias may differ from x. Computed in float32 (float64 for float64), rounded once to
    x's dtype.
    Errors: ValueError for weight or bias of another size, TypeError for integers.
    Source: Ba, Kiros, Hinton, "Layer Normalization", arXiv:1607.06450.
    """
    return layer_norm_reference(x, weight, bias, eps)


def _torch_why_not(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> list[str]:
    return not_mixed_layer_norm(x, weight, bias)


@layer_norm.impl("torch", why_not=_torch_why_not, differentiable=True)
def _torch(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """PyTorch's own kernel, in one pass without upcast copies."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps).contiguous()


def _triton_why_not(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> list[str]:
    return triton_norm_why_not(x, weight, bias)


def _triton_configs(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> list[Any]:
    return triton_norm_configs(x, added=False)


@layer_norm.impl("triton", why_not=_triton_why_not, configs=_triton_configs, live_rows=True)
def _triton(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    config: Any = None,
    live_rows: Tensor | None = None,
) -> Tensor:
    """One pass over memory, whole rows in registers."""
    from burnish.kernels import norms

    return norms.layer_norm(x, weight, bias, eps, config, live_rows)


# --- training ---------------------------------------------------------------------------------------------------------


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Keeps no statistics: the backward pass has whole rows in registers and works them out again. In a recorded graph
    it is PyTorch's operators, which Inductor fuses with the additions and casts around them."""
    run = layer_norm.reference if is_traced(x) else layer_norm
    return run(x, weight, bias, eps), (x, weight, bias)


def _backward(saved: Saved, grad: Tensor | None) -> Gradients:
    if grad is None:
        return None, None, None, None
    need_x, need_weight, need_bias, _ = saved.needed
    dx, dweight, dbias, *_ = layer_norm_backward(
        grad, *saved.kept, saved.args[3], weight_grad=need_weight, bias_grad=need_bias
    )
    return dx if need_x else None, dweight if need_weight else None, dbias if need_bias else None, None


layer_norm.differentiate(_forward, _backward, on_cpu="torch")
