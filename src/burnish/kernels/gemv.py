"""`act(x @ weight.T + bias) + residual` for a few rows of x: bound by reading the weight, once, as fast as memory goes.

With `GATED` the weight has two halves of rows, gate and up, and the result is `act(gate) * up`. With `NORMED`, x is
normalized as by `rms_norm`. That divides each row by one number, which the loop over K finds on its way and which the
sums are divided by in the end.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from burnish.kernels.launch import Config, launch, launch_dependents, wait_for_inputs
from burnish.kernels.layout import rows_of
from burnish.kernels.matmul import epilogue, row_offsets
from burnish.kernels.matmul_configs import Product


class Norm(NamedTuple):
    """RMS normalization of x (..., K): its weight, (K,) of its own dtype or None, and eps."""

    weight: Tensor | None
    eps: float


@triton.jit
def multiply(
    weight_ptrs,
    x_ptrs,
    weight,
    weight_up,
    to_up,
    weight_mask,
    x_mask,
    k,
    K,
    stride_x_k,
    norm_weight_ptr,
    stride_norm_weight,
    GATED: tl.constexpr,
    NORMED: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Products of x (BLOCK_M, 1, K) and weight (1, BLOCK_N, K), if GATED also with the rows `to_up` further on, and if
    NORMED x squared; each added up over the blocks of K, and not yet within one.

    The pointers are to the first blocks, of which `weight` and `weight_up` have been loaded already.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N, BLOCK_K), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_M, 1, BLOCK_K), tl.float32)
    for start in range(0, K, BLOCK_K):
        weight_ptrs += BLOCK_K
        if NORMED and norm_weight_ptr is not None:
            # First, because values that meet are laid out as the one loaded last: the largest is to stay where it is.
            norm_weight_ptrs = norm_weight_ptr + ((start + k) * stride_norm_weight)[None, None, :]
            if EVEN_K:
                norm_weight = tl.load(norm_weight_ptrs)
            else:
                norm_weight = tl.load(norm_weight_ptrs, mask=(start + k < K)[None, None, :], other=0.0)
        if EVEN_K:
            mask = weight_mask & (tl.full((1, 1, 1), start + BLOCK_K, tl.int32) < K)
            x = tl.load(x_ptrs, mask=x_mask, other=0.0).to(tl.float32)
        else:
            mask = weight_mask & (start + BLOCK_K + k < K)[None, None, :]
            x = tl.load(x_ptrs, mask=x_mask & (start + k < K)[None, None, :], other=0.0).to(tl.float32)
        next_weight = tl.load(weight_ptrs, mask=mask, other=0.0)
        if NORMED:
            squares += x * x
            if norm_weight_ptr is not None:
                x *= norm_weight.to(tl.float32)
        acc += x * weight.to(tl.float32)
        weight = next_weight
        if GATED:
            next_up = tl.load(weight_ptrs + to_up, mask=mask, other=0.0)
            up += x * weight_up.to(tl.float32)
            weight_up = next_up
        x_ptrs += BLOCK_K * stride_x_k

    return acc, up, squares


@triton.jit
def gemv_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    M,
    N,
    K,
    x_inner,
    stride_x_outer,
    stride_x_inner,
    stride_x_k,
    stride_weight_n,
    to_up,  # from a gate's row to the same row of up
    stride_bias,
    residual_inner,
    stride_residual_outer,
    stride_residual_inner,
    stride_residual_n,
    norm_weight_ptr,
    stride_norm_weight,
    eps,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    NORMED: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_dependents(PDL)
    # Blocks are (rows of x, rows of weight, K). The weight's is loaded as (1, rows, K), so that every row of x finds
    # it in the registers where it arrived.
    m = tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    weight_ptrs = weight_ptr + (n.to(tl.int64) * stride_weight_n)[None, :, None] + k[None, None, :]
    weight_mask = (n < N)[None, :, None]
    x_ptrs = x_ptr + row_offsets(m, x_inner, stride_x_outer, stride_x_inner)[:, None, None]
    x_ptrs += k.to(tl.int64)[None, None, :] * stride_x_k
    x_mask = (m < M)[:, None, None]

    # The weight's first block is on its way while the kernel before still runs, and later each next one while its
    # predecessor is multiplied.
    mask = weight_mask if EVEN_K else weight_mask & (k < K)[None, None, :]
    weight = tl.load(weight_ptrs, mask=mask, other=0.0)
    weight_up = weight
    if GATED:
        weight_up = tl.load(weight_ptrs + to_up, mask=mask, other=0.0)
    wait_for_inputs(PDL)
    acc, up, squares = multiply(
        weight_ptrs,
        x_ptrs,
        weight,
        weight_up,
        to_up,
        weight_mask,
        x_mask,
        k,
        K,
        stride_x_k,
        norm_weight_ptr,
        stride_norm_weight,
        GATED,
        NORMED,
        EVEN_K,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )

    acc = tl.sum(acc, axis=2)
    up = tl.sum(up, axis=2) if GATED else None
    if NORMED:
        scale = tl.rsqrt(tl.sum(squares, axis=2) / K + eps)
        acc *= scale
        if GATED:
            up *= scale
    result = epilogue(
        acc,
        up,
        m,
        n,
        bias_ptr,
        stride_bias,
        residual_ptr,
        residual_inner,
        stride_residual_outer,
        stride_residual_inner,
        stride_residual_n,
        M,
        N,
        ACTIVATION,
        GATED,
    )
    offsets = m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out_ptr + offsets, result.to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def gemv_configs(product: Product) -> list[Config]:
    """Configs of `gemv`, the most promising first."""
    depth, gated = product.depth, product.gated
    block_m = triton.next_power_of_2(product.rows)
    deepest = max(32, triton.next_power_of_2(depth))
    # (BLOCK_N, BLOCK_K, warps). On H200 4 x 1024 with 4 or 8 warps was the best for Llama's weights (K from 2048 to
    # 14336), 4 x 256 for K = 768. If gated, BLOCK_N counts in both halves.
    shapes = [(4, 256, 4), (2, 512, 4), (4, 1024, 8)] if depth <= 1024 else [(4, 1024, 8), (4, 1024, 4), (4, 512, 4)]
    shapes += [(2, 1024, 4), (2, 2048, 8)] if depth > 1024 else []
    if gated:
        shapes = [(max(1, n // 2), k, warps) for n, k, warps in shapes] + shapes[:1]
    configs = []
    for block_n, block_k, warps in shapes:
        # Each row of x and of weight has its own sums. Beyond 64 of them (32 in each half) a thread has no registers
        # left for loads in flight.
        while block_m * block_n * block_k > 32 * warps * (32 if gated else 64):
            block_n, block_k = (block_n // 2, block_k) if block_n > 2 else (block_n, block_k // 2)
        blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": min(block_k, deepest)}
        configs.append(Config.of(num_warps=warps, num_stages=1, **blocks))
    return list(dict.fromkeys(configs))


def gemv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    gated: bool = False,
    norm: Norm | None = None,
    config: Config | None = None,
) -> Tensor:
    """`act(x @ weight.T + bias) + residual`, or `act(gate) * up` of the two halves of `x @ weight.T + bias` if gated.

    With a norm, of x normalized in float32; the normalized x is not rounded.

    Shapes: x (..., K) of at most BLOCK_M rows, weight (N, K), or (2*N, K) if gated, contiguous along K, bias its rows'
    number, residual and the contiguous result (..., N). All of one dtype: float16, bfloat16 or float32; sums are
    float32, and the result is rounded once.
    """
    columns = weight.shape[0] // 2 if gated else weight.shape[0]
    config = config or gemv_configs(Product.of(x, weight, gated))[0]
    out = x.new_empty((*x.shape[:-1], columns))
    rows, residual_rows = rows_of(x), out if residual is None else residual
    extra = rows_of(residual_rows)
    scale, eps = (None, None) if norm is None else norm
    assert rows is not None
    assert extra is not None
    arguments: tuple[Any, ...] = (
        *(x, weight, bias, residual, out),
        *(rows.count, columns, x.shape[-1]),
        *(rows.inner, rows.stride_outer, rows.stride_inner, x.stride(-1)),
        *(weight.stride(0), columns * weight.stride(0), 1 if bias is None else bias.stride(0)),
        *(extra.inner, extra.stride_outer, extra.stride_inner, residual_rows.stride(-1)),
        *(scale, 1 if scale is None else scale.stride(0), eps),
    )
    constants: dict[str, Any] = {
        "ACTIVATION": activation,
        "GATED": gated,
        "NORMED": norm is not None,
        "EVEN_K": x.shape[-1] % config["BLOCK_K"] == 0,
    }
    launch(gemv_kernel, (triton.cdiv(columns, config["BLOCK_N"]),), *arguments, config=config, like=x, **constants)
    return out
