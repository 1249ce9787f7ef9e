"""The product of queries, keys and values, their rotary position embedding, and the cache's new rows, in one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.kernels.layout import MAX_SKINNY_APPEND_ROWS
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
from burnish.ops.linear import linear
from burnish.ops.rope import rope_tables


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def tensor(*shape: int, seed: int) -> Tensor:
        return randn(*shape, dtype=dtype, device=device, seed=seed)

    def of(b: int, s: int, depth: int, hq: int, h: int, most: int, d: int, dv: int) -> tuple[tuple[Tensor, ...], ...]:
        """x, weight and bias, and the caches."""
        rows = hq * d + h * (d + dv)
        weight = tensor(rows, depth, seed=1) / depth**0.5
        caches = tensor(b, h, most, d, seed=3), tensor(b, h, most, dv, seed=4)
        return (tensor(b, s, depth, seed=0), weight, tensor(rows, seed=2)), caches

    def tables(length: int, width: int, offset: int = 0, interleaved: bool = False) -> tuple[Tensor, ...]:
        return tuple(t.to(device, dtype) for t in rope_tables(length, width, offset, interleaved))

    def lengths(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, device=device, dtype=dtype)

    one, one_caches = of(1, 1, 96, 4, 2, 40, 32, 32)
    few, few_caches = of(2, 3, 96, 3, 1, 24, 20, 20)
    each = [torch.stack(pair) for pair in zip(tables(3, 20, 19), tables(3, 20, 22), strict=True)]
    yield Sample("one token", (*one[:2], None, *tables(1, 32, 11), *one_caches, torch.tensor(11, device=device)))
    yield Sample("a table and a length for each", (*few, *each, *few_caches, lengths(19, 22)))
    turned = (*tables(3, 20, 4, True), *few_caches, lengths(4, dtype=torch.int32), True)
    yield Sample("interleaved", (few[0].transpose(0, 1).contiguous().transpose(0, 1), *few[1:], *turned))
    tables32 = (t[None].float() for t in tables(3, 20, 23))
    yield Sample("float32 tables, not all fit", (*few[:2], None, *tables32, *few_caches, lengths(23)))
    yield Sample("no tables, not all fit", (*few, None, None, *few_caches, lengths(19, 23)))
    part, part_caches = of(2, 9, 64, 3, 1, 20, 24, 16)
    yield Sample("18 rows, partial", (*part, *tables(9, 10, 2), *part_caches, lengths(2)))
    large, large_caches = of(1, 1, 1024, 4, 1, 256, 64, 64)
    yield Sample("1x1024, h4/1 into 256x64", (*large, *tables(1, 64, 200), *large_caches, lengths(200)))


@op(
    cost=partial(cost, linear),
    samples=_samples,
    check=partial(check, linear),
    shape=shape,
    donates={"k_cache": 1, "v_cache": 2},
)
def linear_rope_append(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`rope_append` of the heads of q, k and v that `x @ weight.T + bias` has side by side: `(q, k_cache, v_cache)`.

    Without tables, cos and sin None, nothing is rotated: `append_kv` of k and v, and q as it is.

    Shapes: x (B, S, K); weight (Hq * D + Hkv * (D + Dv), K), of any strides; bias its rows' number or None; cos and sin
    as `rope` takes them, of the new tokens' positions; k_cache (B, Hkv, Lmax, D), v_cache (B, Hkv, Lmax, Dv) and
    lengths as `append_kv` takes them. q is (B, Hq, S, D), stored as (B, S, Hq, D); each cache is laid out in memory as
    torch.empty_like of its input.
    Positions: token i goes to position lengths + i of the caches; what would lie past Lmax is dropped.
    Donates: k_cache and v_cache, of which the results are changed copies.
    Dtypes: x, weight, bias and the caches the same floating one; cos and sin floating, they may differ. The product is
    rounded to x's dtype, rotated from there in float32 (float64 for float64), and rounded; an Impl may leave the first
    rounding out.
    Errors: ValueError for sizes that do not fit and for one table without the other, TypeError for dtypes.
    Source: Su et al., "RoFormer", arXiv:2104.09864; the cache as in Pope et al., "Efficiently Scaling Transformer
    Inference", arXiv:2211.05102.
    """
    return appended(F.linear(x, weight, bias), cos, sin, k_cache, v_cache, lengths, interleaved)


register_torch(linear_rope_append, linear)
for _name, _product in (
    ("torch_triton", "torch"),
    ("triton_skinny_apart", "triton_skinny"),
    ("triton_apart", "triton_gemv"),
):
    register_apart(linear_rope_append, _name, linear, _product)


# The kernels' launchers, and their configs for all arguments.


def _gemv() -> Kernel:
    from burnish.kernels.gemv_append import gemv_append, gemv_append_configs

    return gemv_append, lambda *args: gemv_append_configs(*args[:2])


def _gemv_mma() -> Kernel:
    from burnish.kernels.gemv_mma_append import gemv_mma_append, gemv_mma_append_configs

    return gemv_mma_append, lambda *args: gemv_mma_append_configs(*args[:2])


def _skinny() -> Kernel:
    from burnish.kernels.skinny_append import skinny_append, skinny_append_configs

    return skinny_append, lambda *args: skinny_append_configs(*args[:2])


def _too_many_for_skinny(x: Tensor, *rest: Any) -> list[str]:
    rows, most = x.shape[0] * x.shape[1], MAX_SKINNY_APPEND_ROWS
    return [f"x has {rows} rows; the kernel takes up to {most}"] if rows > most else []


register_fused(
    linear_rope_append,
    "triton_gemv",
    "A Triton kernel for a few rows of x, which streams the weight, and rotates and appends in its epilogue.",
    linear,
    _gemv,
)
register_fused(
    linear_rope_append,
    "gluon_gemv",
    "The same in Gluon for up to 16 rows, which reads the weight right into tensor cores.",
    linear,
    _gemv_mma,
)
register_fused(
    linear_rope_append,
    "triton_skinny",
    "The same in Triton for up to 32 rows, which streams the weight through tensor cores as their left operand.",
    linear,
    _skinny,
    _too_many_for_skinny,
)
