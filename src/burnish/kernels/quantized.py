"""`act(x @ weight.T + bias) + residual` for a few rows of x and a quantized weight, which is widened in registers.

Bound by reading the weight, so what counts is how few instructions a byte takes: at an H200's 4.2 TB/s a multiprocessor
issues 7 to 8 of them (of each thread) while a byte arrives, and of those that shift and select at most half. With
`GATED` the weight has two halves of rows, gate and up, and the result is `act(gate) * up`.

A row of the weight is read as words of 32 bits. `burnish.quantize` has laid the columns out such that the words of one
thread, four of them side by side, hold in their part `j`, of as many bits as an entry has, four neighbouring columns:
x is loaded four entries at a time and never moves between threads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from burnish.kernels.activations import in_half
from burnish.kernels.launch import Config, launch, launch_dependents, wait_for_inputs
from burnish.kernels.layout import rows_of
from burnish.kernels.matmul import INTERPRETED, epilogue, prefetch_weight, row_offsets
from burnish.kernels.matmul_configs import Product


@triton.jit
def as_float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def magic_of(indices, count, KIND: tl.constexpr):
    """The highest byte of the number under which `widened` puts entries, for each of `indices`, none of them negative.

    Not a constant to the compiler, which would keep a constant where instructions for bytes cannot read it, and copy it
    from there before each of them: 8.7 instructions for a byte of int4, and 6.9 so.
    """
    return tl.where(indices >= -count, 0x43 if KIND == "int4" else 0x4B, 0)


@triton.jit
def byte_under(words, magic, J: tl.constexpr, TO: tl.constexpr):
    """Byte `J` of the words as byte `TO` of a float32 whose highest byte is `magic`; the others are 0."""
    if INTERPRETED or isinstance(magic, tl.constexpr):
        return as_float(((words >> (8 * J)) & 0xFF) << (8 * TO) | magic << 24)
    # In one instruction; written as above it takes two.
    bits = tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;",
        "=r,r,r,r",
        [words, magic, selector(J, TO)],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )
    return as_float(bits)


@triton.constexpr_function
def selector(j: int, to: int) -> int:
    """What prmt wants for that: for each byte of the result, highest first, one of eight: 0 to 3 are the words', 4 is
    the magic one and 5 is 0."""
    return 0x4555 + (j - 5) * 16**to


@triton.jit
def widened(words, magic, J: tl.constexpr, KIND: tl.constexpr):
    """Part `J` of the words as float32: of int8 and fp8 the entries, of int4 128 and the entries (from 0 to 15).

    Nothing is converted: bits are put where a float32 has its mantissa, of which `magic` and zeros are the rest. With a
    constant for it, all are plain operations, which Triton moves to where tensor cores want their operands.
    """
    if KIND == "int4":
        nibbles = (words if J % 2 == 0 else words >> 4) & 0x0F0F0F0F
        return byte_under(nibbles, magic, J // 2, 2)  # 128, whose mantissa's highest seven bits are worth 64 to 1
    elif KIND == "int8":
        return byte_under(words ^ -0x7F7F7F80, magic, J, 0) - 8388736.0  # 2 ** 23 and the 128 that the sign bit adds
    # e4m3's sign, exponent and mantissa, where a float32 has them: 2 ** 120 too small, whether normal or not.
    return as_float(((words << (24 - J * 8)) >> 4) & -0x78100000) * 1.329227995784916e36


@triton.jit
def rows_of_weight(tile, N, BLOCK_N: tl.constexpr, ROWS: tl.constexpr):
    """The rows of weight that a tile has, of which up's follow gate's if there are twice as many as BLOCK_N. Those past
    the last one are the last one again, and never stored."""
    r = tl.arange(0, ROWS)
    return tl.minimum(tile * BLOCK_N + r % BLOCK_N, N - 1) + r // BLOCK_N * N


@triton.jit
def quantized_gemv_kernel(
    x_ptr,
    weight_ptr,  # words: (N, 4 * chunks), or (2 * N, 4 * chunks) if GATED
    scales_ptr,  # (N, 1), or of int4 (N, groups)
    zeros_ptr,  # of int4: (N, groups), or None where they all are 8
    bias_ptr,
    residual_ptr,
    out_ptr,
    M,
    N,
    chunks,  # of four words, in a row
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
    EXACT: tl.constexpr,  # whether int4's zeros are subtracted from each entry, or for all of them in the end
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_dependents(PDL)
    PARTS: tl.constexpr = 8 if KIND == "int4" else 4
    COLUMNS: tl.constexpr = 16 if KIND == "int4" else 4  # from one part of a word to the next one's
    GROUPS: tl.constexpr = 128 // GROUP if KIND == "int4" else 1  # of which a chunk has entries
    ROWS: tl.constexpr = BLOCK_N * 2 if GATED else BLOCK_N
    # Blocks are (rows of x, rows of weight, chunks, words of a chunk).
    m = tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK_C)
    i = tl.arange(0, 4)
    flat = rows_of_weight(tl.program_id(0), N, BLOCK_N, ROWS)
    row = flat.to(tl.int64)[None, :, None, None]
    word_ptrs = weight_ptr + row * stride_weight_n + (c * 4)[None, None, :, None] + i[None, None, None, :]
    x_ptrs = x_ptr + row_offsets(m, x_inner, stride_x_outer, stride_x_inner)[:, None, None, None]
    column = (c // 4 * 128 + c % 4 * 4 if KIND == "int4" else c * 16)[None, None, :, None] + i[None, None, None, :]
    x_ptrs += column.to(tl.int64) * stride_x_k
    x_mask = (m < M)[:, None, None, None]
    scale_ptrs = scales_ptr + row * stride_scales_n
    if KIND == "int4":
        scale_ptrs += (c // 4 * GROUPS)[None, None, :, None]
        zero_ptrs = scale_ptrs
        if zeros_ptr is not None:
            zero_ptrs = zeros_ptr + row * stride_zeros_n + (c // 4 * GROUPS)[None, None, :, None]

    words = tl.load(word_ptrs, mask=None if EVEN else (c < chunks)[None, None, :, None])
    if KIND != "int4":
        scale = tl.load(scale_ptrs).to(tl.float32)
    elif PDL:
        LINE: tl.constexpr = 1024 // scales_ptr.dtype.element_ty.primitive_bitwidth
        prefetch_weight(scales_ptr, flat, 2 * N, stride_scales_n, 0, tl.cdiv(chunks // 4 * GROUPS, LINE), LINE)
    magic = magic_of(c, chunks, KIND)[None, None, :, None]
    wait_for_inputs(PDL)
    acc = tl.zeros((BLOCK_M, ROWS, BLOCK_C, 1), tl.float32)
    for start in range(0, chunks, BLOCK_C):
        word_ptrs += BLOCK_C * 4
        # What is loaded of no chunk stays in place, is finite as anything is, and meets zeros of x.
        inside = (start + c < chunks)[None, None, :, None]
        if EVEN:
            ahead = tl.full((1, 1, 1, 1), start + BLOCK_C, tl.int32) < chunks
        else:
            ahead = (start + BLOCK_C + c < chunks)[None, None, :, None]
        next_words = tl.load(word_ptrs, mask=ahead)
        for g in tl.static_range(GROUPS):
            if KIND == "int4":
                scale = tl.load(scale_ptrs + g, mask=None if EVEN else inside).to(tl.float32)
                zero = 8.0
                if zeros_ptr is not None:
                    zero = tl.load(zero_ptrs + g, mask=None if EVEN else inside).to(tl.float32)
            part = tl.zeros((BLOCK_M, ROWS, BLOCK_C, 4), tl.float32)
            x_sum = tl.zeros((BLOCK_M, 1, BLOCK_C, 4), tl.float32)
            for j in tl.static_range(PARTS // GROUPS):
                x = tl.load(
                    x_ptrs + (g * (PARTS // GROUPS) + j) * COLUMNS * stride_x_k,
                    mask=x_mask if EVEN else x_mask & inside,
                    other=0.0,
                ).to(tl.float32)
                entries = widened(words, magic, g * (PARTS // GROUPS) + j, KIND)
                if KIND == "int4" and EXACT:
                    entries -= zero + 128.0
                part += x * entries
                x_sum += x
            dots = tl.sum(part, axis=3, keep_dims=True)
            if KIND == "int4":
                if not EXACT:
                    dots -= (zero + 128.0) * tl.sum(x_sum, axis=3, keep_dims=True)
                dots *= scale
            acc += dots
        words = next_words
        x_ptrs += BLOCK_C * PARTS * 4 * stride_x_k
        if KIND == "int4":
            scale_ptrs += BLOCK_C // 4 * GROUPS
            zero_ptrs += BLOCK_C // 4 * GROUPS

    if KIND != "int4":
        acc *= scale
    acc = tl.sum(tl.reshape(acc, (BLOCK_M, ROWS, BLOCK_C)), axis=2)
    up = acc
    if GATED:
        acc, up = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1)))
    result = epilogue(
        acc, up, m, n, bias_ptr, stride_bias, residual_ptr, residual_inner, stride_residual_outer,
        stride_residual_inner, stride_residual_n, M, N, ACTIVATION, GATED,
    )  # fmt: skip
    offsets = m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out_ptr + offsets, result.to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def quantized_gemv_configs(product: Product, kind: str) -> list[Config]:
    """Configs of `quantized_gemv`, the most promising first."""
    block_m = triton.next_power_of_2(product.rows)
    chunks = max(1, product.depth // (32 if kind == "int4" else 16))
    # (rows of weight, warps). A warp takes 32 chunks, so that all of x that it has serves every row. Of int4 in one row
    # of x, 8 rows take 6.9 instructions a byte (of them 0.6 for x) and 128 registers, 4 take 7.4 and 96.
    shapes = [(8, 4), (4, 4), (8, 2), (4, 8), (4, 2)] if kind == "int8" else [(8, 2), (8, 4), (4, 4), (4, 2), (4, 8)]
    # With each row of x, a row has four sums. What spills nothing in any kind, 8 bytes and more with twice as many:
    narrow = product.dtype == torch.float32 or product.target.capability >= (10, 0)
    most = (8 if block_m == 1 else 4) // (2 if narrow else 1)
    configs = []
    for rows, warps in shapes:
        rows = max(product.halves, min(rows, most))
        while warps > 1 and 32 * warps >= 2 * chunks:
            warps //= 2
        blocks = {"BLOCK_M": block_m, "BLOCK_N": rows // product.halves, "BLOCK_C": 32 * warps}
        configs.append(Config.of(num_warps=warps, num_stages=1, **blocks))
    # Half a block more than whole ones is an eighth of the work at a depth of 14336, and masks besides.
    whole = [config for config in configs if chunks % config["BLOCK_C"] == 0]
    return list(dict.fromkeys(whole or configs))


def quantized_gemv(
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

    Shapes: x (..., K) of at most BLOCK_M rows; weight, scales and zeros as `burnish.quantize` stores (N, K), or
    (2*N, K) if gated, contiguous, and each row of weight at a multiple of 16 bytes; bias its rows' number; residual and
    the contiguous result (..., N). x, bias and residual of one dtype: float16, bfloat16 or float32; scales of any of
    these. Sums are float32 and the result is rounded once.
    """
    config = config or quantized_gemv_configs(Product.of(x, weight, gated), kind)[0]
    out, arguments, constants = operands(x, weight, scales, zeros, kind, bias, activation, residual, gated)
    chunks = arguments.words // 4
    launch(
        quantized_gemv_kernel,
        (triton.cdiv(out.shape[-1], config["BLOCK_N"]),),
        *arguments.tensors,
        *(arguments.rows, out.shape[-1], chunks),
        *arguments.strides,
        config=config,
        like=x,
        EXACT=x.dtype == torch.float32,
        EVEN=chunks % config["BLOCK_C"] == 0,
        **constants,
    )
    return out


class Operands(NamedTuple):
    """What the kernels here take of a call's tensors."""

    tensors: tuple[Tensor | None, ...]
    rows: int
    words: int  # in a row of the weight
    strides: tuple[int, ...]


def operands(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    kind: str,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    gated: bool,
) -> tuple[Tensor, Operands, dict[str, Any]]:
    """The empty result, what the kernels take of the tensors, and the constants that they share."""
    words = weight.view(torch.int32)
    out = x.new_empty((*x.shape[:-1], weight.shape[0] // (2 if gated else 1)))
    rows, residual_rows = rows_of(x), out if residual is None else residual
    extra = rows_of(residual_rows)
    assert rows is not None
    assert extra is not None
    strides = (
        *(rows.inner, rows.stride_outer, rows.stride_inner, x.stride(-1)),
        *(words.stride(0), scales.stride(0), 1 if zeros is None else zeros.stride(0)),
        1 if bias is None else bias.stride(0),
        *(extra.inner, extra.stride_outer, extra.stride_inner, residual_rows.stride(-1)),
    )
    constants: dict[str, Any] = {
        "ACTIVATION": in_half(activation, x.dtype),
        "GATED": gated,
        "KIND": kind,
        "GROUP": x.shape[-1] // scales.shape[1] if kind == "int4" else 0,
    }
    tensors = (x, words, scales, zeros, bias, residual, out)
    return out, Operands(tensors, rows.count, words.shape[1], strides), constants
