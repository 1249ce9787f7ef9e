"""A linear layer with activation and residual addition in its epilogue."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.kernels.layout import (
    gemv_mma_reasons,
    gemv_reasons,
    layout_reasons,
    skinny_reasons,
    tma_reasons,
    wgmma_reasons,
)
from burnish.numerics import randn
from burnish.op import Cost, Sample, op
from burnish.ops._activations import ACTIVATIONS, activate, activate_, check_activation
from burnish.ops._common import check_floating, check_same_dtype, check_vector, nbytes
from burnish.ops._onednn import onednn_float32_why_not, onednn_linear, onednn_why_not
from burnish.ops._triton import hopper_why_not, triton_why_not


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None) -> None:
    check_activation(activation)
    check_floating("x", x)
    if x.dim() == 0 or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; for x of {tuple(x.shape)} it must be (N, K), K last in x"
        )
    check_same_dtype("weight", weight, "x", x)
    check_vector("bias", bias, weight.shape[0], "one entry per row of weight")
    check_same_dtype("bias", bias, "x", x)
    if residual is not None:
        shape = (*x.shape[:-1], weight.shape[0])
        if residual.shape != shape:
            raise ValueError(f"residual has shape {tuple(residual.shape)}; it must be the result's, {tuple(shape)}")
        check_same_dtype("residual", residual, "x", x)


def _cost(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None) -> Cost:
    rows, columns = x.numel() // x.shape[-1], weight.shape[0]
    return Cost(
        2 * rows * columns * x.shape[-1],
        nbytes(x, weight, bias, residual) + rows * columns * x.element_size(),
    )


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def tensor(*shape: int, seed: int) -> Tensor:
        return randn(*shape, dtype=dtype, device=device, seed=seed)

    def weights(n: int, k: int, seed: int) -> Tensor:
        return tensor(n, k, seed=seed) / k**0.5

    x, weight, bias = tensor(2, 33, 96, seed=0), weights(130, 96, seed=1), tensor(130, seed=2)
    residual = tensor(2, 33, 130, seed=3)
    for activation in ACTIVATIONS:
        yield Sample(activation, (x, weight, bias, activation))
    yield Sample("residual", (x, weight, bias), {"residual": residual})
    yield Sample("gelu, residual, no bias", (x, weight, None, "gelu", residual))
    yield Sample("K-major weight", (x, weights(96, 130, seed=4).t(), bias))
    yield Sample("transposed x", (tensor(2, 96, 33, seed=5).transpose(1, 2), weight, bias, "relu"))
    yield Sample("expanded residual", (x, weight, bias, "silu", tensor(130, seed=6).expand(2, 33, 130)))
    yield Sample("one row", (tensor(1, 96, seed=7), weight, bias, "tanh"))
    yield Sample("5 rows", (tensor(5, 96, seed=11), weight, bias))
    across = tensor(2, 192, 24, seed=14).transpose(1, 2)
    yield Sample("48x64x192", (tensor(2, 24, 64, seed=12), weights(192, 64, seed=13), None, "none", across))
    yield Sample(
        "128x384x1536", (tensor(1, 128, 384, seed=8), weights(1536, 384, seed=9), tensor(1536, seed=10), "gelu")
    )


def _shape(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@op(cost=_cost, samples=_samples, check=_check, shape=_shape)
def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none", residual: Tensor | None = None
) -> Tensor:
    """`act(x @ weight.T + bias) + residual`.

    Shapes: x (..., K); weight (N, K), of any strides, often a transposed view of (K, N); bias (N,); residual and the
    result (..., N), the result contiguous.
    Dtypes: all the same floating one. `activation` is none, relu, gelu (erf), gelu_tanh, silu or tanh.
    Errors: ValueError for sizes that do not fit and for an unknown activation, TypeError for dtypes that differ.
    Source: torch.nn.functional.linear and the activations of torch.nn.functional.
    """
    out = activate(F.linear(x, weight, bias), activation)
    return (out if residual is None else out + residual).contiguous()


def _onednn_why_not(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None
) -> list[str]:
    return onednn_why_not(x, weight)


@linear.impl("onednn", why_not=_onednn_why_not)
def _onednn(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none", residual: Tensor | None = None
) -> Tensor:
    """oneDNN's linear with the activation in its epilogue."""
    out = onednn_linear(x, weight, bias, activation)
    # oneDNN's own binary epilogue would build a primitive anew in every float32 call: 3 ms against microseconds here.
    return out if residual is None else out.add_(residual)


def _onednn_float32_why_not(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None
) -> list[str]:
    return onednn_float32_why_not(x, weight)


@linear.impl("onednn_float32", why_not=_onednn_float32_why_not)
def _onednn_float32(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none", residual: Tensor | None = None
) -> Tensor:
    """oneDNN's linear on float16 inputs converted to float32, for a CPU without float16 products."""
    # Without such instructions torch's own float16 product is a plain loop: 24 ms for 128x1536x384, 0.5 ms this way.
    out = onednn_linear(x.float(), weight.float(), None if bias is None else bias.float(), activation)
    return (out if residual is None else out.add_(residual)).to(x.dtype)


@linear.impl("torch")
def _torch(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none", residual: Tensor | None = None
) -> Tensor:
    """F.linear, then activation and residual in place."""
    out = activate_(F.linear(x, weight, bias), activation)
    return (out if residual is None else out.add_(residual)).contiguous()


def _register_kernel(
    name: str,
    description: str,
    family: str,
    further_reasons: Callable[[Tensor, tuple[Tensor, ...]], list[str]] | None = None,
) -> None:
    """An Impl by one family of kernels."""

    def why_not(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None) -> list[str]:
        reasons = (hopper_why_not if family == "wgmma" else triton_why_not)(x)
        reasons += layout_reasons(x, (weight,), residual)
        return reasons + further_reasons(x, (weight,)) if further_reasons is not None else reasons

    def configs(
        x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None
    ) -> Sequence[Any]:
        from burnish.kernels.families import FAMILIES
        from burnish.kernels.matmul_configs import Product

        return FAMILIES[family].configs(Product.of(x, weight))

    def impl(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str = "none",
        residual: Tensor | None = None,
        config: Any = None,
    ) -> Tensor:
        from burnish.kernels.families import FAMILIES

        return FAMILIES[family].multiply(x, weight, bias, activation, residual, config=config)

    def told(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str = "none",
        residual: Tensor | None = None,
        config: Any = None,
        live_rows: Tensor | None = None,
    ) -> Tensor:
        from burnish.kernels.families import FAMILIES

        multiply = FAMILIES[family].multiply
        return multiply(x, weight, bias, activation, residual, config=config, live_rows=live_rows)

    takes = family in _FOR_MANY_ROWS
    run = told if takes else impl
    run.__doc__ = description
    linear.impl(name, why_not=why_not, configs=configs, live_rows=takes)(run)


_FOR_MANY_ROWS = ("matmul", "tma", "wgmma")  # whose kernels take `live_rows`


_register_kernel(
    "triton",
    "Tiles, bias, activation and residual in one Triton kernel, the sum over K split where the tiles are few.",
    "matmul",
)
_register_kernel(
    "triton_gemv",
    "A Triton kernel for a few rows of x, which streams the weight without tensor cores.",
    "gemv",
    gemv_reasons,
)
_register_kernel(
    "gluon_gemv",
    "A Gluon kernel for up to 16 rows of x, which reads the weight right into tensor cores' left operand.",
    "gemv_mma",
    gemv_mma_reasons,
)
_register_kernel(
    "triton_skinny",
    "A Triton kernel for up to 64 rows of x, which streams the weight through tensor cores as their left operand.",
    "skinny",
    skinny_reasons,
)
_register_kernel(
    "triton_tma",
    "A persistent Triton kernel for many rows, which copies tiles by tensor memory access.",
    "tma",
    tma_reasons,
)
_register_kernel(
    "gluon",
    "A Gluon kernel for Hopper with a warp that loads and warps that multiply, weight before the kernel ahead ends.",
    "wgmma",
    wgmma_reasons,
)


# --- training ---------------------------------------------------------------------------------------------------------


def _parts(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None) -> Tensor:
    """PyTorch's operators, so that Inductor sees the activation and its slope, and fuses them with what is around."""
    out = activate(F.linear(x, weight, bias), activation)
    return (out if residual is None else out + residual).contiguous()


linear.compose(_parts)
