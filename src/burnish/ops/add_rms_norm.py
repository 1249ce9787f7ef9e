"""Residual addition and root-mean-square normalization in one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.autograd import Gradients, Saved
from burnish.numerics import randn
from burnish.op import Cost, Sample, op
from burnish.ops._common import is_traced, nbytes, not_on_cpu, not_same_dtype
from burnish.ops._norms import check_norm, check_residual, empty_contiguous, rms_norm_by_vector_norm, rms_norm_reference
from burnish.ops._triton_norms import triton_norm_configs, triton_norm_why_not
from burnish.ops.rms_norm_backward import rms_norm_backward


def _check(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, keep_sum: bool) -> None:
    check_norm(x, weight)
    check_residual(x, residual)


def _cost(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, keep_sum: bool) -> Cost:
    return Cost(5 * x.numel(), (4 if keep_sum else 3) * nbytes(x) + nbytes(weight))


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def tensor(*shape: int, seed: int) -> Tensor:
        return randn(*shape, dtype=dtype, device=device, seed=seed)

    weight = tensor(1024, seed=2)
    yield Sample("128x1024", (tensor(1, 128, 1024, seed=0), tensor(1, 128, 1024, seed=1), weight, 1e-5))
    yield Sample("odd", (tensor(7, 33, seed=3), tensor(7, 33, seed=4), tensor(33, seed=5)))
    yield Sample("plain", (tensor(2, 16, 1024, seed=6), tensor(2, 16, 1024, seed=7), None))
    yield Sample("no sum", (tensor(9, 1024, seed=10), tensor(9, 1024, seed=11), weight, 1e-6, False))
    transposed = tensor(5, 1024, 3, seed=8).transpose(1, 2)
    yield Sample("transposed", (transposed, tensor(5, 3, 1024, seed=9), weight))
    yield Sample("both transposed", (transposed, transposed, weight))


def _shape(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, keep_sum: bool) -> tuple[Tensor, Tensor]:
    return empty_contiguous(x), empty_contiguous(x) if keep_sum else x.new_empty(0)


@op(cost=_cost, samples=_samples, check=_check, shape=_shape)
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6, keep_sum: bool = True
) -> tuple[Tensor, Tensor]:
    """`rms_norm(x + residual)` and the sum itself, for the next residual connection: `(normed, sum)`.

    Shapes: x and residual (..., N); weight (N,) or None; both results are x's, contiguous.
    Without `keep_sum`, for where nobody reads the sum, the second result is empty: of shape (0,).
    Dtypes: x and residual the same; weight may differ. The sum is rounded to x's dtype and normalized from that, in
    float32 (float64 for float64), rounded once.
    Errors: ValueError for other sizes, TypeError for a residual of another dtype and for integers.
    Source: the pre-norm residual connection of Touvron et al., "LLaMA", arXiv:2302.13971.
    """
    total = (x + residual).contiguous()
    return rms_norm_reference(total, weight, eps), total if keep_sum else total.new_empty(0)


def _vector_norm_why_not(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, keep_sum: bool) -> list[str]:
    return not_on_cpu(x)


@add_rms_norm.impl("vector_norm", why_not=_vector_norm_why_not)
def _vector_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6, keep_sum: bool = True
) -> tuple[Tensor, Tensor]:
    """One addition, one reduction (linalg.vector_norm) and one fresh tensor, scaled in place."""
    total = (x + residual).contiguous()
    return rms_norm_by_vector_norm(total, weight, eps), total if keep_sum else total.new_empty(0)


def _torch_why_not(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, keep_sum: bool) -> list[str]:
    return not_same_dtype("weight", weight, "x", x)


@add_rms_norm.impl("torch", why_not=_torch_why_not, differentiable=True)
def _torch(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6, keep_sum: bool = True
) -> tuple[Tensor, Tensor]:
    """One addition and PyTorch's own rms_norm."""
    total = (x + residual).contiguous()
    return F.rms_norm(total, total.shape[-1:], weight, eps), total if keep_sum else total.new_empty(0)


def _triton_why_not(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, keep_sum: bool) -> list[str]:
    return triton_norm_why_not(x, weight)


def _triton_configs(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, keep_sum: bool) -> list[Any]:
    return triton_norm_configs(x, added=True)


@add_rms_norm.impl("triton", why_not=_triton_why_not, configs=_triton_configs, live_rows=True)
def _triton(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    keep_sum: bool = True,
    *,
    config: Any = None,
    live_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Addition and normalization in one pass over memory, whole rows in registers."""
    from burnish.kernels import norms

    return norms.add_rms_norm(x, residual, weight, eps, keep_sum, config, live_rows)


# --- training ---------------------------------------------------------------------------------------------------------


def _forward(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, keep_sum: bool
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, ...]]:
    """Keeps of x and residual their sum alone, with which the model goes on anyway. In a recorded graph it is PyTorch's
    operators: see `layer_norm`."""
    run = add_rms_norm.reference if is_traced(x) else add_rms_norm
    normed, total = run(x, residual, weight, eps)
    return (normed, total if keep_sum else total.new_empty(0)), (total, weight)


def _backward(saved: Saved, grad: Tensor | None, grad_sum: Tensor | None) -> Gradients:
    total, weight = saved.kept
    _, _, _, eps, keep_sum = saved.args
    grad_sum = grad_sum if keep_sum else None
    dtotal, dweight = grad_sum, None
    if grad is not None:
        need_weight = saved.needed[2]
        dtotal, found, *_ = rms_norm_backward(grad, total, weight, eps, grad_sum, need_weight)
        dweight = found if need_weight else None
    need_x, need_residual = saved.needed[:2]
    return dtotal if need_x else None, dtotal if need_residual else None, dweight, None, None


add_rms_norm.differentiate(_forward, _backward)
