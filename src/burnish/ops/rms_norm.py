"""Root-mean-square normalization over the last dimension."""

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
from burnish.ops._norms import check_norm, empty_contiguous, rms_norm_by_vector_norm, rms_norm_reference
from burnish.ops._triton_norms import triton_norm_configs, triton_norm_why_not
from burnish.ops.rms_norm_backward import rms_norm_backward


def _check(x: Tensor, weight: Tensor | None, eps: float) -> None:
    check_norm(x, weight)


def _cost(x: Tensor, weight: Tensor | None, eps: float) -> Cost:
    return Cost(4 * x.numel(), 2 * nbytes(x) + nbytes(weight))


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def tensor(*shape: int, seed: int) -> Tensor:
        return randn(*shape, dtype=dtype, device=device, seed=seed)

    weight = tensor(1024, seed=1)
    yield Sample("128x1024", (tensor(1, 128, 1024, seed=0), weight, 1e-5))
    yield Sample("odd", (tensor(7, 33, seed=2), tensor(33, seed=3)))
    yield Sample("plain", (tensor(2, 16, 1024, seed=4), None))
    yield Sample("offset", (tensor(4, 4096, seed=5) * 0.5 - 20, None))
    yield Sample("transposed", (tensor(5, 1024, 3, seed=6).transpose(1, 2), weight))
    yield Sample("float32 weight", (tensor(2, 16, 1024, seed=7), weight.float()))


def _shape(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return empty_contiguous(x)


@op(cost=_cost, samples=_samples, check=_check, shape=_shape)
def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension.

    Shapes: x (..., N); weight (N,) or None; the result is x's, contiguous.
    Dtypes: all floating; weight may differ from x. Computed in float32 (float64 for float64), rounded once to x's.
    Errors: ValueError for a weight of another size, TypeError for integers.
    Source: Zhang, Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.
    """
    return rms_norm_reference(x, weight, eps)


def _vector_norm_why_not(x: Tensor, weight: Tensor | None, eps: float) -> list[str]:
    return not_on_cpu(x)


@rms_norm.impl("vector_norm", why_not=_vector_norm_why_not)
def _vector_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """One reduction (linalg.vector_norm) and one fresh tensor, scaled in place."""
    return rms_norm_by_vector_norm(x.contiguous(), weight, eps)


def _torch_why_not(x: Tensor, weight: Tensor | None, eps: float) -> list[str]:
    return not_same_dtype("weight", weight, "x", x)


@rms_norm.impl("torch", why_not=_torch_why_not, differentiable=True)
def _torch(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """PyTorch's own rms_norm."""
    return F.rms_norm(x, x.shape[-1:], weight, eps).contiguous()


def _triton_why_not(x: Tensor, weight: Tensor | None, eps: float) -> list[str]:
    return triton_norm_why_not(x, weight)


def _triton_configs(x: Tensor, weight: Tensor | None, eps: float) -> list[Any]:
    return triton_norm_configs(x, added=False)


@rms_norm.impl("triton", why_not=_triton_why_not, configs=_triton_configs, live_rows=True)
def _triton(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    config: Any = None,
    live_rows: Tensor | None = None,
) -> Tensor:
    """One pass over memory, whole rows in registers."""
    from burnish.kernels import norms

    return norms.rms_norm(x, weight, eps, config, live_rows)


# --- training ---------------------------------------------------------------------------------------------------------


def _forward(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Keeps no statistics, and is PyTorch's operators in a recorded graph: see `layer_norm`."""
    run = rms_norm.reference if is_traced(x) else rms_norm
    return run(x, weight, eps), (x, weight)


def _backward(saved: Saved, grad: Tensor | None) -> Gradients:
    if grad is None:
        return None, None, None
    x, weight = saved.kept
    need_x, need_weight, _ = saved.needed
    dx, dweight, *_ = rms_norm_backward(grad, x, weight, saved.args[2], weight_grad=need_weight)
    return dx if need_x else None, dweight if need_weight else None, None


rms_norm.differentiate(_forward, _backward)
