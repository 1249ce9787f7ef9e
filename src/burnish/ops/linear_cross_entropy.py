"""Cross entropy of a product with the vocabulary, whose logits are never in memory as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.autograd import Gradients, Saved
from burnish.op import Cost, Sample, op
from burnish.ops._common import nbytes, wide
from burnish.ops._cross_entropy import Options, gradient_at_backward, loss_reference, rows_by_torch
from burnish.ops._linear_cross_entropy import Chunks, Wanted, chunk_configs, in_chunks, rows_by_triton
from burnish.ops._triton import triton_why_not
from burnish.ops.linear_cross_entropy_with_gradients import (
    check_product,
    linear_cross_entropy_with_gradients,
    product_samples,
)
from burnish.ops.scale_gradient import scaled_gradient

_NO_GRADIENT = Wanted(x=False, weight=False, bias=False)


def _check(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, *options: Any) -> None:
    check_product(x, weight, target, bias, Options(*options))


def _cost(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, *options: Any) -> Cost:
    flops = 2 * x.shape[0] * x.shape[1] * weight.shape[0] + 5 * x.shape[0] * weight.shape[0]
    return Cost(flops, nbytes(x, weight, target, bias) + 4 * x.shape[0])


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    yield from product_samples(device, dtype)


def _shape(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    reduction: str,
) -> Tensor:
    return x.new_empty(x.shape[:1] if reduction == "none" else (), dtype=wide(x.dtype))


@op(cost=_cost, samples=_samples, check=_check, shape=_shape)
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`cross_entropy(x @ weight.T + bias, target)`: the logits (T, V) are never in memory as a whole.

    Shapes: x (T, K); weight (V, K), of any strides; target (T,), from 0 to V - 1, or ignore_index; bias (V,) or None.
    The result has no dimensions, and (T,) with reduction "none". What the options mean is told at `cross_entropy`.
    Dtypes: x, weight and bias the same floating one, to which the logits are rounded; target int64; the result is
    float32 (float64 for float64).
    Errors: ValueError for sizes that do not fit, for numbers out of range and, on a CPU, for a target out of range (NaN
    elsewhere); TypeError for dtypes.
    Training: the forward pass leaves the gradients of x, weight and bias, and keeps none of them; chunk by chunk the
    gradient of the logits takes their place. That spares one of four products, which a backward pass that began with
    the logits again would need; reduction "none" and float16 do, for there the loss's gradient has to be known before.
    Source: Hsu et al., "Liger Kernel", arXiv:2410.10989, section 3.2; those of the loss are at `cross_entropy`.
    """
    options = Options(ignore_index, label_smoothing, z_loss, softcap, reduction)
    return loss_reference(F.linear(x, weight, bias), target, options)


def _configs(x: Tensor, weight: Tensor, *rest: Any) -> list[Chunks]:
    return chunk_configs(x, weight)


def _triton_why_not(x: Tensor, *rest: Any) -> list[str]:
    return triton_why_not(x)


@linear_cross_entropy.impl("torch_triton", why_not=_triton_why_not, configs=_configs)
def _torch_triton(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    *,
    config: Any = None,
) -> Tensor:
    """PyTorch's product in chunks of rows, each read once by a Triton kernel."""
    options = Options(ignore_index, label_smoothing, z_loss, softcap, reduction)
    chunk = (config or chunk_configs(x, weight)[0]).rows
    return in_chunks(x, weight, target, bias, None, options, _NO_GRADIENT, rows_by_triton, chunk)[0]


@linear_cross_entropy.impl("torch", configs=_configs)
def _torch(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    *,
    config: Any = None,
) -> Tensor:
    """PyTorch's product and its log_softmax, in chunks of rows."""
    options = Options(ignore_index, label_smoothing, z_loss, softcap, reduction)
    chunk = (config or chunk_configs(x, weight)[0]).rows
    return in_chunks(x, weight, target, bias, None, options, _NO_GRADIENT, rows_by_torch, chunk)[0]


def _forward(
    x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, *options: Any
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    if options[-1] == "none" or gradient_at_backward(x):
        return linear_cross_entropy(x, weight, target, bias, *options), (x, weight, target, bias)
    needs = x.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad
    loss, *gradients = linear_cross_entropy_with_gradients(x, weight, target, bias, None, *options, *needs)
    kept = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
    return loss, tuple(kept)


def _backward(saved: Saved, *grads: Tensor | None) -> Gradients:
    nothing = (None,) * (len(saved.args) - 4)
    (grad_loss,) = grads
    if grad_loss is None:
        return None, None, None, None, *nothing
    if len(saved.kept) == 3:
        d_x, d_weight, d_bias = (None if kept is None else scaled_gradient(kept, grad_loss) for kept in saved.kept)
    else:
        x, weight, target, bias = saved.kept
        needs = saved.needed[0], saved.needed[1], saved.needed[3]
        _, *found = linear_cross_entropy_with_gradients(x, weight, target, bias, grad_loss, *saved.args[4:], *needs)
        d_x, d_weight, d_bias = (gradient if need else None for gradient, need in zip(found, needs, strict=True))
    return d_x, d_weight, None, d_bias, *nothing


linear_cross_entropy.differentiate(_forward, _backward)
