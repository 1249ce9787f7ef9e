"""The norm before a product, in the product's own kernel: for few rows of x, which lie in the L2 cache.

Each program reads its rows once for their statistics, and then normalizes each block of them on its way into the
product. That is the work of the norm's kernel as many times as there are programs; what it saves is that kernel's way
to memory and back, during which no weight would arrive.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from burnish.kernels.launch import prefetch

_ENTRIES = 8  # of a block that a thread holds: one load of 16 bytes of a half type
_AT_ONCE = 16  # blocks that are loaded before the first is needed: 64 registers of half types


class Norm(NamedTuple):
    """A norm over the last dimension of x (..., K): weight and bias (K,) or None, each of its own dtype."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    rms: bool


def norm_arguments(norm: Norm | None) -> tuple[Any, ...]:
    """What a kernel is given of `norm`: weight, bias, their strides, eps. Without one nothing that is compiled."""
    if norm is None:
        return (None,) * 5
    weight_step, bias_step = (1 if vector is None else vector.stride(0) for vector in (norm.weight, norm.bias))
    return norm.weight, norm.bias, weight_step, bias_step, norm.eps


def norm_constants(norm: Norm | None, rows: int, depth: int, num_warps: int) -> dict[str, Any]:
    """The constants of `row_statistics` for `rows` rows of `depth` entries."""
    if norm is None:
        return {"NORM": "none", "NORM_ROWS": 1, "NORM_BLOCK": 1, "NORM_AT_ONCE": 1}
    block_rows = triton.next_power_of_2(rows)
    block = min(triton.next_power_of_2(depth), max(1, 32 * num_warps * _ENTRIES // block_rows))
    at_once = min(_AT_ONCE, triton.next_power_of_2(triton.cdiv(depth, block)))
    kind = "rms" if norm.rms else "layer"
    return {"NORM": kind, "NORM_ROWS": block_rows, "NORM_BLOCK": block, "NORM_AT_ONCE": at_once}


@triton.jit
def prefetch_vector(vector, step, K, BLOCK: tl.constexpr):
    """Brings the first BLOCK entries of a norm's weight or bias (K,), or None, into the L2 cache."""
    if vector is not None:
        LINE: tl.constexpr = 1024 // vector.dtype.element_ty.primitive_bitwidth  # entries of a line of 128 bytes
        LINES: tl.constexpr = (BLOCK + LINE - 1) // LINE
        prefetch(vector + tl.minimum(tl.arange(0, LINES) * LINE, K - 1) * step)


@triton.jit
def row_statistics(
    rows,
    inside,
    K,
    stride_k,
    eps,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Mean (0 for "rms") and `1 / sqrt(variance + eps)` of the rows that begin at `rows` (ROWS,), each as (ROWS,).

    The variance of a layer norm is taken from values less the mean of their row's first BLOCK * AT_ONCE entries, what
    is left of the mean is subtracted after: two steps for a row no longer than that, and for a longer one as exact but
    for a factor of K / (BLOCK * AT_ONCE) at the worst. (Where that mean is d from the row's, the entries it is of
    alone make the variance d**2 times their share.)
    """
    CHUNK: tl.constexpr = BLOCK * AT_ONCE
    k = tl.arange(0, BLOCK)[None, :]
    wide = tl.full((), 1, tl.int64) * stride_k
    first = rows[:, None] + k.to(tl.int64) * stride_k
    inside = inside[:, None]
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    shift = tl.zeros((ROWS, 1), tl.float32)
    if NORM == "layer":
        for part in tl.static_range(AT_ONCE):
            mask = inside & (part * BLOCK + k < K)
            sums += tl.load(first + part * BLOCK * wide, mask=mask, other=0.0).to(tl.float32)
        shift = tl.sum(sums, axis=1, keep_dims=True) / tl.minimum(K, CHUNK)
        sums = tl.zeros((ROWS, BLOCK), tl.float32)
    squares = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, K, CHUNK):
        for part in tl.static_range(AT_ONCE):
            mask = inside & (start + part * BLOCK + k < K)
            values = tl.load(first + (start + part * BLOCK) * wide, mask=mask, other=0.0).to(tl.float32)
            if NORM == "layer":
                values = tl.where(mask, values - shift, 0.0)
                sums += values
            squares += values * values
    variance = tl.sum(squares, axis=1) / K
    mean = tl.zeros((ROWS,), tl.float32)
    if NORM == "layer":
        rest = tl.sum(sums, axis=1) / K
        mean = tl.sum(shift, axis=1) + rest
        variance = tl.maximum(variance - rest * rest, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return mean, tl.rsqrt(variance + eps)


@triton.jit
def for_each_row(values, BLOCK_M: tl.constexpr, ROWS: tl.constexpr):
    """`values` (ROWS,) as (BLOCK_M,): rows from ROWS on, which do not exist, have those of others."""
    if BLOCK_M != ROWS:
        values = tl.reshape(tl.broadcast_to(values[None, :], (BLOCK_M // ROWS, ROWS)), (BLOCK_M,))
    return values


@triton.jit
def normalize_block(
    x, mean, scale, weight, bias, weight_step, bias_step, k, K, NORM: tl.constexpr, EVEN_K: tl.constexpr
):
    """A block of x at the columns `k`, normalized, in float32: still to be rounded to x's dtype, as the norm is.

    `mean`, `scale` and `k` have the dimensions of x, so that they broadcast; `weight` and `bias` may be None.
    """
    values = x.to(tl.float32)
    if NORM == "layer":
        values -= mean
    values *= scale
    mask = None if EVEN_K else k < K
    other = None if EVEN_K else 0.0
    if weight is not None:
        values *= tl.load(weight + k * weight_step, mask=mask, other=other).to(tl.float32)
    if bias is not None:
        values += tl.load(bias + k * bias_step, mask=mask, other=other).to(tl.float32)
    return values
