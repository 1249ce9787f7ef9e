"""A gradient that the forward pass left, times the gradient of the loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from burnish.numerics import randn
from burnish.op import Cost, Sample, op
from burnish.ops._common import check_floating, is_traced, nbytes, wide
from burnish.ops._cross_entropy import may_overwrite
from burnish.ops._triton import triton_why_not


def _check(gradient: Tensor, factor: Tensor) -> None:
    check_floating("gradient", gradient)
    check_floating("factor", factor)
    if factor.dim() != 0 and (gradient.dim() != 2 or factor.shape != gradient.shape[:1]):
        raise ValueError(
            f"factor has shape {tuple(factor.shape)}; for gradient of {tuple(gradient.shape)} it must be one "
            "number, or one for each row of a matrix"
        )


def _cost(gradient: Tensor, factor: Tensor) -> Cost:
    return Cost(gradient.numel(), 2 * nbytes(gradient) + nbytes(factor))


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def tensor(*shape: int, seed: int, dtype: torch.dtype = dtype) -> Tensor:
        return randn(*shape, dtype=dtype, device=device, seed=seed)

    def number(value: float) -> Tensor:
        return torch.tensor(value, device=device)

    yield Sample("odd", (tensor(7, 33, seed=0), number(0.3)))
    yield Sample("one", (tensor(4, 700, seed=1), number(1.0)))
    yield Sample("one for each row", (tensor(9, 257, seed=2), tensor(9, seed=3, dtype=torch.float32)))
    yield Sample(
        "of each row, some 1", (tensor(5, 640, seed=4), torch.tensor([1.0, 2.0, 1.0, 0.0, 0.5], device=device))
    )
    yield Sample("vector", (tensor(1000, seed=5), number(65536.0)))
    yield Sample("transposed", (tensor(48, 5, seed=6).t(), number(-2.5)))
    yield Sample("3x50257", (tensor(3, 50257, seed=7), number(0.25)))


def _shape(gradient: Tensor, factor: Tensor) -> Tensor:
    return gradient.new_empty(gradient.shape)


@op(cost=_cost, samples=_samples, check=_check, shape=_shape, donates={"gradient": 0})
def scale_gradient(gradient: Tensor, factor: Tensor) -> Tensor:
    """`gradient * factor`, which costs nothing where it is done in place and the factor is 1, as a loss's mostly is.

    Shapes: gradient of any; factor one number, or (R,) for each row of a gradient (R, N). The result is gradient's,
    contiguous.
    Donates: gradient, of which the result is a changed copy.
    Dtypes: floating; the result has gradient's, multiplied in float32 (float64 for float64) and rounded once.
    Errors: ValueError for another shape of factor, TypeError for integers.
    Source: the chain rule.
    """
    dtype = wide(gradient.dtype)
    factor = factor if factor.dim() == 0 else factor[:, None]
    return (gradient.to(dtype) * factor.to(dtype)).to(gradient.dtype).contiguous()


def scaled_gradient(gradient: Tensor, factor: Tensor) -> Tensor:
    """`gradient * factor` in a backward pass, of a gradient that the forward pass kept; in its memory where it is safe.

    The factor is on the device, and is 1 unless the loss was scaled (for accumulated batches, or by a GradScaler), or
    summed with others by weights. To ask whether it is would wait for the device; so a kernel looks, and ends at once
    where there is nothing to do: 2.1 GB of gradients at 8192 x 128256 are then passed on as they are, while a product
    out of place would read and write them, 1 ms. In place is safe where the engine frees the gradient after this call,
    which is when nobody asked for the graph to be kept; else the product is a new tensor, and the kept gradient is
    still the one for a factor of 1 when the next backward pass comes. Nobody else has seen the kept tensor, and each
    gradient is given away once: what accumulates into it does so in memory that is its own.

    In a recorded graph it is torch's own product, which Inductor fuses with what comes next, such as a cast.
    """
    if is_traced(gradient):
        return scale_gradient.reference(gradient, factor)
    if not gradient.is_contiguous() or not may_overwrite(gradient):
        return scale_gradient(gradient, factor)
    in_place = scale_gradient.select(gradient, factor).in_place
    if in_place is None:
        return scale_gradient(gradient, factor)
    result: Tensor = in_place(gradient, factor)
    return result


def _triton_why_not(gradient: Tensor, factor: Tensor) -> list[str]:
    return triton_why_not(gradient)


def _triton_configs(gradient: Tensor, factor: Tensor) -> list[Any]:
    from burnish.kernels.cross_entropy import scale_configs

    return scale_configs(gradient.shape[-1] if gradient.dim() else 1)


def _triton_in_place(gradient: Tensor, factor: Tensor, *, config: Any = None) -> Tensor:
    from burnish.kernels.cross_entropy import scale_gradient as scale

    if not gradient.is_contiguous():
        return _torch_in_place(gradient, factor)
    scale(gradient, factor, gradient, config)
    return gradient


@scale_gradient.impl("triton", why_not=_triton_why_not, configs=_triton_configs, in_place=_triton_in_place)
def _triton(gradient: Tensor, factor: Tensor, *, config: Any = None) -> Tensor:
    """A kernel that, in place, looks at the factor and ends where it is 1."""
    from burnish.kernels.cross_entropy import scale_gradient as scale

    gradient = gradient.contiguous()
    out = gradient.new_empty(gradient.shape)
    scale(gradient, factor, out, config)
    return out


def _beside(gradient: Tensor, factor: Tensor) -> Tensor:
    """The factor with as many dims as the gradient: a number of none would be rounded to the gradient's dtype before
    the product, in which 65536, a GradScaler's first scale, is infinite in float16."""
    return factor.reshape(-1, *[1] * (gradient.dim() - 1)) if gradient.dim() else factor


def _torch_in_place(gradient: Tensor, factor: Tensor) -> Tensor:
    # On a CPU a look at the factor waits for nothing.
    if factor.dim() == 0 and factor.device.type == "cpu" and float(factor) == 1:
        return gradient
    return gradient.mul_(_beside(gradient, factor))


@scale_gradient.impl("torch", in_place=_torch_in_place)
def _torch(gradient: Tensor, factor: Tensor) -> Tensor:
    """PyTorch's product."""
    return torch.mul(gradient, _beside(gradient, factor), out=gradient.new_empty(gradient.shape))
