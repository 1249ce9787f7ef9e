"""`act(x @ weight.T + bias) + residual` for up to 16 rows of x and a quantized weight, on tensor cores.

As in `skinny`, the rows of weight are the left operand. Part `j` of a block of words is one, widened to x's dtype, in
which every entry is exact; the columns of x that belong to it are the right one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from burnish.kernels.counters import counters
from burnish.kernels.launch import Config, launch, launch_dependents, wait_for_inputs
from burnish.kernels.matmul import dot, finish, prefetch_weight, row_offsets
from burnish.kernels.matmul_configs import Product, shared_memory
from burnish.kernels.quantized import operands, rows_of_weight, widened

_AHEAD = 64 << 10  # bytes of weight that a program asks for before its wait; at four programs an SM, half of H200's L2


@triton.jit(do_not_specialize=["M", "x_inner", "residual_inner"])
def quantized_skinny_kernel(
    x_ptr,
    weight_ptr,  # words: (N, count), or (2 * N, count) if GATED
    scales_ptr,  # (N, 1), or of int4 (N, groups)
    zeros_ptr,  # of int4: (N, groups), or None where they all are 8
    bias_ptr,
    residual_ptr,
    out_ptr,
    partial_ptr,  # (tiles, SPLIT_K, 2 if GATED else 1, BLOCK_M, BLOCK_N) float32
    counter_ptr,  # (tiles,) int32, zero before and after
    M,
    N,
    count,  # words of a row
    x_inner,
    stride_x_outer,
    stride_x_inner,
    stride_x_k,
    stride_weight_n,
    stride_scales_n,
    stride_zeros_n,
    stride_bias,
    residual_inner,
    stride_residual_outer,
    stride_residual_inner,
    stride_residual_n,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,  # columns that share a scale, of int4
    EVEN: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    SPLIT_K: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_dependents(PDL)
    PARTS: tl.constexpr = 8 if KIND == "int4" else 4
    MAGIC: tl.constexpr = 0x43 if KIND == "int4" else 0x4B
    TILE: tl.constexpr = 16 if KIND == "int4" else 4  # words whose parts are neighbouring columns
    GROUPS: tl.constexpr = 128 // GROUP if KIND == "int4" else 1  # of which a block has entries
    ROWS: tl.constexpr = BLOCK_N * 2 if GATED else BLOCK_N
    tile = tl.program_id(0)
    m = tl.arange(0, BLOCK_M)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row = rows_of_weight(tile, N, BLOCK_N, ROWS)
    w = tl.arange(0, BLOCK_W)

    steps = tl.cdiv(count, BLOCK_W)
    split = tl.program_id(1)
    first = split * steps // SPLIT_K
    last = (split + 1) * steps // SPLIT_K
    if PDL:
        prefetch_weight(weight_ptr, row, 2 * N, stride_weight_n, first, min(last, first + AHEAD), BLOCK_W)
        if KIND == "int4":
            LINE: tl.constexpr = 1024 // scales_ptr.dtype.element_ty.primitive_bitwidth
            lines = tl.cdiv(last * GROUPS, LINE)
            prefetch_weight(scales_ptr, row, 2 * N, stride_scales_n, first * GROUPS // LINE, lines, LINE)

    x_ptrs = x_ptr + row_offsets(m, x_inner, stride_x_outer, stride_x_inner)[:, None]
    column = first * (BLOCK_W * PARTS) + w // TILE * (TILE * PARTS) + w % TILE
    x_ptrs += column.to(tl.int64)[None, :] * stride_x_k
    x_mask = (m < M)[:, None]
    word_ptrs = weight_ptr + row.to(tl.int64)[:, None] * stride_weight_n + (first * BLOCK_W + w)[None, :]
    scale_ptrs = scales_ptr + row.to(tl.int64) * stride_scales_n
    zero_ptrs = scale_ptrs
    if zeros_ptr is not None:
        zero_ptrs = zeros_ptr + row.to(tl.int64) * stride_zeros_n
    if KIND != "int4":
        scale = tl.load(scale_ptrs).to(tl.float32)
    wait_for_inputs(PDL)
    acc = tl.zeros((ROWS, BLOCK_M), tl.float32)
    for step in range(first, last):
        inside = (step * BLOCK_W + w < count)[None, :]
        # What is loaded of no word is finite as anything is, and meets zeros of x.
        words = tl.load(word_ptrs, mask=None if EVEN else inside)
        for g in tl.static_range(GROUPS):
            zero = 0.0
            part = acc
            if KIND == "int4":
                scale = tl.load(scale_ptrs + step * GROUPS + g).to(tl.float32)
                zero = 136.0
                if zeros_ptr is not None:
                    zero = (tl.load(zero_ptrs + step * GROUPS + g).to(tl.float32) + 128.0)[:, None]
                part = tl.zeros((ROWS, BLOCK_M), tl.float32)
            for j in tl.static_range(PARTS // GROUPS):
                x = tl.load(
                    x_ptrs + (g * (PARTS // GROUPS) + j) * TILE * stride_x_k,
                    mask=x_mask if EVEN else x_mask & inside,
                    other=0.0,
                )
                entries = widened(words, MAGIC, g * (PARTS // GROUPS) + j, KIND) - zero
                part = dot(entries.to(x.dtype), x.T, part)
            acc = acc + part * scale[:, None] if KIND == "int4" else part
        x_ptrs += BLOCK_W * PARTS * stride_x_k
        word_ptrs += BLOCK_W

    if KIND != "int4":
        acc *= scale[:, None]
    up = acc
    if GATED:
        acc, up = tl.split(tl.permute(tl.reshape(acc, (2, BLOCK_N, BLOCK_M)), (1, 2, 0)))
    finish(
        acc.T, up.T, m, n, tile, split, bias_ptr, residual_ptr, out_ptr, partial_ptr, counter_ptr, M, N, stride_bias,
        residual_inner, stride_residual_outer, stride_residual_inner, stride_residual_n, ACTIVATION, GATED, BLOCK_M,
        BLOCK_N, SPLIT_K,
    )  # fmt: skip


def quantized_skinny_configs(product: Product, kind: str, group: int) -> list[Config]:
    """Configs of `quantized_skinny`, the most promising first; `group` columns of int4 share a scale."""
    parts = 8 if kind == "int4" else 4
    words = product.depth // parts
    # (rows of weight, words, warps, stages). Two warps multiply without a group of four having to meet (wgmma), and
    # widen each entry once. x is read again by each tile, and of int4 is as much as 64 rows of weight.
    # Of int4 a block is one of 128 columns, so that a group is not two blocks' and every row of weight has one scale.
    shapes = [(64, 16, 2, 5), (32, 16, 2, 5)]
    if group == 128:  # with smaller ones it spills
        shapes.insert(1, (128, 16, 2, 4))
    if kind != "int4":
        shapes = [(64, 32, 2, 4), (32, 32, 2, 5)]
        if product.target.capability < (10, 0):  # where they spill
            shapes += [(64, 64, 2, 3), (32, 64, 2, 3)]
        if words % 32:  # masks of wider blocks take so many registers that they spill
            shapes = [(32, 32, 2, 4)]
    configs = []
    for rows, block_w, warps, stages in shapes:
        block_w = max(16, min(block_w, triton.next_power_of_2(words)))
        stage = rows * block_w * 4 + 16 * block_w * parts * 2
        most = shared_memory(product.target) - 2048
        if stage * stages > most:
            continue
        blocks = {"BLOCK_M": 16, "BLOCK_N": rows // product.halves, "BLOCK_W": block_w}
        tiles = triton.cdiv(product.columns, blocks["BLOCK_N"])
        for per_sm in (min(6, most // (stage * stages)), 2):
            # A shorter part does nothing but fill its pipeline.
            fit = min(product.target.num_sms * per_sm // tiles, triton.cdiv(words, block_w) // stages)
            split = max(s for s in (1, 2, 4, 8) if s <= max(1, fit))
            configs.append(Config.of(num_warps=warps, num_stages=stages, **blocks, SPLIT_K=split))
    return list(dict.fromkeys(configs))


def quantized_skinny(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    kind: str,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    gated: bool = False,
    config: Config | None = None,
) -> Tensor:
    """`act(x @ weight.T + bias) + residual`, or `act(gate) * up` of the two halves of `x @ weight.T + bias` if gated.

    As `quantized_gemv`, of up to 16 rows of float16 or bfloat16. The order of summation depends on the config alone.
    """
    out, arguments, constants = operands(x, weight, scales, zeros, kind, bias, activation, residual, gated)
    config = config or quantized_skinny_configs(Product.of(x, weight, gated), kind, constants["GROUP"])[0]
    block_m, block_n, block_w, split = (config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_W", "SPLIT_K"))
    tiles = triton.cdiv(out.shape[-1], block_n)
    partial, counter = None, None
    if split > 1:
        size = tiles * split * block_m * block_n * (2 if gated else 1)
        partial, counter = x.new_empty(size, dtype=torch.float32), counters(x, tiles)
    launch(
        quantized_skinny_kernel,
        (tiles, split),
        *(*arguments.tensors, partial, counter),
        *(arguments.rows, out.shape[-1], arguments.words),
        *arguments.strides,
        config=config,
        like=x,
        EVEN=arguments.words % block_w == 0,
        AHEAD=max(1, _AHEAD // (block_n * (2 if gated else 1) * block_w * 4)),
        **constants,
    )
    return out
