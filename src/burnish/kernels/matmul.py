"""`act(x @ weight.T + bias) + residual` in one kernel, tile by tile, the sum over K split among programs if need be.

With `GATED` the weight has two halves of rows, gate and up, and the result is `act(gate) * up`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from burnish.kernels.activations import activate, in_half
from burnish.kernels.counters import counters
from burnish.kernels.launch import Config, launch, launch_dependents, prefetch, wait_for_inputs
from burnish.kernels.layout import rows_of
from burnish.kernels.matmul_configs import Product, matmul_configs

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(x, weight, acc):
    """`acc + x @ weight`, exact products of float32 too."""
    if INTERPRETED:  # the interpreter multiplies the bits of bfloat16 as integers
        x, weight = x.to(tl.float32), weight.to(tl.float32)
    return tl.dot(x, weight, acc, input_precision="ieee")


@triton.jit
def tile_of(pid, rows, columns, GROUP_M: tl.constexpr):
    """Row and column of tile `pid`: tiles are walked in groups of GROUP_M rows, so that L2 keeps the operands."""
    in_group = GROUP_M * columns
    first = pid // in_group * GROUP_M
    height = min(rows - first, GROUP_M)
    return first + pid % in_group % height, pid % in_group // height


@triton.jit
def prefetch_weight(weight, n, N, stride_n, first, last, BLOCK_K: tl.constexpr):
    """Brings rows `n` of a weight (N, K), contiguous along K, into the L2 cache, from block `first` to `last` of K.

    Before the wait for the kernel ahead this costs nothing: the programs are there already, with nothing to do.
    """
    LINE: tl.constexpr = 1024 // weight.dtype.element_ty.primitive_bitwidth  # entries of a line of 128 bytes
    LINES: tl.constexpr = (BLOCK_K + LINE - 1) // LINE
    lines = weight + tl.minimum(n, N - 1).to(tl.int64)[:, None] * stride_n + tl.arange(0, LINES)[None, :] * LINE
    for step in range(first, last):
        prefetch(lines + step * BLOCK_K)


@triton.jit
def row_offsets(rows, inner, stride_outer, stride_inner):
    """Where rows start in memory that has two strides for them: `inner` rows by stride_inner, those by stride_outer."""
    return (rows // inner).to(tl.int64) * stride_outer + (rows % inner).to(tl.int64) * stride_inner


@triton.jit
def epilogue(
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
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
):
    """Bias, activation, gate and residual on the float32 block of rows `m` and columns `n`; `up` is read if GATED."""
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n * stride_bias, mask=n < N, other=0.0).to(tl.float32)[None, :]
    acc = activate(acc, ACTIVATION)
    if GATED:
        if bias_ptr is not None:
            up += tl.load(bias_ptr + (N + n) * stride_bias, mask=n < N, other=0.0).to(tl.float32)[None, :]
        acc *= up
    if residual_ptr is not None:
        rows = row_offsets(m, residual_inner, stride_residual_outer, stride_residual_inner)
        offsets = rows[:, None] + n.to(tl.int64)[None, :] * stride_residual_n
        mask = (m < M)[:, None] & (n < N)[None, :]
        acc += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    return acc


@triton.jit
def finish(
    acc,
    up,
    m,
    n,
    tile,
    split,
    bias_ptr,
    residual_ptr,
    out_ptr,
    partial_ptr,
    counter_ptr,
    M,
    N,
    stride_bias,
    residual_inner,
    stride_residual_outer,
    stride_residual_inner,
    stride_residual_n,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """The way of a tile's sums (BLOCK_M, BLOCK_N) into the result, through memory if K is split among programs."""
    done = True
    if SPLIT_K > 1:
        # Every program leaves its part in memory; the last to arrive adds them in their order, whoever it is.
        SIZE: tl.constexpr = BLOCK_M * BLOCK_N
        STRIDE: tl.constexpr = SIZE * 2 if GATED else SIZE
        within = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        parts = partial_ptr + tile.to(tl.int64) * (STRIDE * SPLIT_K) + within
        tl.store(parts + split * STRIDE, acc)
        if GATED:
            tl.store(parts + split * STRIDE + SIZE, up)
        tl.debug_barrier()  # one thread counts for all of them: their stores have to come before
        done = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel", scope="gpu") == SPLIT_K - 1
    if done:
        if SPLIT_K > 1:
            tl.store(counter_ptr + tile, 0)  # as the next launch wants it
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            # Four loads in flight hide most of the latency; with all 16 of a split in flight registers spilled, and
            # with two of a large tile, and three of 64x64 on sm_100.
            LARGE: tl.constexpr = STRIDE > 4096 or (STRIDE == 4096 and SPLIT_K == 3)
            AT_ONCE: tl.constexpr = 1 if LARGE else (4 if SPLIT_K % 4 == 0 else SPLIT_K)
            for start in range(0, SPLIT_K, AT_ONCE):
                for part in tl.static_range(AT_ONCE):
                    acc += tl.load(parts + (start + part) * STRIDE, cache_modifier=".cg")
                    if GATED:
                        up += tl.load(parts + (start + part) * STRIDE + SIZE, cache_modifier=".cg")
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
        mask = (m < M)[:, None] & (n < N)[None, :]
        tl.store(out_ptr + offsets, result.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "x_inner", "residual_inner"], do_not_specialize_on_alignment=["live_ptr"])
def matmul_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    partial_ptr,  # (tiles, SPLIT_K, 2 if GATED else 1, BLOCK_M, BLOCK_N) float32
    counter_ptr,  # (tiles,) int32, zero before and after
    M,
    N,
    K,
    x_inner,
    stride_x_outer,
    stride_x_inner,
    stride_x_k,
    stride_weight_n,
    stride_weight_k,
    to_up,  # from a gate's row to the same row of up
    stride_bias,
    residual_inner,
    stride_residual_outer,
    stride_residual_inner,
    stride_residual_n,
    live_ptr,  # how many rows are wanted, or None for all
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    EVEN: tl.constexpr,
    X_PLAIN: tl.constexpr,
    PREFETCH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_dependents(PDL)
    tile = tl.program_id(0)
    tile_m, tile_n = tile_of(tile, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)

    steps = tl.cdiv(K, BLOCK_K)
    split = tl.program_id(1)
    first = split * steps // SPLIT_K
    last = (split + 1) * steps // SPLIT_K
    k = first * BLOCK_K + tl.arange(0, BLOCK_K)

    inside_m = tl.minimum(m, M - 1)  # rows past the last are the last again, and never stored
    if X_PLAIN:  # a division less for each row
        x_rows = inside_m.to(tl.int64) * stride_x_inner
    else:
        x_rows = row_offsets(inside_m, x_inner, stride_x_outer, stride_x_inner)
    x_ptrs = x_ptr + x_rows[:, None] + k.to(tl.int64)[None, :] * stride_x_k
    weight_ptrs = weight_ptr + k.to(tl.int64)[:, None] * stride_weight_k + n.to(tl.int64)[None, :] * stride_weight_n

    if PREFETCH and PDL:
        prefetch_weight(weight_ptr, n, N, stride_weight_n, first, last, BLOCK_K)
        if GATED:
            prefetch_weight(weight_ptr + to_up, n, N, stride_weight_n, first, last, BLOCK_K)
    wait_for_inputs(PDL)
    if live_ptr is not None:
        wanted = tl.load(live_ptr)
        if tile_m * BLOCK_M >= wanted:  # so for all parts of K: no counter is left over
            return
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(first, last):
        if EVEN:  # whole blocks of the weight
            x = tl.load(x_ptrs)
            weight = tl.load(weight_ptrs)
        else:
            inside = step * BLOCK_K + tl.arange(0, BLOCK_K) < K
            weight_mask = (n < N)[None, :] & inside[:, None]
            x = tl.load(x_ptrs, mask=inside[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=weight_mask, other=0.0)
        acc = dot(x, weight, acc)
        if GATED:
            if EVEN:
                weight = tl.load(weight_ptrs + to_up)
            else:
                weight = tl.load(weight_ptrs + to_up, mask=weight_mask, other=0.0)
            up = dot(x, weight, up)
        x_ptrs += BLOCK_K * stride_x_k
        weight_ptrs += BLOCK_K * stride_weight_k

    finish(
        acc, up, m, n, tile, split, bias_ptr, residual_ptr, out_ptr, partial_ptr, counter_ptr, M, N, stride_bias,
        residual_inner, stride_residual_outer, stride_residual_inner, stride_residual_n, ACTIVATION, GATED, BLOCK_M,
        BLOCK_N, SPLIT_K,
    )  # fmt: skip


def matmul(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    gated: bool = False,
    config: Config | None = None,
    live_rows: Tensor | None = None,
) -> Tensor:
    """`act(x @ weight.T + bias) + residual`, or `act(gate) * up` of the two halves of `x @ weight.T + bias` if gated.

    Shapes: x (..., K) with at most two strides for its rows, weight (N, K), or (2*N, K) if gated, of any strides,
    bias its rows' number, residual and the contiguous result (..., N). All of one dtype: float16, bfloat16 or float32;
    sums are float32, and the result is rounded once. The order of summation depends on the config alone.
    Rows from `live_rows` on, an int32 on the device, are not wanted: what the result has there is undefined.
    Source: the tiling and its order are Triton's tutorial "Matrix Multiplication"; the reduction by the last program to
    arrive is that of CUDA's sample threadFenceReduction.
    """
    columns = weight.shape[0] // 2 if gated else weight.shape[0]
    config = config or matmul_configs(Product.of(x, weight, gated))[0]
    out = x.new_empty((*x.shape[:-1], columns))
    rows, residual_rows = rows_of(x), out if residual is None else residual
    extra = rows_of(residual_rows)
    assert rows is not None
    assert extra is not None
    tiles = triton.cdiv(rows.count, config["BLOCK_M"]) * triton.cdiv(columns, config["BLOCK_N"])
    split = config["SPLIT_K"]
    partial, counter = None, None
    if split > 1:
        size = tiles * split * config["BLOCK_M"] * config["BLOCK_N"] * (2 if gated else 1)
        partial, counter = x.new_empty(size, dtype=torch.float32), counters(x, tiles)
    arguments: tuple[Any, ...] = (
        *(x, weight, bias, residual, out, partial, counter),
        *(rows.count, columns, x.shape[-1]),
        *(rows.inner, rows.stride_outer, rows.stride_inner, x.stride(-1)),
        *(weight.stride(0), weight.stride(1), columns * weight.stride(0), 1 if bias is None else bias.stride(0)),
        *(extra.inner, extra.stride_outer, extra.stride_inner, residual_rows.stride(-1), live_rows),
    )
    constants: dict[str, Any] = {
        "ACTIVATION": in_half(activation, x.dtype),
        "GATED": gated,
        "EVEN": columns % config["BLOCK_N"] == 0 and x.shape[-1] % config["BLOCK_K"] == 0,
        "X_PLAIN": rows.inner == rows.count,
        "PREFETCH": weight.stride(1) == 1,
    }
    launch(matmul_kernel, (tiles, split), *arguments, config=config, like=x, **constants)
    return out
