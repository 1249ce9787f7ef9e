"""`act(x @ weight.T + bias) + residual` for many rows: persistent programs that copy tiles by tensor memory access.

With `GATED` the weight has two halves of rows, gate and up, and the result is `act(gate) * up`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from burnish.kernels.activations import in_half
from burnish.kernels.launch import Config, launch, launch_dependents, wait_for_inputs
from burnish.kernels.layout import rows_of
from burnish.kernels.matmul import dot, epilogue, prefetch_weight, tile_of
from burnish.kernels.matmul_configs import Product, fitting, programs_per_sm


@triton.jit
def halves(block, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a block's columns."""
    return tl.split(tl.permute(tl.reshape(block, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit(do_not_specialize=["M", "residual_inner"], do_not_specialize_on_alignment=["live_ptr"])
def matmul_tma_kernel(
    x_desc,  # (M, K)
    weight_desc,  # (N, K), or (K, N) if K_MAJOR; (2, N, K) or (K, 2, N) if GATED
    out_desc,  # (M, N), in blocks of half a tile's columns if HALVES
    weight_ptr,
    bias_ptr,
    residual_ptr,
    M,
    N,
    K,
    stride_weight_n,
    stride_bias,
    residual_inner,
    stride_residual_outer,
    stride_residual_inner,
    stride_residual_n,
    live_ptr,  # how many rows are wanted, or None for all
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    K_MAJOR: tl.constexpr,
    AHEAD: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    HALVES: tl.constexpr,
    FLATTEN: tl.constexpr,
    PDL: tl.constexpr,
):
    rows, columns, steps = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K)
    if PDL and not K_MAJOR:
        _, column = tile_of(tl.program_id(0), rows, columns, GROUP_M)
        soon = column * BLOCK_N + tl.arange(0, BLOCK_N)
        prefetch_weight(weight_ptr, soon, N, stride_weight_n, 0, min(steps, AHEAD), BLOCK_K)
        if GATED:
            prefetch_weight(weight_ptr, N + soon, 2 * N, stride_weight_n, 0, min(steps, AHEAD), BLOCK_K)
    wait_for_inputs(PDL)
    if live_ptr is not None:
        rows = tl.minimum(rows, tl.cdiv(tl.load(live_ptr), BLOCK_M))
    for tile in tl.range(tl.program_id(0), rows * columns, tl.num_programs(0), flatten=FLATTEN):
        tile_m, tile_n = tile_of(tile, rows, columns, GROUP_M)
        first_m, first_n = tile_m * BLOCK_M, tile_n * BLOCK_N
        # Gated, one block holds rows of both halves: one product of twice the columns instead of two.
        WIDTH: tl.constexpr = 2 * BLOCK_N if GATED else BLOCK_N
        acc = tl.zeros((BLOCK_M, WIDTH), tl.float32)
        for step in range(steps):
            k = step * BLOCK_K
            x = x_desc.load([first_m, k])
            if K_MAJOR:
                weight = weight_desc.load([k, 0, first_n] if GATED else [k, first_n]).reshape(BLOCK_K, WIDTH)
            else:
                weight = weight_desc.load([0, first_n, k] if GATED else [first_n, k]).reshape(WIDTH, BLOCK_K).T
            acc = dot(x, weight, acc)
        up = acc
        if GATED:
            acc, up = halves(acc, BLOCK_M, WIDTH)
        m = first_m + tl.arange(0, BLOCK_M)
        if HALVES:  # half the registers and half the shared memory for what the epilogue reads and writes
            HALF: tl.constexpr = BLOCK_N // 2
            left, right = halves(acc, BLOCK_M, BLOCK_N)
            left_up, right_up = left, right
            if GATED:
                left_up, right_up = halves(up, BLOCK_M, BLOCK_N)
            for half in tl.static_range(2):
                n = first_n + half * HALF + tl.arange(0, HALF)
                result = epilogue(
                    left if half == 0 else right,
                    left_up if half == 0 else right_up,
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
                out_desc.store([first_m, first_n + half * HALF], result.to(DTYPE))
        else:
            result = epilogue(
                acc,
                up,
                m,
                first_n + tl.arange(0, BLOCK_N),
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
            out_desc.store([first_m, first_n], result.to(DTYPE))
    # Late: a tile takes nearly all of a multiprocessor's shared memory, and programs of the next kernel that crowd in
    # where one ends first run two to a multiprocessor while others stand idle (BERT-base 1 x 384, H200: 494 -> 481 us).
    launch_dependents(PDL)


_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def matmul_tma_configs(product: Product) -> list[Config]:
    """Configs of `matmul_tma`, the most promising first; none where the device has no tensor memory access."""
    # (BLOCK_M, BLOCK_N, BLOCK_K, HALVES, FLATTEN, warps, stages), BLOCK_N of both halves together if gated.
    # Four warps have no registers for 128x128 on sm_90, nor for 64x256 on sm_100. Warp specialization of Triton 3.9 on
    # sm_90 leaves the code of 8 warps as it is and fails in the compiler with 4. 128x256 loses to smaller tiles where
    # they are less than a wave.
    spread = int(product.target.capability[0] == 10)  # there 128x128 in one piece spills
    if product.rows <= 1024:
        shapes = [
            (64, 128, 64, 0, 0, 4, 4),
            (128, 128, 64, 0, 0, 8, 4),
            (64, 64, 128, 0, 0, 4, 3),
            (128, 64, 64, 0, 0, 4, 4),
            (128, 128, 64, spread, 1, 8, 4),
        ]
        shapes += [(128, 256, 64, 1, 1, 8, 3)] if product.columns * product.halves >= 4096 else []
    else:
        shapes = [
            (128, 256, 64, 1, 1, 8, 3),
            (256, 128, 64, 1, 1, 8, 3),
            (128, 256, 64, 1, 0, 8, 3),
            (128, 128, 64, spread, 1, 8, 4),
            (128, 128, 64, 0, 0, 8, 4),
        ]
        shapes += [(64, 256, 64, 1, 0, 4, 4)] if product.target.capability[0] == 9 else []
    configs = []
    for m, n, k, half, flatten, warps, stages in shapes:
        blocks = {"BLOCK_M": m, "BLOCK_N": n // product.halves, "BLOCK_K": k, "GROUP_M": 8}
        blocks |= {"HALVES": half, "FLATTEN": flatten}
        configs.append(Config.of(num_warps=warps, num_stages=stages, **blocks))
    return fitting(configs, product) if product.target.tma else []


_PORTABLE = Config.of(num_warps=8, num_stages=3, BLOCK_M=128, BLOCK_N=64, BLOCK_K=64, GROUP_M=8, HALVES=0, FLATTEN=0)
_AHEAD = 128 << 10  # bytes of weight that a program asks for before its wait


def matmul_tma(
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

    Shapes: x (..., K) with one stride for its rows, weight (N, K), or (2*N, K) if gated, or the transpose of such
    memory, bias its rows' number, residual and the contiguous result (..., N). Rows of x, weight and result are
    contiguous and multiples of 16 bytes. All of one dtype: float16 or bfloat16; sums are float32, the result is rounded
    once. Rows from `live_rows` on, an int32 on the device, are not wanted: what the result has there is undefined.
    Source: Triton's tutorial "Persistent Matmul".
    """
    columns = weight.shape[0] // 2 if gated else weight.shape[0]
    product = Product.of(x, weight, gated)
    config = config or next(iter(matmul_tma_configs(product)), _PORTABLE)
    block_m, block_n, block_k = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
    out = x.new_empty((*x.shape[:-1], columns))
    rows, residual_rows = rows_of(x), out if residual is None else residual
    extra = rows_of(residual_rows)
    assert rows is not None
    assert extra is not None
    k_major = weight.stride(1) != 1
    memory = weight.t() if k_major else weight
    shape, strides = list(memory.shape), list(memory.stride())
    blocks = [block_k, block_n] if k_major else [block_n, block_k]
    if gated:
        half = 1 if k_major else 0
        shape[half : half + 1] = [2, columns]
        strides.insert(half, columns * strides[half])
        blocks.insert(half, 2)
    depth = x.shape[-1]
    arguments: tuple[Any, ...] = (
        TensorDescriptor(x, [rows.count, depth], [rows.stride_inner, 1], [block_m, block_k]),
        TensorDescriptor(memory, shape, strides, blocks),
        TensorDescriptor(
            out, [rows.count, columns], [columns, 1], [block_m, block_n // 2 if config["HALVES"] else block_n]
        ),
        *(weight, bias, residual, rows.count, columns, depth),
        *(weight.stride(0), 1 if bias is None else bias.stride(0)),
        *(extra.inner, extra.stride_outer, extra.stride_inner, residual_rows.stride(-1), live_rows),
    )
    constants = {
        "ACTIVATION": in_half(activation, x.dtype),
        "GATED": gated,
        "K_MAJOR": k_major,
        "DTYPE": _DTYPES[x.dtype],
        "AHEAD": max(1, _AHEAD // (product.halves * block_n * block_k * x.element_size())),
    }
    tiles = triton.cdiv(rows.count, block_m) * triton.cdiv(columns, block_n)
    programs = product.target.num_sms * programs_per_sm(config, product)
    launch(matmul_tma_kernel, (min(tiles, programs),), *arguments, config=config, like=x, **constants)
    return out
