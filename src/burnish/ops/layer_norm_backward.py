"""The backward pass of `layer_norm`, alone or after a residual addition."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from burnish.numerics import randn
from burnish.op import Cost, Sample, op
from burnish.ops._common import nbytes, wide
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
    layer_norm_reference,
    native_layer_norm_backward,
    not_mixed_layer_norm,
    sum_rows,
)
from burnish.ops._triton_norms import triton_norm_backward_configs, triton_norm_why_not


def _check(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    grad_sum: Tensor | None,
    weight_grad: bool,
    bias_grad: bool,
    narrow: torch.dtype | None,
    dx_sum: bool,
    normed: torch.dtype | None,
) -> None:
    check_norm(x, weight, bias)
    check_like_x(x, grad=grad, grad_sum=grad_sum)
    check_half(narrow=narrow, normed=normed)


def _cost(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    grad_sum: Tensor | None,
    weight_grad: bool,
    bias_grad: bool,
    narrow: torch.dtype | None,
    dx_sum: bool,
    normed: torch.dtype | None,
) -> Cost:
    flops = 12 + (2 if weight_grad else 0) + (1 if bias_grad else 0) + (1 if dx_sum else 0) + (2 if normed else 0)
    return Cost(
        flops * x.numel(),
        nbytes(grad, grad_sum)
        + 2 * nbytes(x)
        + (2 if weight_grad else 1) * nbytes(weight)
        + (nbytes(bias) if bias_grad else 0)
        + (nbytes(bias) if normed else 0)
        + bytes_of_further(x, narrow, dx_sum, normed),
    )


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def tensor(*shape: int, seed: int) -> Tensor:
        return randn(*shape, dtype=dtype, device=device, seed=seed)

    weight, bias = tensor(768, seed=2), tensor(768, seed=3)
    yield Sample("128x768", (tensor(1, 128, 768, seed=0), tensor(1, 128, 768, seed=1), weight, bias, 1e-12))
    odd = tensor(7, 33, seed=4), tensor(7, 33, seed=5)
    yield Sample("odd", (*odd, tensor(33, seed=6), tensor(33, seed=7), 1e-5, tensor(7, 33, seed=8)))
    yield Sample("no bias", (tensor(2, 16, 768, seed=9), tensor(2, 16, 768, seed=10), weight, None, 1e-5))
    yield Sample("plain", (tensor(2, 16, 768, seed=11), tensor(2, 16, 768, seed=12), None, None, 1e-5))
    pair = tensor(9, 768, seed=13), tensor(9, 768, seed=14)
    yield Sample("frozen weight", (*pair, weight, bias, 1e-5, None, False, True))
    yield Sample("frozen", (*pair, weight, bias, 1e-5, None, False, False))
    far = tensor(4, 4096, seed=15), tensor(4, 4096, seed=16) * 0.5 - 20
    yield Sample("cancellation", (*far, tensor(4096, seed=17), None, 1e-5))
    transposed = tensor(5, 768, 3, seed=18).transpose(1, 2)
    yield Sample("transposed", (transposed, tensor(5, 3, 768, seed=19), weight, bias, 1e-5, transposed))
    rows = tensor(5, 1536, seed=20)[:, 512:1280]
    yield Sample("strided", (rows, tensor(1, 768, seed=21).expand(5, 768), weight, bias, 1e-5))
    mixed = tensor(19, 768, seed=23).bfloat16(), tensor(19, 768, seed=24), weight, bias, 1e-5
    yield Sample("gradients of other dtypes", (*mixed, tensor(19, 768, seed=25).float()))
    further: dict[str, Any] = {"narrow": torch.bfloat16, "dx_sum": True, "normed": torch.bfloat16}
    yield Sample("all results", (*mixed, tensor(19, 768, seed=26)), further)
    yield Sample("all results, plain", (*odd, None, None, 1e-5), further | {"narrow": torch.float16})
    yield Sample("float32 weights", (tensor(19, 768, seed=22), rows[:1].expand(19, 768), weight.float(), bias, 1e-5))


def _shape(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    grad_sum: Tensor | None,
    weight_grad: bool,
    bias_grad: bool,
    narrow: torch.dtype | None,
    dx_sum: bool,
    normed: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    found = empty_contiguous(x), empty_like_asked(weight, weight_grad, x), empty_like_asked(bias, bias_grad, x)
    return *found, *empty_further(x, narrow, dx_sum, normed)


@op(cost=_cost, samples=_samples, check=_check, shape=_shape, widens=("grad", "grad_sum"))
def layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    grad_sum: Tensor | None = None,
    weight_grad: bool = True,
    bias_grad: bool = True,
    narrow: torch.dtype | None = None,
    dx_sum: bool = False,
    normed: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `layer_norm(x, weight, bias, eps)` for `grad`, its result's: `(dx + grad_sum, dweight, dbias)`.

    `grad_sum` is the gradient of x from elsewhere: after `add_layer_norm`, x is the sum, and it is that of the sum.
    Three further results are for what is around the norm in training, where they would cost passes over memory of their
    own: dx (with grad_sum) in half precision, its sum over all rows, which is the gradient of a bias that was added to
    x, and the norm's own result in half precision. `narrow` and `normed` are the dtypes of the first and the last.
    Shapes: grad, x and grad_sum (..., N), dx too, contiguous, and its copy and the norm's result; weight, bias,
    dweight, dbias and the sum (N,). What nobody asks for is empty, (0,): dweight where weight is None or without
    `weight_grad`, and so dbias; the further results without `narrow`, `dx_sum` and `normed`.
    Dtypes: all floating, each its own; dx and its sum are of x's, dweight of weight's and dbias of bias's; narrow and
    normed are float16 or bfloat16. Computed in float32 (float64 for float64), rounded once. The values of bias are read
    for `normed` only. The same inputs give the same bits on the same device.
    Errors: ValueError for sizes that do not fit, TypeError for integers, and for a narrow or normed of another dtype.
    Source: the derivative of Ba, Kiros, Hinton, "Layer Normalization", arXiv:1607.06450.
    """
    dx, dweight, dbias = backward_reference(grad, x, weight, eps, grad_sum, rms=False)
    result = None if normed is None else layer_norm_reference(x.to(wide(x.dtype)), weight, bias, eps).to(normed)
    return (
        dx.to(x.dtype).contiguous(), asked(dweight, weight, weight_grad, x), asked(dbias, bias, bias_grad, x),
        *further(dx, x, narrow, dx_sum, result),
    )  # fmt: skip


def _triton_why_not(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *others: Any
) -> list[str]:
    return triton_norm_why_not(x, weight, bias)


def _triton_configs(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    grad_sum: Tensor | None,
    weight_grad: bool,
    bias_grad: bool,
    narrow: torch.dtype | None,
    dx_sum: bool,
    normed: torch.dtype | None,
) -> list[Any]:
    return triton_norm_backward_configs(x, grad_sum, crowded=dx_sum or normed is not None)


@layer_norm_backward.impl("triton", why_not=_triton_why_not, configs=_triton_configs)
def _triton(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    grad_sum: Tensor | None = None,
    weight_grad: bool = True,
    bias_grad: bool = True,
    narrow: torch.dtype | None = None,
    dx_sum: bool = False,
    normed: torch.dtype | None = None,
    *,
    config: Any = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One pass over memory, whole rows in registers, and a small kernel that adds up what rows give weight and bias."""
    from burnish.kernels.norms_backward import layer_norm_backward as kernel

    return kernel(grad, x, weight, bias, eps, grad_sum, weight_grad, bias_grad, narrow, dx_sum, normed, config)


def _torch_why_not(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *others: Any
) -> list[str]:
    return [] if x.device.type == "cpu" else not_mixed_layer_norm(x, weight, None)


@layer_norm_backward.impl("torch", why_not=_torch_why_not)
def _torch(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    grad_sum: Tensor | None = None,
    weight_grad: bool = True,
    bias_grad: bool = True,
    narrow: torch.dtype | None = None,
    dx_sum: bool = False,
    normed: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """PyTorch's own kernel, after its forward pass for the statistics and the norm's result."""
    values, factor = x, weight
    if x.device.type == "cpu" or {narrow, normed} - {None, x.dtype}:
        # On the CPU it would keep the mean in half precision, and -20.3 becomes -20.25. And float16 is not to
        # come by way of bfloat16.
        values = x.to(wide(x.dtype))
        factor = None if weight is None else weight.to(values.dtype)
    grad = grad.to(values.dtype)
    result, mean, rstd = torch.native_layer_norm(values, x.shape[-1:], factor, None, eps)
    if normed is not None:
        result = (result if bias is None else result.to(wide(x.dtype)) + bias).to(normed)
    of_weight, of_bias = weight is not None and weight_grad, bias is not None and bias_grad
    dx, dweight, dbias = native_layer_norm_backward(grad, values, mean, rstd, factor, (True, of_weight, of_bias))
    if dbias is None and of_bias:
        dbias = sum_rows(grad.to(wide(x.dtype)))
    dx = dx if grad_sum is None else dx.add_(grad_sum)
    return (
        dx.to(x.dtype).contiguous(), asked(dweight, weight, weight_grad, x), asked(dbias, bias, bias_grad, x),
        *further(dx, x, narrow, dx_sum, None if normed is None else result),
    )  # fmt: skip
