"""A product with the vocabulary and its cross entropy, together with their gradients, for training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.numerics import randn
from burnish.op import Cost, Sample, op
from burnish.ops._common import check_floating, check_same_dtype, check_vector, nbytes, wide
from burnish.ops._cross_entropy import (
    Options,
    check_grad_loss,
    check_target,
    gradient_reference,
    loss_reference,
    rows_by_torch,
    targets,
)
from burnish.ops._linear_cross_entropy import Chunks, Wanted, chunk_configs, in_chunks, rows_by_triton
from burnish.ops._triton import triton_why_not

Results = tuple[Tensor, Tensor, Tensor, Tensor]


def check_product(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, options: Options) -> None:
    check_floating("x", x)
    if x.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be (T, K): a row for each token")
    if weight.dim() != 2 or weight.shape[1] != x.shape[1] or weight.shape[0] == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; for x of {tuple(x.shape)} it must be (V, K)")
    check_same_dtype("weight", weight, "x", x)
    check_vector("bias", bias, weight.shape[0], "one entry per row of weight")
    check_same_dtype("bias", bias, "x", x)
    options.check()
    check_target(target, x.shape[0], weight.shape[0], options.ignore_index)


def product_samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    """Arguments of `linear_cross_entropy`, every option among them."""

    def tensor(*shape: int, seed: int) -> Tensor:
        return randn(*shape, dtype=dtype, device=device, seed=seed)

    def given(rows: int, k: int, size: int, seed: int, ignored: int | None = -100) -> tuple[Tensor, Tensor, Tensor]:
        weight = randn(size, k, device=device, seed=seed + 1) / k**0.5
        return tensor(rows, k, seed=seed), weight.to(dtype), targets(rows, size, device, seed, ignored)

    yield Sample("odd", given(7, 24, 33, 0))
    yield Sample("bias, sum", (*given(20, 32, 130, 2), tensor(130, seed=4)), {"reduction": "sum"})
    yield Sample("none", given(9, 40, 200, 5), {"reduction": "none"})
    every = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 20.0, "ignore_index": -1}
    yield Sample("every option", given(11, 40, 257, 7, ignored=-1), every)
    x, weight, target = given(10, 48, 96, 9)
    yield Sample("transposed", (x.t().contiguous().t(), weight.t().contiguous().t(), target))
    yield Sample("several chunks", given(300, 16, 64, 11), {"label_smoothing": 0.05})
    yield Sample("8x64x50257", given(8, 64, 50257, 13))


def _check(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    grad_loss: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    reduction: str,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> None:
    check_product(x, weight, target, bias, Options(ignore_index, label_smoothing, z_loss, softcap, reduction))
    check_grad_loss(grad_loss, x.shape[0], reduction)
    if reduction == "none" and needs_weight and grad_loss is None:
        raise ValueError("grad_loss is None; with reduction 'none' a weight has no gradient before each loss has one")
    if needs_bias and bias is None:
        raise ValueError("needs_bias is set where bias is None")


def _cost(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    grad_loss: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    reduction: str,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> Cost:
    products = 1 + needs_x + needs_weight
    written = nbytes(x if needs_x else None, weight if needs_weight else None, bias if needs_bias else None)
    flops = 2 * products * x.shape[0] * x.shape[1] * weight.shape[0] + 9 * x.shape[0] * weight.shape[0]
    return Cost(flops, nbytes(x, weight, target, bias, grad_loss) + written + 4 * x.shape[0])


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    for i, sample in enumerate(product_samples(device, dtype)):
        x, weight, target, *bias = sample.args
        each = sample.kwargs.get("reduction") == "none"
        grad_loss = None
        if each or i % 2:
            shape = x.shape[:1] if each else ()
            grad_loss = randn(*shape, dtype=torch.float32, device=device, seed=i, outliers=0.0)
        args = x, weight, target, bias[0] if bias else None, grad_loss
        yield Sample(sample.label, args, {**sample.kwargs, "needs_bias": bool(bias)})
        if sample.label == "odd":
            yield Sample("only x", args, {"needs_weight": False, "needs_bias": False})
            yield Sample("only weight", args, {"needs_x": False, "needs_bias": False})


def _shape(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    grad_loss: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    reduction: str,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> Results:
    loss = x.new_empty(x.shape[:1] if reduction == "none" else (), dtype=wide(x.dtype))
    return (
        loss,
        x.new_empty(x.shape if needs_x else 0),
        x.new_empty(weight.shape if needs_weight else 0),
        x.new_empty(weight.shape[:1] if needs_bias else 0),
    )


@op(cost=_cost, samples=_samples, check=_check, shape=_shape, follows="linear_cross_entropy")
def linear_cross_entropy_with_gradients(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    grad_loss: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    needs_x: bool = True,
    needs_weight: bool = True,
    needs_bias: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`linear_cross_entropy` and its gradients: `(loss, d_x, d_weight, d_bias)`, those not wanted of shape (0,).

    Shapes: as of `linear_cross_entropy`; grad_loss, by which the gradients are multiplied, is None for 1, else one
    number or, with reduction "none", (T,). The gradients are shaped as what they are of, contiguous.
    Dtypes: x, weight and bias the same floating one, which the gradients have; the logits' gradient is rounded to it,
    sums over tokens are made in float32. target int64; the loss as of `cross_entropy`.
    Errors: as of `linear_cross_entropy`; ValueError for a grad_loss that is not shaped as the loss, or that is missing
    where reduction is "none" and the weight's gradient is wanted, and for needs_bias without a bias.
    Source: Hsu et al., "Liger Kernel", arXiv:2410.10989, section 3.2.
    """
    options = Options(ignore_index, label_smoothing, z_loss, softcap, reduction)
    logits = F.linear(x, weight, bias)
    gradient = gradient_reference(logits, target, grad_loss, options).to(x.dtype)
    return (
        loss_reference(logits, target, options),
        (gradient @ weight).contiguous() if needs_x else x.new_empty(0),
        (gradient.t() @ x).contiguous() if needs_weight else x.new_empty(0),
        gradient.sum(dim=0) if needs_bias else x.new_empty(0),
    )


def _configs(x: Tensor, weight: Tensor, *rest: Any) -> list[Chunks]:
    return chunk_configs(x, weight)


def _triton_why_not(x: Tensor, *rest: Any) -> list[str]:
    return triton_why_not(x)


@linear_cross_entropy_with_gradients.impl("torch_triton", why_not=_triton_why_not, configs=_configs)
def _torch_triton(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    grad_loss: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    needs_x: bool = True,
    needs_weight: bool = True,
    needs_bias: bool = False,
    *,
    config: Any = None,
) -> Results:
    """PyTorch's products in chunks of rows, whose logits one Triton kernel overwrites with their gradient."""
    options = Options(ignore_index, label_smoothing, z_loss, softcap, reduction)
    wanted = Wanted(needs_x, needs_weight, needs_bias)
    chunk = (config or chunk_configs(x, weight)[0]).rows
    return in_chunks(x, weight, target, bias, grad_loss, options, wanted, rows_by_triton, chunk)


@linear_cross_entropy_with_gradients.impl("torch", configs=_configs)
def _torch(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    grad_loss: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    needs_x: bool = True,
    needs_weight: bool = True,
    needs_bias: bool = False,
    *,
    config: Any = None,
) -> Results:
    """PyTorch's products and its log_softmax, in chunks of rows whose gradient takes the logits' place."""
    options = Options(ignore_index, label_smoothing, z_loss, softcap, reduction)
    wanted = Wanted(needs_x, needs_weight, needs_bias)
    chunk = (config or chunk_configs(x, weight)[0]).rows
    return in_chunks(x, weight, target, bias, grad_loss, options, wanted, rows_by_torch, chunk)
