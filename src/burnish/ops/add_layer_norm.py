"""Residual addition and layer normalization in one."""

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
from burnish.ops._norms import check_norm, check_residual, empty_contiguous, layer_norm_reference, not_mixed_layer_norm
from burnish.ops._triton_norms import triton_norm_configs, triton_norm_why_not
from burnish.ops.layer_norm_backward import layer_norm_backward


def _check(x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, keep_sum: bool) -> None:
    check_norm(x, weight, bias)
    check_residual(x, residual)


def _cost(x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, keep_sum: bool) -> Cost:
    return Cost(9 * x.numel(), (4 if keep_sum else 3) * nbytes(x) + nbytes(weight, bias))


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def tensor(*shape: int, seed: int) -> Tensor:
        return randn(*shape, dtype=dtype, device=device, seed=seed)

    weight, bias = tensor(768, seed=2), tensor(768, seed=3)
    yield Sample("128x768", (tensor(1, 128, 768, seed=0), tensor(1, 128, 768, seed=1), weight, bias, 1e-12))
    yield Sample("odd", (tensor(7, 33, seed=4), tensor(7, 33, seed=5), tensor(33, seed=6), tensor(33, seed=7)))
    yield Sample("plain", (tensor(2, 16, 768, seed=8), tensor(2, 16, 768, seed=9), None, None))
    yield Sample("no sum", (tensor(9, 768, seed=12), tensor(9, 768, seed=13), weight, bias, 1e-5, False))
    transposed = tensor(5, 768, 3, seed=10).transpose(1, 2)
    yield Sample("transposed", (transposed, tensor(5, 3, 768, seed=11), weight, bias))
    yield Sample("both transposed", (transposed, transposed, weight, None))


def _shape(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, keep_sum: bool
) -> tuple[Tensor, Tensor]:
    return empty_contiguous(x), empty_contiguous(x) if keep_sum else x.new_empty(0)


@op(cost=_cost, samples=_samples, check=_check, shape=_shape)
def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    keep_sum: bool = True,
) -> tuple[Tensor, Tensor]:
    """`layer_norm(x + residual)` and the sum itself, for the next residual connection: `(normed, sum)`.

    Shapes: x and residual (..., N); weight and bias (N,) or None; both results are x's, contiguous.
    Without `keep_sum`, for where nobody reads the sum, the second result is empty: of shape (0,).
    Dtypes: x and residual the same; weight and bias may differ. The sum is rounded to x's dtype and normalized from
    that, in float32 (float64 for float64), rounded once.
    Errors: ValueError for other sizes, TypeError for a residual of another dtype and for integers.
    Source: the "Add & Norm" of Vaswani et al., "Attention Is All You Need", arXiv:1706.03762.
    """
    total = (x + residual).contiguous()
    return layer_norm_reference(total, weight, bias, eps), total if keep_sum else total.new_empty(0)


def _torch_why_not(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, keep_sum: bool
) -> list[str]:
    return not_mixed_layer_norm(x, weight, bias)


@add_layer_norm.impl("torch", why_not=_torch_why_not, differentiable=True)
def _torch(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    keep_sum: bool = True,
) -> tuple[Tensor, Tensor]:
    """One addition and PyTorch's own kernel, without upcast copies."""
    total = (x + residual).contiguous()
    return F.layer_norm(total, total.shape[-1:], weight, bias, eps), total if keep_sum else total.new_empty(0)


def _triton_why_not(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, keep_sum: bool
) -> list[str]:
    return triton_norm_why_not(x, weight, bias)


def _triton_configs(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, keep_sum: bool
) -> list[Any]:
    return triton_norm_configs(x, added=True)


@add_layer_norm.impl("triton", why_not=_triton_why_not, configs=_triton_configs, live_rows=True)
def _triton(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    keep_sum: bool = True,
    *,
    config: Any = None,
    live_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Addition and normalization in one pass over memory, whole rows in registers."""
    from burnish.kernels import norms

    return norms.add_layer_norm(x, residual, weight, bias, eps, keep_sum, config, live_rows)


# --- training ---------------------------------------------------------------------------------------------------------


def _forward(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, keep_sum: bool
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, ...]]:
    """Keeps of x and residual their sum alone, with which the model goes on anyway. In a recorded graph it is PyTorch's
    operators: see `layer_norm`."""
    run = add_layer_norm.reference if is_traced(x) else add_layer_norm
    normed, total = run(x, residual, weight, bias, eps)
    return (normed, total if keep_sum else total.new_empty(0)), (total, weight, bias)


def _backward(saved: Saved, grad: Tensor | None, grad_sum: Tensor | None) -> Gradients:
    *_, eps, keep_sum = saved.args
    need_x, need_residual, need_weight, need_bias, *_ = saved.needed
    grad_sum = grad_sum if keep_sum else None
    dtotal, dweight, dbias = grad_sum, None, None
    if grad is not None:
        dtotal, *found = layer_norm_backward(grad, *saved.kept, eps, grad_sum, need_weight, need_bias)
        dweight, dbias = (g if need else None for g, need in zip(found[:2], (need_weight, need_bias), strict=True))
    return dtotal if need_x else None, dtotal if need_residual else None, dweight, dbias, None, None


add_layer_norm.differentiate(_forward, _backward, on_cpu="torch")
