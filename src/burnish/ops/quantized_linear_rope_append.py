"""`linear_rope_append` of a weight that is stored in 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from burnish.numerics import randn
from burnish.op import Sample, op
from burnish.ops._product_append import (
    Kernel,
    appended,
    check,
    cost,
    register_apart,
    register_fused,
    register_torch,
    shape,
)
from burnish.ops._quantized import operands_of
from burnish.ops.quantized_linear import quantized_linear
from burnish.ops.rope import rope_tables


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def tensor(*shape: int, seed: int) -> Tensor:
        return randn(*shape, dtype=dtype, device=device, seed=seed)

    def caches(b: int, h: int, most: int, d: int) -> tuple[Tensor, ...]:
        return tensor(b, h, most, d, seed=3), tensor(b, h, most, d, seed=4)

    def tables(length: int, width: int, offset: int, interleaved: bool = False) -> tuple[Tensor, ...]:
        return tuple(t.to(device, dtype) for t in rope_tables(length, width, offset, interleaved))

    def lengths(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, device=device, dtype=dtype)

    # 3 heads of q, and one each of k and v.
    weight, narrow = partial(operands_of, device), {"scale_dtype": dtype}
    small, large, bias = caches(1, 1, 24, 16), caches(2, 1, 24, 20), tensor(100, seed=2)
    one = *tables(1, 16, 11), *small, torch.tensor(11, device=device)
    yield Sample("int8", (tensor(1, 1, 96, seed=0), *weight(80, 96, 1, "int8"), None, *one))
    grouped = *weight(80, 256, 1, "int4", **narrow), None
    three = None, None, *caches(3, 1, 24, 16), lengths(7, 24, 0)
    yield Sample("int4, no tables", (tensor(3, 1, 256, seed=0), *grouped, *three))
    tables32 = (t[None].float() for t in tables(4, 16, 21))
    yield Sample(
        "int4, float32 tables, not all fit", (tensor(1, 4, 256, seed=0), *grouped, *tables32, *small, lengths(21))
    )
    few = tensor(2, 3, 80, seed=0), *weight(100, 80, 1, "fp8"), bias
    each = [torch.stack(pair) for pair in zip(tables(3, 20, 19), tables(3, 20, 22), strict=True)]
    yield Sample("fp8, bias, a table and a length for each", (*few, *each, *large, lengths(19, 22)))
    many = tensor(2, 8, 128, seed=0), *weight(100, 128, 1, "int8", **narrow), bias
    turned = *tables(8, 20, 4, True), *large, lengths(4, dtype=torch.int32), True
    yield Sample("int8, 16 rows, interleaved, bias", (*many, *turned))
    x, asymmetric = tensor(2, 9, 128, seed=0), weight(100, 128, 1, "int4", 32, symmetric=False, **narrow)
    yield Sample("int4, zeros, 18 rows, partial", (x, *asymmetric, None, *tables(9, 10, 2), *large, lengths(2)))


@op(
    cost=partial(cost, quantized_linear),
    samples=_samples,
    check=partial(check, quantized_linear),
    shape=shape,
    donates={"k_cache": 1, "v_cache": 2},
)
def quantized_linear_rope_append(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    kind: str,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`linear_rope_append` of a weight as `burnish.quantize.quantize_weight` stores it: `(q, k_cache, v_cache)`.

    Shapes: x (B, S, K); weight (N, K), of int4 (N, K / 2), scales, zeros and bias as `quantized_linear` takes them, of
    N = Hq * D + Hkv * (D + Dv) rows; cos, sin, the caches, lengths and the results as in `linear_rope_append`.
    Positions: token i goes to position lengths + i of the caches; what would lie past Lmax is dropped.
    Donates: k_cache and v_cache, of which the results are changed copies.
    Dtypes: x, bias and the caches the same floating one; cos and sin floating, they may differ; weight, scales and
    zeros as in `quantized_linear`. The product is computed in float32 (float64 for float64), rounded to x's dtype,
    rotated from there and rounded; an Impl may leave the first rounding out, or round the dequantized weight.
    Errors: ValueError for sizes that do not fit and for one table without the other, TypeError for dtypes.
    Source: as `quantized_linear` and `linear_rope_append`.
    """
    product = quantized_linear.reference(x, weight, scales, zeros, kind, bias)
    return appended(product, cos, sin, k_cache, v_cache, lengths, interleaved)


register_torch(quantized_linear_rope_append, quantized_linear)
for _name, _product in (
    ("torch_triton", "torch"),
    ("triton_dequantize", "triton_dequantize"),
    ("gluon_apart", "gluon_gemv"),
):
    register_apart(quantized_linear_rope_append, _name, quantized_linear, _product)


def _gemv_mma() -> Kernel:
    from burnish.kernels.gemv_mma_append import gemv_mma_append, gemv_mma_append_configs

    def run(
        x: Tensor, weight: Tensor, scales: Tensor, zeros: None, kind: str, bias: Tensor | None, *after: Any, config: Any
    ) -> Tensor:
        return partial(gemv_mma_append, config=config, kind=kind, scales=scales)(x, weight, bias, *after)

    def configs(x: Tensor, weight: Tensor, scales: Tensor, zeros: None, kind: str, *rest: Any) -> Sequence[Any]:
        return gemv_mma_append_configs(x, weight, kind)

    return run, configs


register_fused(
    quantized_linear_rope_append,
    "gluon_gemv",
    "A Gluon kernel for up to 16 rows of x, which widens the weight in registers, and rotates and appends.",
    quantized_linear,
    _gemv_mma,
)
