"""What the Ops of cross entropy share: their checks, what each row's loss and gradient are, and the walk over rows by
PyTorch's own functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from burnish.numerics import randn
from burnish.op import Sample
from burnish.ops._common import check_floating, is_traced, wide

REDUCTIONS = ("mean", "sum", "none")
# Rows that are taken at once, in float32: what is made beside the results. 512 x 50257 on one core of a CPU: 380 ms in
# blocks of 1 MB, which stay in its L2 cache, 335 of 16 and 320 of 64 (eager: 510); threads wait at each block's end.
_BLOCK_BYTES = 32 << 20


@dataclass(frozen=True)
class Options:
    """The numbers that every Op of cross entropy takes, in the Ops' order."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None
    reduction: str

    def check(self) -> None:
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; it must be between 0 and 1")
        if not (self.z_loss >= 0 and math.isfinite(self.z_loss)):
            raise ValueError(f"z_loss is {self.z_loss}; it must be a factor of at least 0")
        if self.softcap is not None and not (self.softcap > 0 and math.isfinite(self.softcap)):
            raise ValueError(f"softcap is {self.softcap}; it must be above 0, or None for no cap")
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"reduction is {self.reduction!r}; it must be one of {', '.join(REDUCTIONS)}")


def check_target(target: Tensor, rows: Any, size: Any, ignore_index: int) -> None:
    """int64 of `rows` entries. On a CPU, where looking costs nothing, also each from 0 to size - 1 or ignored."""
    if target.dtype != torch.int64:
        raise TypeError(f"target has dtype {target.dtype}; it must be torch.int64: the number of each row's class")
    if target.dim() != 1 or target.shape[0] != rows:
        raise ValueError(f"target has shape {tuple(target.shape)}; it must be ({rows},): one class for each row")
    plain = type(target) is Tensor and torch._C._functorch.maybe_current_level() is None
    if not plain or target.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = (target != ignore_index) & ((target < 0) | (target >= size))
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise ValueError(
            f"target has {int(target[at])} at row {at}; it must be from 0 to {size - 1}, or {ignore_index} "
            "(ignore_index)"
        )


def check_grad_loss(grad_loss: Tensor | None, rows: Any, reduction: str) -> None:
    if grad_loss is None:
        return
    check_floating("grad_loss", grad_loss)
    if reduction == "none" and (grad_loss.dim() != 1 or grad_loss.shape[0] != rows):
        raise ValueError(f"grad_loss has shape {tuple(grad_loss.shape)}; it must be ({rows},), as the losses")
    if reduction != "none" and grad_loss.dim() != 0:
        raise ValueError(f"grad_loss has shape {tuple(grad_loss.shape)}; it must be one number, as the loss")


# --- the definition ---------------------------------------------------------------------------------------------------


def row_losses(logits: Tensor, target: Tensor, options: Options) -> Tensor:
    """The loss of each row (T,), in `wide(logits.dtype)`; 0 where it is ignored, NaN for a target out of range."""
    capped = cap(logits.to(wide(logits.dtype)), options.softcap)
    kept, inside, index = sorted_out(target, capped.shape[1], options.ignore_index)
    logp = capped.log_softmax(dim=-1)
    losses = -(1 - options.label_smoothing) * logp.gather(1, index[:, None]).squeeze(1)
    if options.label_smoothing:
        losses = losses - options.label_smoothing * logp.mean(dim=-1)
    if options.z_loss:
        losses = losses + options.z_loss * capped.logsumexp(dim=-1).square()
    return losses.where(inside, torch.nan).where(kept, 0.0)


def row_gradients(logits: Tensor, target: Tensor, weights: Tensor | None, options: Options) -> Tensor:
    """The gradient of the sum of `row_losses` (T, V), each row of it times `weights` (T,), in `wide(logits.dtype)`."""
    capped = cap(logits.to(wide(logits.dtype)), options.softcap)
    size = capped.shape[1]
    kept, inside, index = sorted_out(target, size, options.ignore_index)
    shares = capped.softmax(dim=-1)
    if options.z_loss:
        shares = shares * (1 + 2 * options.z_loss * capped.logsumexp(dim=-1, keepdim=True))
    wanted = torch.zeros_like(shares).scatter(1, index[:, None], 1 - options.label_smoothing)
    gradient = shares - wanted - options.label_smoothing / size
    if options.softcap is not None:
        gradient = gradient * (1 - (capped / options.softcap).square())
    if weights is not None:
        gradient = gradient * weights[:, None]
    return gradient.where(inside[:, None], torch.nan).where(kept[:, None], 0.0)


def cap(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * (logits / softcap).tanh()


def sorted_out(target: Tensor, size: int, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which rows count, whose target is a class, and that class, or 0 where it is none."""
    kept, inside = target != ignore_index, (target >= 0) & (target < size)
    return kept, inside, target.where(inside & kept, 0)


def mean_share(target: Tensor, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """One over the number of targets that count; NaN where none does, as PyTorch's mean of no losses is."""
    count = (target != ignore_index).sum().to(dtype)
    return (1 / count).where(count > 0, torch.nan)


def reduce(losses: Tensor, share: Tensor | None, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    return losses.sum() if share is None else losses.sum() * share


def loss_reference(logits: Tensor, target: Tensor, options: Options) -> Tensor:
    share = None
    if options.reduction == "mean":
        share = mean_share(target, options.ignore_index, wide(logits.dtype))
    return reduce(row_losses(logits, target, options), share, options.reduction)


def gradient_reference(logits: Tensor, target: Tensor, grad_loss: Tensor | None, options: Options) -> Tensor:
    """The gradient of `loss_reference` times `grad_loss`, in `wide(logits.dtype)`."""
    weights = None
    if options.reduction == "mean":
        weights = mean_share(target, options.ignore_index, wide(logits.dtype)).expand(target.shape)
    if grad_loss is not None:
        weights = grad_loss.expand(target.shape) * (1 if weights is None else weights)
    return row_gradients(logits, target, weights, options)


# --- rows by PyTorch's functions --------------------------------------------------------------------------------------

Rows: TypeAlias = Callable[..., None]
"""`(logits, target, share, grad_loss, losses, gradient, ignore_index, label_smoothing, z_loss, softcap)`: writes each
row's loss and, where `gradient` is given (it may be `logits`), its gradient times `share` and `grad_loss`."""


def rows_by_torch(
    logits: Tensor,
    target: Tensor,
    share: Tensor | None,
    grad_loss: Tensor | None,
    losses: Tensor,
    gradient: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> None:
    """In blocks of rows, one log_softmax each, in whose place the gradient comes."""
    options = Options(ignore_index, label_smoothing, z_loss, softcap, "none")
    for start, stop in _blocks(logits):
        block = logits[start:stop]
        per_row = grad_loss if grad_loss is None or grad_loss.dim() == 0 else grad_loss[start:stop]
        weights = share if per_row is None else per_row if share is None else per_row * share
        to = None if gradient is None else gradient[start:stop]
        _block_by_torch(block, target[start:stop], weights, losses[start:stop], to, options)


def _blocks(logits: Tensor) -> Iterator[tuple[int, int]]:
    rows, size = logits.shape
    bytes_of_row = max(1, size * wide(logits.dtype).itemsize)
    step = max(1, _BLOCK_BYTES // bytes_of_row)
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def _block_by_torch(
    logits: Tensor, target: Tensor, weights: Tensor | None, losses: Tensor, gradient: Tensor | None, options: Options
) -> None:
    dtype, size, smoothing = losses.dtype, logits.shape[1], options.label_smoothing
    kept, inside, index = sorted_out(target, size, options.ignore_index)
    slope = None
    capped = logits.to(dtype)
    if options.softcap is not None:
        slope = (capped / options.softcap).tanh_()
        capped = slope * options.softcap
    largest = capped.amax(dim=-1) if options.z_loss else None
    in_place = gradient is not None and gradient.dtype == dtype
    logp = torch.log_softmax(capped, dim=-1, out=gradient) if in_place else torch.log_softmax(capped, dim=-1)
    found = logp.gather(1, index[:, None]).squeeze(1).mul_(smoothing - 1)
    if smoothing:
        found.sub_(logp.mean(dim=-1), alpha=smoothing)
    log_sum_exp = None
    if largest is not None:
        log_sum_exp = largest - logp.amax(dim=-1)
        found.add_(log_sum_exp.square(), alpha=options.z_loss)
    losses.copy_(found.where(inside, torch.nan).where(kept, 0.0))
    if gradient is None:
        return
    weight = torch.ones_like(found) if weights is None else weights.to(dtype).expand(found.shape)
    weight = weight.where(inside, torch.nan).where(kept, 0.0)
    factor = weight if log_sum_exp is None else weight * (1 + 2 * options.z_loss * log_sum_exp)
    grad = logp.exp_().mul_(factor[:, None])
    if smoothing:
        grad.sub_((weight * (smoothing / size))[:, None])
    grad.scatter_add_(1, index[:, None], (weight * (smoothing - 1))[:, None])
    if slope is not None:
        grad.mul_(slope.square_().neg_().add_(1))
    grad.masked_fill_(~kept[:, None], 0)  # also where the logits are NaN or infinite
    if not in_place:
        gradient.copy_(grad)


# --- how the backward pass gets its gradient --------------------------------------------------------------------------


def gradient_at_backward(x: Tensor) -> bool:
    """Whether the gradient is computed in the backward pass, from what the forward pass kept of its arguments.

    It is otherwise left by the forward pass: that saves a walk over the logits (or their product with the weight), and
    the backward pass only multiplies it by the loss's gradient. But float16 loses what is below 6e-8, which
    torch.amp.GradScaler prevents by a large gradient of the loss: that has to be known before the gradient is rounded.
    """
    return x.dtype == torch.float16


def may_overwrite(gradient: Tensor) -> bool:
    """Whether a backward pass that is running may write into what the forward pass kept: it is freed right after.

    That is not so with `retain_graph` or `create_graph`, where another backward pass may come and read it, nor in a
    graph that is recorded.
    """
    kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)  # as AOTAutograd asks
    return not (is_traced(gradient) or torch.compiler.is_compiling() or kept is None or kept())


# --- samples ----------------------------------------------------------------------------------------------------------


def targets(rows: int, size: int, device: torch.device, seed: int, ignored: int | None = -100) -> Tensor:
    """Random classes, of which every fifth is ignored."""
    drawn = torch.randint(size, (rows,), generator=torch.Generator().manual_seed(seed))
    if ignored is not None:
        drawn[2::5] = ignored
    return drawn.to(device)


def logits_samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    """Logits and targets with every option."""

    def given(rows: int, size: int, seed: int, ignored: int | None = -100) -> tuple[Tensor, Tensor]:
        logits = randn(rows, size, dtype=dtype, device=device, seed=seed)
        return logits, targets(rows, size, device, seed, ignored)

    yield Sample("odd", given(7, 33, 0))
    yield Sample("sum", given(9, 1000, 1), {"reduction": "sum"})
    yield Sample("none", given(5, 1000, 2), {"reduction": "none"})
    yield Sample("ignore_index", given(6, 130, 3, ignored=-1), {"ignore_index": -1})
    yield Sample("smoothed", given(6, 1001, 4), {"label_smoothing": 0.1})
    yield Sample("z-loss", given(6, 520, 5), {"z_loss": 1e-2})
    yield Sample("softcap", given(6, 520, 6), {"softcap": 15.0})
    every = {"label_smoothing": 0.2, "z_loss": 1e-3, "softcap": 30.0, "reduction": "none", "ignore_index": 0}
    yield Sample("every option", given(8, 777, 7, ignored=0), every)
    logits, target = given(5, 96, 8)
    yield Sample("transposed", (logits.t().contiguous().t(), target), {"label_smoothing": 0.1})
    yield Sample("rows of a wider matrix", (randn(5, 160, dtype=dtype, device=device, seed=9)[:, 16:112], target))
    far = (given(6, 200, 10)[0].sign() * 1e4).to(dtype)
    yield Sample("far apart", (far, targets(6, 200, device, 10)), {"reduction": "sum"})
    yield Sample("one class", (given(3, 1, 11)[0], torch.zeros(3, dtype=torch.int64, device=device)), {"z_loss": 0.1})
    yield Sample("3x50257", given(3, 50257, 12))
    yield Sample("2x128256", given(2, 128256, 13, ignored=None))
