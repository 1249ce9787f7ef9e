"""Cross entropy together with the gradient of the logits, for training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from burnish.numerics import randn
from burnish.op import Cost, Sample, op
from burnish.ops._common import check_floating, nbytes, wide
from burnish.ops._cross_entropy import (
    Options,
    check_grad_loss,
    check_target,
    gradient_reference,
    logits_samples,
    loss_reference,
    mean_share,
    reduce,
    rows_by_torch,
)
from burnish.ops._triton import triton_why_not


def _check(logits: Tensor, target: Tensor, grad_loss: Tensor | None, *options: Any) -> None:
    check_floating("logits", logits)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; it must be (T, V), of V classes for each token")
    given = Options(*options)
    given.check()
    check_target(target, logits.shape[0], logits.shape[1], given.ignore_index)
    check_grad_loss(grad_loss, logits.shape[0], given.reduction)


def _cost(logits: Tensor, target: Tensor, grad_loss: Tensor | None, *options: Any) -> Cost:
    # As `cross_entropy`, and once more a difference and an exponential, a product and a subtraction.
    return Cost(9 * logits.numel(), 2 * nbytes(logits) + nbytes(target, grad_loss) + 4 * target.numel())


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    for i, sample in enumerate(logits_samples(device, dtype)):
        logits, target = sample.args
        grad_loss = None
        if i % 2:
            shape = logits.shape[:1] if sample.kwargs.get("reduction") == "none" else ()
            grad_loss = randn(*shape, dtype=torch.float32, device=device, seed=i, outliers=0.0)
        yield Sample(sample.label, (logits, target, grad_loss), sample.kwargs)
    logits, target = randn(6, 150, dtype=dtype, device=device, seed=50), torch.arange(6, device=device)
    grads = randn(6, dtype=torch.float32, device=device, seed=51)
    yield Sample("a gradient of each loss", (logits, target, grads), {"reduction": "none", "z_loss": 1e-3})


def _shape(
    logits: Tensor,
    target: Tensor,
    grad_loss: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    loss = logits.new_empty(logits.shape[:1] if reduction == "none" else (), dtype=wide(logits.dtype))
    return loss, logits.new_empty(logits.shape)


@op(cost=_cost, samples=_samples, check=_check, shape=_shape, follows="cross_entropy")
def cross_entropy_with_gradient(
    logits: Tensor,
    target: Tensor,
    grad_loss: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    """`cross_entropy` and the gradient of its logits, times that of the loss where it is known: `(loss, d_logits)`.

    Shapes: as of `cross_entropy`; grad_loss is None for 1, else one number or, with reduction "none", (T,). d_logits is
    (T, V), contiguous; row t of it 0 where target is ignore_index.
    Dtypes: logits floating, d_logits the same; grad_loss floating, target int64; computed in float32 (float64 for
    float64), which the loss has.
    Errors: as of `cross_entropy`, and ValueError for a grad_loss that is not shaped as the loss.
    Source: the forward pass that leaves the gradient is that of Hsu et al., "Liger Kernel", arXiv:2410.10989; those of
    the loss are at `cross_entropy`.
    """
    options = Options(ignore_index, label_smoothing, z_loss, softcap, reduction)
    gradient = gradient_reference(logits, target, grad_loss, options)
    return loss_reference(logits, target, options), gradient.to(logits.dtype).contiguous()


def _triton_why_not(logits: Tensor, target: Tensor, grad_loss: Tensor | None, *options: Any) -> list[str]:
    return triton_why_not(logits)


def _triton_configs(logits: Tensor, target: Tensor, grad_loss: Tensor | None, *options: Any) -> list[Any]:
    from burnish.kernels.cross_entropy import cross_entropy_configs
    from burnish.kernels.launch import target_of

    return cross_entropy_configs(logits.shape[0], logits.shape[1], logits.dtype, True, target_of(logits))


@cross_entropy_with_gradient.impl("triton", why_not=_triton_why_not, configs=_triton_configs)
def _triton(
    logits: Tensor,
    target: Tensor,
    grad_loss: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    *,
    config: Any = None,
) -> tuple[Tensor, Tensor]:
    """Logits read from memory once, and from the L2 cache for the gradient."""
    from burnish.kernels import cross_entropy as kernels

    numbers = ignore_index, label_smoothing, z_loss, softcap, reduction
    loss, gradient = kernels.cross_entropy(logits, target, grad_loss, *numbers, backward=True, config=config)
    assert gradient is not None
    return loss, gradient


@cross_entropy_with_gradient.impl("torch")
def _torch(
    logits: Tensor,
    target: Tensor,
    grad_loss: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    """PyTorch's log_softmax, and in its place the gradient, in blocks of rows."""
    losses = logits.new_empty(logits.shape[0], dtype=wide(logits.dtype))
    gradient = logits.new_empty(logits.shape)
    share = mean_share(target, ignore_index, losses.dtype) if reduction == "mean" else None
    rows_by_torch(logits, target, share, grad_loss, losses, gradient, ignore_index, label_smoothing, z_loss, softcap)
    return reduce(losses, share, reduction), gradient
