"""`act(x @ weight.T + bias) + residual` for up to 16 rows of x, on tensor cores, the weight in 16, 8 or 4 bits.

Bound by reading the weight: all that a program needs of it is on its way before the wait for the kernel ahead, or as
much of it as `AHEAD` says. A program has a few rows of the weight, and its warps share their columns. Of a step, 64
bytes of each of 16 rows, a thread reads 16 bytes of two rows. Widened, they are what the tensor cores want of the left
operand from that very thread, if columns are numbered accordingly; x's are numbered the same. So what was read moves
nowhere, and sums meet only in the end.
With `GATED` the weight has two halves of rows, gate and up, and the result is `act(gate) * up`.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra import cuda as tl_cuda

from burnish.kernels.activations import activate, in_half
from burnish.kernels.digits import CHUNK, DIGITS, columns_of, digits_at, in_digits, worth_of
from burnish.kernels.launch import Config, launch
from burnish.kernels.layout import rows_of
from burnish.kernels.matmul_configs import Product
from burnish.kernels.widen import STEP_COLUMNS, factor_of, octets, widened

MAX_STEPS = 64  # of a warp; the kernel has the code of each
ROWS = gl.constexpr(16)  # of a program's weight: what one instruction of the tensor cores takes
_MOST_DIGITS = 16384  # columns of x
# Bytes of digits at once. Loads pass through the same memory: 4096x14336 of int8 takes 16.0 us with 16 KB on an H200,
# 16.3 with 32 KB and 24.1 with 64 KB.
_MOST_SHARED = gl.constexpr(16384)
_REGISTERS = 128  # of a thread of int4: two programs of 8 warps at once
_SUMS = gl.constexpr(4)  # that steps are added to in turn, so that none has to wait for the one before it


@gluon.jit
def first_row(pair, HEAD: gl.constexpr, INTERLEAVED: gl.constexpr):
    """The row of the weight that a pair begins with: of gate, or the first partner of a rotation if there are heads of
    HEAD rows."""
    if HEAD == 0:
        return pair
    else:
        HALF: gl.constexpr = HEAD // 2
        return pair // HALF * HEAD + pair % HALF * (2 if INTERLEAVED else 1)


@gluon.jit
def _rows_of_weight(
    tile, r, count, to_partner, PAIRS: gl.constexpr, HEAD: gl.constexpr, INTERLEAVED: gl.constexpr, ROWS: gl.constexpr
):  # fmt: skip
    """The rows `r` of a tile in the weight, of `count` rows or pairs of rows, which are `to_partner` apart; those past
    the last one are the last one again, and never stored."""
    if PAIRS:
        HALF: gl.constexpr = ROWS // 2
        pair = gl.minimum(tile * HALF + r % HALF, count - 1)
        return first_row(pair, HEAD, INTERLEAVED) + r // HALF * to_partner
    else:
        return gl.minimum(tile * ROWS + r, count - 1)


@gluon.jit
def _load(pointers, place, limit, EVEN: gl.constexpr):
    """Zeros where `place` is not below `limit`, which need not be looked at if EVEN."""
    if EVEN:
        return gl.load(pointers)
    else:
        return gl.load(pointers, mask=place < limit, other=0)


@gluon.jit
def row_offsets(m, inner, stride_outer, stride_inner):
    return (m // inner).to(gl.int64) * stride_outer + (m % inner).to(gl.int64) * stride_inner


@gluon.jit
def _halves_of(block):
    """A block of three axes as the two halves of its last one."""
    both = gl.reshape(block, (block.shape[0], block.shape[1], 2, block.shape[2] // 2))
    return gl.split(gl.permute(both, (0, 1, 3, 2)))


@gluon.jit
def _scales_of(
    scales_ptr, tile, count, to_partner, stride_scales_n, PAIRS: gl.constexpr, HEAD: gl.constexpr,
    INTERLEAVED: gl.constexpr, UNITS: gl.constexpr, STEPS: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """Those of each split's groups, a step each, one after the other; asked for together."""
    SPLITS: gl.constexpr = gl.num_warps()
    GROUPS: gl.constexpr = UNITS // 16
    WIDTH: gl.constexpr = triton.next_power_of_2(STEPS)
    SCALES: gl.constexpr = gl.BlockedLayout([1, 1, WIDTH], [1, 8, 4], [SPLITS, 1, 1], [2, 1, 0])
    split = gl.arange(0, SPLITS, gl.SliceLayout(1, gl.SliceLayout(2, SCALES)))[:, None][:, :, None]
    r = gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(2, SCALES)))[None, :][:, :, None]
    step = gl.arange(0, WIDTH, gl.SliceLayout(0, gl.SliceLayout(1, SCALES)))[None, :][:, None, :]
    row = _rows_of_weight(tile, r, count, to_partner, PAIRS, HEAD, INTERLEAVED, ROWS)
    group = split * STEPS + step
    pointers = scales_ptr + row.to(gl.int64) * stride_scales_n + group
    if WIDTH == STEPS and GROUPS == SPLITS * STEPS:
        scales = (gl.load(pointers),)
    else:
        scales = (gl.load(pointers, mask=(step < STEPS) & (group < GROUPS), other=0.0),)
    for _ in gl.static_range(STEPS):
        if len(scales) < WIDTH:
            halves = ()
            for i in gl.static_range(len(scales)):
                halves = halves + _halves_of(scales[i])
            scales = halves
    return scales


@gluon.jit
def ask(
    weight_ptr, scales_ptr, tile, count, to_partner, stride_weight_n, stride_scales_n, KIND: gl.constexpr,
    PAIRS: gl.constexpr, HEAD: gl.constexpr, INTERLEAVED: gl.constexpr, UNITS: gl.constexpr, AHEAD: gl.constexpr,
    ROWS: gl.constexpr = ROWS,
):  # fmt: skip
    """What `multiply` goes on with: loads on their way of a tile's rows, and where the next ones are."""
    SPLITS: gl.constexpr = gl.num_warps()
    SIZE: gl.constexpr = 1 if KIND == "none" else 4
    if KIND != "none":  # of bytes: a step's are then in a thread's registers as they lie in memory
        weight_ptr = weight_ptr.to(gl.pointer_type(gl.int8), bitcast=True)
    STEP: gl.constexpr = 512 // weight_ptr.dtype.element_ty.primitive_bitwidth
    STEPS: gl.constexpr = (UNITS * SIZE + STEP * SPLITS - 1) // (STEP * SPLITS)
    EVEN: gl.constexpr = UNITS * SIZE % (STEP * SPLITS) == 0
    WEIGHT: gl.constexpr = gl.BlockedLayout([1, 1, STEP // 4], [1, 8, 4], [SPLITS, 1, 1], [2, 1, 0])
    split = gl.arange(0, SPLITS, gl.SliceLayout(1, gl.SliceLayout(2, WEIGHT)))[:, None][:, :, None]
    r = gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(2, WEIGHT)))[None, :][:, :, None]
    unit = gl.arange(0, STEP, gl.SliceLayout(0, gl.SliceLayout(1, WEIGHT)))[None, :][:, None, :]
    unit = split * (STEPS * STEP) + unit
    row = _rows_of_weight(tile, r, count, to_partner, PAIRS, HEAD, INTERLEAVED, ROWS)
    weight_ptrs = weight_ptr + row.to(gl.int64) * (stride_weight_n * SIZE) + unit
    read = ()
    for i in gl.static_range(AHEAD):
        read = read + (_load(weight_ptrs + i * STEP, unit + i * STEP, UNITS * SIZE, EVEN),)
    scales = ()
    if KIND == "int4":
        scales = _scales_of(
            scales_ptr, tile, count, to_partner, stride_scales_n, PAIRS, HEAD, INTERLEAVED, UNITS, STEPS, ROWS
        )
    return read, scales, weight_ptrs, unit


@gluon.jit
def _multiply_floats(
    asked, x_ptr, M, x_inner, stride_x_outer, stride_x_inner, KIND: gl.constexpr, UNITS: gl.constexpr,
    COLUMNS: gl.constexpr, BLOCK_M: gl.constexpr, AHEAD: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    read, scales, weight_ptrs, unit = asked
    SPLITS: gl.constexpr = gl.num_warps()
    STEP: gl.constexpr = 512 // weight_ptrs.dtype.element_ty.primitive_bitwidth
    LENGTH: gl.constexpr = UNITS if KIND == "none" else 4 * UNITS
    STEPS: gl.constexpr = (LENGTH + STEP * SPLITS - 1) // (STEP * SPLITS)
    EVEN: gl.constexpr = LENGTH % (STEP * SPLITS) == 0
    X: gl.constexpr = gl.BlockedLayout([1, 1, COLUMNS // 4], [1, 8, 4], [SPLITS, 1, 1], [2, 1, 0])
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [SPLITS, 1, 1], [1, 16, 8])
    # Rows past the last one are the last one again, and never stored.
    m = gl.minimum(gl.arange(0, BLOCK_M, gl.SliceLayout(0, gl.SliceLayout(2, X))), M - 1)[None, :][:, :, None]
    column = gl.arange(0, COLUMNS, gl.SliceLayout(0, gl.SliceLayout(1, X)))[None, :][:, None, :]
    split = gl.arange(0, SPLITS, gl.SliceLayout(1, gl.SliceLayout(2, X)))[:, None][:, :, None]
    column = split * (STEPS * COLUMNS) + column
    x_ptrs = x_ptr + row_offsets(m, x_inner, stride_x_outer, stride_x_inner) + column
    sums = ()
    for _ in gl.static_range(_SUMS):
        sums = sums + (gl.zeros([SPLITS, ROWS, BLOCK_M], gl.float32, MMA),)
    for i in gl.static_range(STEPS):
        x = _load(x_ptrs + i * COLUMNS, column + i * COLUMNS, LENGTH * COLUMNS // STEP, EVEN)
        # Split, row of x, thread, product of a thread, half of it, pair, entry.
        x = gl.reshape(x, (SPLITS, BLOCK_M, 4, COLUMNS // 16, 2, 2))
        x = gl.reshape(gl.permute(x, (0, 3, 4, 2, 5, 1)), (SPLITS, COLUMNS, BLOCK_M))
        x = gl.convert_layout(x, gl.DotOperandLayout(1, MMA, 2))
        weight = gl.convert_layout(widened(read[i], x.dtype, KIND, COLUMNS), gl.DotOperandLayout(0, MMA, 2))
        if i + AHEAD < STEPS:
            read = read + (_load(weight_ptrs + (i + AHEAD) * STEP, unit + (i + AHEAD) * STEP, LENGTH, EVEN),)
        if KIND == "int4":
            part = mma_v2(weight, x, gl.zeros([SPLITS, ROWS, BLOCK_M], gl.float32, MMA))
            sums = sums[1:] + (sums[0] + part * gl.convert_layout(scales[i], MMA).to(gl.float32),)
        else:
            sums = sums[1:] + (mma_v2(weight, x, sums[0]),)
    acc = gl.sum((sums[0] + sums[1]) + (sums[2] + sums[3]), 0)
    return acc * factor_of(KIND, x_ptr.dtype.element_ty)


@gluon.jit
def _multiply_digits(
    asked, x_ptr, KIND: gl.constexpr, UNITS: gl.constexpr, COLUMNS: gl.constexpr, AHEAD: gl.constexpr,
    ROWS: gl.constexpr,
):  # fmt: skip
    read, scales, weight_ptrs, unit = asked
    SPLITS: gl.constexpr = gl.num_warps()
    STEP: gl.constexpr = 512 // weight_ptrs.dtype.element_ty.primitive_bitwidth
    LENGTH: gl.constexpr = 4 * UNITS
    STEPS: gl.constexpr = (LENGTH + STEP * SPLITS - 1) // (STEP * SPLITS)
    EVEN: gl.constexpr = LENGTH % (STEP * SPLITS) == 0
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [SPLITS, 1, 1], [1, 16, 8])
    chunks, scale, worth = columns_of(x_ptr, LENGTH * COLUMNS // STEP, STEPS * COLUMNS)
    AT_ONCE: gl.constexpr = _MOST_SHARED // (SPLITS * DIGITS * CHUNK)
    PER_PART: gl.constexpr = AT_ONCE * CHUNK // COLUMNS
    zeros = gl.zeros([SPLITS, ROWS if KIND == "int4" else 2 * ROWS, 8], gl.int32, MMA)
    sums = zeros.to(gl.float32) if KIND == "int4" else zeros
    for i in gl.static_range(STEPS):
        if i % PER_PART == 0:
            shared = in_digits(chunks, scale, i // PER_PART * AT_ONCE, AT_ONCE, KIND)
        x = gl.convert_layout(digits_at(shared, i % PER_PART, KIND, COLUMNS), gl.DotOperandLayout(1, MMA, 4))
        weight = gl.convert_layout(octets(read[i], KIND, COLUMNS), gl.DotOperandLayout(0, MMA, 4))
        if i + AHEAD < STEPS:
            read = read + (_load(weight_ptrs + (i + AHEAD) * STEP, unit + (i + AHEAD) * STEP, LENGTH, EVEN),)
        if KIND == "int4":
            part = mma_v2(weight, x, zeros).to(gl.float32)
            sums += part * gl.convert_layout(scales[i], MMA).to(gl.float32)
        else:
            sums = mma_v2(weight, x, sums)
    return worth_of(sums, worth, KIND, ROWS)


@gluon.jit
def multiply(
    asked, x_ptr, M, x_inner, stride_x_outer, stride_x_inner, KIND: gl.constexpr, UNITS: gl.constexpr,
    COLUMNS: gl.constexpr, BLOCK_M: gl.constexpr, AHEAD: gl.constexpr, ROWS: gl.constexpr = ROWS,
):  # fmt: skip
    """The sums of a tile, (ROWS, BLOCK_M): if BLOCK_M is 1, by integers."""
    if BLOCK_M == 1:
        return _multiply_digits(asked, x_ptr, KIND, UNITS, COLUMNS, AHEAD, ROWS)
    else:
        return _multiply_floats(
            asked, x_ptr, M, x_inner, stride_x_outer, stride_x_inner, KIND, UNITS, COLUMNS, BLOCK_M, AHEAD, ROWS
        )


@gluon.jit
def partners_of(acc, BLOCK_M: gl.constexpr, OUT: gl.constexpr):
    """The sums of a tile's pairs: of the first row of each, and of its partner."""
    first, second = gl.split(gl.permute(gl.reshape(acc, (2, acc.shape[0] // 2, BLOCK_M)), (1, 2, 0)))
    return gl.convert_layout(first, OUT), gl.convert_layout(second, OUT)


@gluon.jit
def gemv_mma_kernel(
    x_ptr, weight_ptr, scales_ptr, bias_ptr, residual_ptr, out_ptr, M, N, x_inner, stride_x_outer, stride_x_inner,
    stride_weight_n, stride_scales_n, stride_bias, residual_inner, stride_residual_outer, stride_residual_inner,
    stride_residual_n, KIND: gl.constexpr, ACTIVATION: gl.constexpr, GATED: gl.constexpr, UNITS: gl.constexpr,
    COLUMNS: gl.constexpr, BLOCK_M: gl.constexpr, ROWS: gl.constexpr, AHEAD: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """UNITS are those that a row of the weight is stored as: entries, or words of 32 bits; COLUMNS those of a step."""
    if PDL:
        tl_cuda.gdc_launch_dependents()
    OUT: gl.constexpr = gl.BlockedLayout([1, 1], [16, 2], [1, gl.num_warps()], [0, 1])
    tile = gl.program_id(0)
    asked = ask(
        weight_ptr, scales_ptr, tile, N, N, stride_weight_n, stride_scales_n, KIND, GATED, 0, False, UNITS, AHEAD, ROWS,
    )  # fmt: skip
    TILE: gl.constexpr = ROWS // 2 if GATED else ROWS
    n = tile * TILE + gl.arange(0, TILE, gl.SliceLayout(1, OUT))
    inside_n = gl.minimum(n, N - 1)
    if KIND == "int8" or KIND == "fp8":
        scale = gl.load(scales_ptr + inside_n).to(gl.float32)
        up_scale = scale
        if GATED:
            up_scale = gl.load(scales_ptr + N + inside_n).to(gl.float32)
    if PDL:
        tl_cuda.gdc_wait()

    acc = multiply(
        asked, x_ptr, M, x_inner, stride_x_outer, stride_x_inner, KIND, UNITS, COLUMNS, BLOCK_M, AHEAD, ROWS
    )  # fmt: skip
    if GATED:
        acc, up = partners_of(acc, BLOCK_M, OUT)
    else:
        acc = gl.convert_layout(acc, OUT)
        up = acc
    if KIND == "int8" or KIND == "fp8":
        acc, up = acc * scale[:, None], up * up_scale[:, None]
    if bias_ptr is not None:
        acc += gl.load(bias_ptr + inside_n * stride_bias).to(gl.float32)[:, None]
        if GATED:
            up += gl.load(bias_ptr + (N + inside_n) * stride_bias).to(gl.float32)[:, None]
    acc = activate(acc, ACTIVATION)
    if GATED:
        acc *= up
    row = gl.arange(0, BLOCK_M, gl.SliceLayout(0, OUT))
    mask = (n < N)[:, None] & (row < M)[None, :]
    if residual_ptr is not None:
        rows = row_offsets(row, residual_inner, stride_residual_outer, stride_residual_inner)
        residual_ptrs = residual_ptr + rows[None, :] + (n.to(gl.int64) * stride_residual_n)[:, None]
        acc += gl.load(residual_ptrs, mask=mask, other=0.0).to(gl.float32)
    out_ptrs = out_ptr + (row.to(gl.int64) * N)[None, :] + n[:, None]
    gl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


def gemv_mma_configs(product: Product, kind: str = "none") -> list[Config]:
    """Configs of `gemv_mma`, the most promising first."""
    columns, most = STEP_COLUMNS[kind], _most_steps(product, kind)
    # (warps, steps that are asked for before the wait): as measured on H200 with Llama's weights.
    shapes = {"none": [(4, 16), (2, 16), (8, 8), (4, 8)], "int4": [(8, 6), (4, 8), (4, 16), (2, 8)]}
    if block_m(product, kind) == 1:
        shapes = {"int4": [(8, 2), (4, 4), (8, 4), (4, 8)], "int8": [(4, 8), (8, 4), (8, 8), (4, 4)]}
        if product.depth > 8192:
            shapes = {"int4": [(8, 6), (8, 4)], "int8": [(8, 8), (8, 6), (8, 4)]}
    wanted = shapes.get(kind, [(4, 8), (8, 8), (4, 16), (2, 8)])
    fit = [(warps, ahead) for warps, ahead in wanted if triton.cdiv(product.depth, warps * columns) <= most]
    configs = []
    # Of int4 as floats, 16 warps spill ten times as much as 8, whose threads may have twice the registers.
    for warps, ahead in fit or [(8, 6) if kind == "int4" else (16, 4)]:
        while warps > 1 and (warps // 2) * columns >= product.depth:
            warps //= 2
        steps = triton.cdiv(product.depth, warps * columns)
        configs.append(Config.of(num_warps=warps, num_stages=1, AHEAD=min(steps, ahead)))
    return list(dict.fromkeys(configs))


def _most_steps(product: Product, kind: str) -> int:
    """Steps of a warp that compile fast (112 take up to 15 s) and leave registers enough: more of int4 spill, for loads
    are moved far ahead. As integers a warp has all of its columns of x in registers once: 2048."""
    if block_m(product, kind) == 1:
        return 2048 // STEP_COLUMNS[kind]
    return 20 if kind == "int4" and product.rows > 8 else 32


def block_m(product: Product, kind: str) -> int:
    """How many rows of x a program has room for; 1: as integers (on H200, us: int8 28672x4096 gated 28.7 for 31.4 as
    floats, 4096x14336 16.0 for 17.5, int4 9.0 for 11.6), of a depth for which the kernel has code."""
    if product.rows == 1 and kind in ("int8", "int4") and product.depth <= _MOST_DIGITS:
        return 1
    return 8 if product.rows <= 8 else 16


def gemv_mma(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    gated: bool = False,
    config: Config | None = None,
    *,
    kind: str = "none",
    scales: Tensor | None = None,
) -> Tensor:
    """`act(x @ weight.T + bias) + residual`, or `act(gate) * up` of the two halves of `x @ weight.T + bias` if gated.

    Shapes: x (..., K) of at most 16 rows, contiguous along K; weight (N, K), or (2*N, K) if gated, of x's dtype and
    contiguous along K, or as `burnish.quantize` stores it in this kind, contiguous and at a multiple of 16 bytes, with
    its scales, of int4 one for each 128 columns; bias its rows' number, residual and the contiguous result (..., N).
    x, bias and residual of one dtype: float16 or bfloat16. Sums are float32 and the result is rounded once. A single
    row of x that meets int8 or int4 is rounded to 21 bits before, and makes NaN of infinity.
    """
    stored = weight if kind == "none" else weight.view(torch.int32)
    product = Product.of(x, weight, gated)
    config = config or gemv_mma_configs(product, kind)[0]
    height = dict(config.blocks).get("ROWS", ROWS.value)
    out = x.new_empty((*x.shape[:-1], product.columns))
    rows, residual_rows = rows_of(x), out if residual is None else residual
    extra = rows_of(residual_rows)
    assert rows is not None
    assert extra is not None
    launch(
        gemv_mma_kernel,
        (triton.cdiv(product.columns, height // product.halves),),
        *(x, stored, scales, bias, residual, out, rows.count, product.columns),
        *(rows.inner, rows.stride_outer, rows.stride_inner),
        *(stored.stride(0), 1 if scales is None else scales.stride(0), 1 if bias is None else bias.stride(0)),
        *(extra.inner, extra.stride_outer, extra.stride_inner, residual_rows.stride(-1)),
        config=config,
        like=x,
        registers=_REGISTERS if kind == "int4" and config.num_warps == 8 and product.rows == 1 else None,
        KIND=kind,
        ACTIVATION=in_half(activation, x.dtype),
        GATED=gated,
        UNITS=stored.shape[1],
        COLUMNS=STEP_COLUMNS[kind],
        BLOCK_M=block_m(product, kind),
        ROWS=height,
    )
    return out
