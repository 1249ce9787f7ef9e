"""The backward pass of `rms_norm`, alone or after a residual addition."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from burnish.numerics import randn
from burnish.op import Cost, Sample, op
from burnish.ops._common import nbytes, not_same_dtype, wide
from burnish.ops._norms import (
    asked,
    backward_reference,
    bytes_of_further,
    check_half,
    check_like_x,
    check_norm,
    empty_contiguous,
    empty_further,
    empty_like_asked,
    further,
    native_layer_norm_backward,
    rms_norm_by_vector_norm,
    rms_norm_reference,
)
from burnish.ops._triton_norms import triton_norm_backward_configs, triton_norm_why_not


def _check(
    grad: Tensor, x: Tensor, weight: Tensor | None, eps: float, grad_sum: Tensor | None, weight_grad: bool,
    narrow: torch.dtype | None, dx_sum: bool, normed: torch.dtype | None,
) -> None:  # fmt: skip
    check_norm(x, weight)
    check_like_x(x, grad=grad, grad_sum=grad_sum)
    check_half(narrow=narrow, normed=normed)


def _cost(
    grad: Tensor, x: Tensor, weight: Tensor | None, eps: float, grad_sum: Tensor | None, weight_grad: bool,
    narrow: torch.dtype | None, dx_sum: bool, normed: torch.dtype | None,
) -> Cost:  # fmt: skip
    return Cost(
        (8 + (2 if weight_grad else 0) + (1 if dx_sum else 0) + (1 if normed else 0)) * x.numel(),
        nbytes(grad, grad_sum)
        + 2 * nbytes(x)
        + (2 if weight_grad else 1) * nbytes(weight)
        + bytes_of_further(x, narrow, dx_sum, normed),
    )


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def tensor(*shape: int, seed: int) -> Tensor:
        return randn(*shape, dtype=dtype, device=device, seed=seed)

    weight = tensor(1024, seed=2)
    yield Sample("128x1024", (tensor(1, 128, 1024, seed=0), tensor(1, 128, 1024, seed=1), weight, 1e-5))
    yield Sample("odd", (tensor(7, 33, seed=3), tensor(7, 33, seed=4), tensor(33, seed=5), 1e-6, tensor(7, 33, seed=6)))
    yield Sample("plain", (tensor(2, 16, 1024, seed=7), tensor(2, 16, 1024, seed=8), None, 1e-6))
    yield Sample("frozen weight", (tensor(9, 1024, seed=9), tensor(9, 1024, seed=10), weight, 1e-6, None, False))
    yield Sample("offset", (tensor(4, 4096, seed=11), tensor(4, 4096, seed=12) * 0.5 - 20, tensor(4096, seed=13), 1e-6))
    transposed = tensor(5, 1024, 3, seed=14).transpose(1, 2)
    yield Sample("transposed", (transposed, tensor(5, 3, 1024, seed=15), weight, 1e-6, transposed))
    rows = tensor(5, 2048, seed=16)[:, 512:1536]
    yield Sample("strided", (rows, tensor(1, 1024, seed=17).expand(5, 1024), weight, 1e-6))
    mixed = tensor(19, 1024, seed=20).bfloat16(), tensor(19, 1024, seed=21), weight, 1e-6
    yield Sample("gradients of other dtypes", (*mixed, tensor(19, 1024, seed=22).float()))
    copies = {"narrow": torch.bfloat16, "normed": torch.bfloat16}
    yield Sample("copies", (*mixed, tensor(19, 1024, seed=23)), copies)
    plain = tensor(7, 33, seed=3), tensor(7, 33, seed=4), None, 1e-6
    yield Sample("sum of rows", plain, {"dx_sum": True})
    yield Sample("float32 weight", (tensor(19, 1024, seed=18), tensor(19, 1024, seed=19), weight.float(), 1e-6))


def _shape(
    grad: Tensor, x: Tensor, weight: Tensor | None, eps: float, grad_sum: Tensor | None, weight_grad: bool,
    narrow: torch.dtype | None, dx_sum: bool, normed: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    found = empty_contiguous(x), empty_like_asked(weight, weight_grad, x)
    return *found, *empty_further(x, narrow, dx_sum, normed)


@op(cost=_cost, samples=_samples, check=_check, shape=_shape, widens=("grad", "grad_sum"))
def rms_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    grad_sum: Tensor | None = None,
    weight_grad: bool = True,
    narrow: torch.dtype | None = None,
    dx_sum: bool = False,
    normed: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `rms_norm(x, weight, eps)` for `grad`, that of its result: `(dx + grad_sum, dweight)`.

    `grad_sum` is the gradient of x from elsewhere: after `add_rms_norm`, x is the sum, and it is that of the sum. Three
    further results, asked for by `narrow`, `dx_sum` and `normed`, are as of `layer_norm_backward`: dx in half
    precision, its sum over all rows, and the norm's own result in half precision.
    Shapes: grad, x and grad_sum (..., N), dx too, contiguous, and its copy and the norm's result; weight, dweight and
    the sum (N,). What nobody asks for is empty, (0,): dweight where weight is None or without `weight_grad`.
    Dtypes: all floating, each its own; dx and its sum are of x's and dweight of weight's; narrow and normed are float16
    or bfloat16. Computed in float32 (float64 for float64), rounded once. The same inputs give the same bits on
    the same device.
    Errors: ValueError for sizes that do not fit, TypeError for integers, and for a narrow or normed of another dtype.
    Source: the derivative of Zhang, Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.
    """
    dx, dweight, _ = backward_reference(grad, x, weight, eps, grad_sum, rms=True)
    result = None if normed is None else rms_norm_reference(x.to(wide(x.dtype)), weight, eps).to(normed)
    found = dx.to(x.dtype).contiguous(), asked(dweight, weight, weight_grad, x)
    return *found, *further(dx, x, narrow, dx_sum, result)


def _triton_why_not(grad: Tensor, x: Tensor, weight: Tensor | None, eps: float, *others: Any) -> list[str]:
    return triton_norm_why_not(x, weight)


def _triton_configs(
    grad: Tensor, x: Tensor, weight: Tensor | None, eps: float, grad_sum: Tensor | None, weight_grad: bool,
    narrow: torch.dtype | None, dx_sum: bool, normed: torch.dtype | None,
) -> list[Any]:  # fmt: skip
    return triton_norm_backward_configs(x, grad_sum, crowded=dx_sum and normed is not None)


@rms_norm_backward.impl("triton", why_not=_triton_why_not, configs=_triton_configs)
def _triton(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    grad_sum: Tensor | None = None,
    weight_grad: bool = True,
    narrow: torch.dtype | None = None,
    dx_sum: bool = False,
    normed: torch.dtype | None = None,
    *,
    config: Any = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One pass over memory, whole rows in registers, and a small kernel that adds up the weight's gradient."""
    from burnish.kernels.norms_backward import rms_norm_backward as kernel

    return kernel(grad, x, weight, eps, grad_sum, weight_grad, narrow, dx_sum, normed, config)


def _torch_why_not(grad: Tensor, x: Tensor, weight: Tensor | None, eps: float, *others: Any) -> list[str]:
    return [] if x.device.type == "cpu" else not_same_dtype("weight", weight, "x", x)


@rms_norm_backward.impl("torch", why_not=_torch_why_not)
def _torch(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    grad_sum: Tensor | None = None,
    weight_grad: bool = True,
    narrow: torch.dtype | None = None,
    dx_sum: bool = False,
    normed: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """PyTorch's own kernel on CUDA; on the CPU its layer norm's, and a product with the weight."""
    dtype = wide(x.dtype)
    result = None if normed is None else rms_norm_by_vector_norm(x.to(dtype), weight, eps).to(normed)
    rstd = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
    rstd = rstd.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    dweight: Tensor | None
    if x.device.type == "cuda":
        wanted, values, factor = [True, weight is not None and weight_grad], x, weight
        if narrow not in (None, x.dtype):  # bfloat16 is not to be rounded on the way to float16
            values, factor = x.to(dtype), None if weight is None else weight.to(dtype)
        backward, size = torch.ops.aten._fused_rms_norm_backward, x.shape[-1:]
        dx, dweight = backward(grad.to(values.dtype), values, size, rstd, factor, wanted)
        dx = dx if grad_sum is None else dx.add_(grad_sum)
        found = dx.to(x.dtype).contiguous(), asked(dweight, weight, weight_grad, x)
        return *found, *further(dx, x, narrow, dx_sum, result)
    dx, dweight = _through_layer_norm(grad.to(dtype), x.to(dtype), rstd, weight, weight_grad)
    if grad_sum is not None:
        dx.add_(grad_sum)
    return dx.to(x.dtype), asked(dweight, weight, weight_grad, x), *further(dx, x, narrow, dx_sum, result)


def _through_layer_norm(
    grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None, weight_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """PyTorch's fused backward pass of layer norm, told that the mean is 0, less what is owed to the mean.

    That is a product with the weight, which is read for it once more; PyTorch has no such pass of RMS norm for CPUs.
    """
    weight = None if weight is None else weight.to(x.dtype)
    found = native_layer_norm_backward(grad, x, torch.zeros_like(rstd), rstd, weight, (True, weight_grad, False))
    dx, dweight, _ = found
    means = grad.sum(-1, keepdim=True) if weight is None else torch.matmul(grad, weight).unsqueeze(-1)
    return dx.addcmul_(means, rstd, value=1 / x.shape[-1]), dweight
