"""Cross entropy of logits and the classes that were wanted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from burnish.autograd import Gradients, Saved
from burnish.op import Cost, Sample, op
from burnish.ops._common import check_floating, is_traced, nbytes, wide
from burnish.ops._cross_entropy import (
    Options,
    check_target,
    gradient_at_backward,
    logits_samples,
    loss_reference,
    mean_share,
    reduce,
    rows_by_torch,
)
from burnish.ops._triton import triton_why_not
from burnish.ops.cross_entropy_with_gradient import cross_entropy_with_gradient
from burnish.ops.scale_gradient import scaled_gradient


def _check(logits: Tensor, target: Tensor, *options: Any) -> None:
    check_floating("logits", logits)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; it must be (T, V), of V classes for each token")
    given = Options(*options)
    given.check()
    check_target(target, logits.shape[0], logits.shape[1], given.ignore_index)


def _cost(logits: Tensor, target: Tensor, *options: Any) -> Cost:
    # A difference, an exponential, a comparison and two additions for each logit.
    return Cost(5 * logits.numel(), nbytes(logits, target) + 4 * target.numel())


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    yield from logits_samples(device, dtype)


def _shape(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    reduction: str,
) -> Tensor:
    return logits.new_empty(logits.shape[:1] if reduction == "none" else (), dtype=wide(logits.dtype))


@op(cost=_cost, samples=_samples, check=_check, shape=_shape)
def cross_entropy(
    logits: Tensor,
    target: Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`-log(softmax(logits)[target])`, of each row, or their sum or mean; smoothed, capped and with z-loss if wanted.

    Shapes: logits (T, V), of any strides; target (T,), the wanted class of each row, from 0 to V - 1, or ignore_index.
    The result has no dimensions, and (T,) with reduction "none".
    The loss of a row, of c = softcap * tanh(logits / softcap), or c = logits: the sum over classes of
    -w * log(softmax(c)), w being label_smoothing / V and, of the target, 1 - label_smoothing more; and z_loss *
    logsumexp(c)^2. An ignored row's loss and gradient are 0. `reduction` is "mean" (over the rows that are not
    ignored), "sum" or "none".
    All rows ignored: the mean is NaN, as PyTorch's is, and the gradient 0: nobody should take it for a perfect loss,
    and no weight is spoiled by it.
    Dtypes: logits floating, target int64; computed in float32 (float64 for float64), which the result has: half
    precision would tell losses near 3 only to 1/64.
    Errors: ValueError for shapes, for numbers out of range and, on a CPU, for a target out of range; there is NaN in
    its row's loss and gradient on other devices, which nobody can be told of without waiting. TypeError for dtypes.
    Training: the forward pass leaves the gradient of the logits, in their dtype, and not the logits; see
    `cross_entropy_with_gradient`. In float16, and in a graph of torch.compile, they stay, and the backward pass
    computes it. Second derivatives need `use(cross_entropy="reference")` otherwise.
    Source: torch.nn.functional.cross_entropy; label smoothing is Szegedy et al., arXiv:1512.00567, section 7; z-loss
    Chowdhery et al., "PaLM", arXiv:2204.02311, section 5; the cap Gemma Team, "Gemma 2", arXiv:2408.00118, section 2.
    """
    options = Options(ignore_index, label_smoothing, z_loss, softcap, reduction)
    return loss_reference(logits, target, options)


def _triton_why_not(logits: Tensor, target: Tensor, *options: Any) -> list[str]:
    return triton_why_not(logits)


def _triton_configs(logits: Tensor, target: Tensor, *options: Any) -> list[Any]:
    from burnish.kernels.cross_entropy import cross_entropy_configs
    from burnish.kernels.launch import target_of

    return cross_entropy_configs(logits.shape[0], logits.shape[1], logits.dtype, False, target_of(logits))


@cross_entropy.impl("triton", why_not=_triton_why_not, configs=_triton_configs)
def _triton(
    logits: Tensor,
    target: Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    *,
    config: Any = None,
) -> Tensor:
    """Logits read once, by a softmax that keeps its sum as it goes."""
    from burnish.kernels import cross_entropy as kernels

    numbers = ignore_index, label_smoothing, z_loss, softcap, reduction
    return kernels.cross_entropy(logits, target, None, *numbers, backward=False, config=config)[0]


@cross_entropy.impl("torch")
def _torch(
    logits: Tensor,
    target: Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """PyTorch's log_softmax, in blocks of rows: nothing of the logits' size is made."""
    losses = logits.new_empty(logits.shape[0], dtype=wide(logits.dtype))
    rows_by_torch(logits, target, None, None, losses, None, ignore_index, label_smoothing, z_loss, softcap)
    share = mean_share(target, ignore_index, losses.dtype) if reduction == "mean" else None
    return reduce(losses, share, reduction)


def _forward(logits: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Eagerly the gradient, which takes the logits' place: 2 passes over memory for 3, 0.5 ms at 8192 x 128256.

    Not in a graph that is recorded: there the backward pass could not multiply it in place, which makes 4 passes of the
    2, and the logits are mostly kept anyway, because the model returns them: without that, the product before would
    have become a `linear_cross_entropy`.
    """
    if is_traced(logits) or gradient_at_backward(logits):
        return cross_entropy(logits, target, *options), (logits, target)
    loss, gradient = cross_entropy_with_gradient(logits, target, None, *options)
    return loss, (gradient,)


def _backward(saved: Saved, *grads: Tensor | None) -> Gradients:
    nothing = (None,) * (len(saved.args) - 1)
    (grad_loss,) = grads
    if grad_loss is None:
        return None, *nothing
    if len(saved.kept) == 1:
        return scaled_gradient(saved.kept[0], grad_loss), *nothing
    logits, target = saved.kept
    return cross_entropy_with_gradient(logits, target, grad_loss, *saved.args[2:])[1], *nothing


cross_entropy.differentiate(_forward, _backward)
