"""Queries, keys and values of up to 16 new tokens by `gemv_mma`'s product, rotated, keys and values right into a cache.

As `burnish.kernels.gemv_append`, on tensor cores: a program has both partners of each rotation.
"""

from __future__ import annotations

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra import cuda as tl_cuda

from burnish.kernels.gemv_mma import ROWS, ask, first_row, gemv_mma_configs, multiply, partners_of
from burnish.kernels.launch import Config, launch
from burnish.kernels.layout import rows_of
from burnish.kernels.matmul_configs import Product
from burnish.kernels.widen import STEP_COLUMNS


@gluon.jit(do_not_specialize=["most"])
def gemv_mma_append_kernel(
    x, weight, bias, q_out, k_cache, v_cache, cos, sin, lengths, M, positions, most, x_inner, x_outer_stride,
    x_inner_stride, weight_row, bias_step, k_batch, k_head, k_position, k_step, v_batch, v_head, v_position, v_step,
    table_batch, table_position, table_step, lengths_step, Q_HEADS: gl.constexpr, HEADS: gl.constexpr, D: gl.constexpr,
    INTERLEAVED: gl.constexpr, UNITS: gl.constexpr, COLUMNS: gl.constexpr, BLOCK_M: gl.constexpr, AHEAD: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    if PDL:
        tl_cuda.gdc_launch_dependents()
    OUT: gl.constexpr = gl.BlockedLayout([1, 1], [8, 4], [1, gl.num_warps()], [0, 1])
    TO_PARTNER: gl.constexpr = 1 if INTERLEAVED else D // 2
    PAIRS: gl.constexpr = (Q_HEADS + 2 * HEADS) * D // 2
    tile = gl.program_id(0)
    asked = ask(weight, weight, tile, PAIRS, TO_PARTNER, weight_row, 0, "none", True, D, INTERLEAVED, UNITS, AHEAD)
    TILE: gl.constexpr = ROWS // 2
    pair = tile * TILE + gl.arange(0, TILE, gl.SliceLayout(1, OUT))
    row = first_row(gl.minimum(pair, PAIRS - 1), D, INTERLEAVED)
    head, column = row // D, row % D
    if PDL:
        tl_cuda.gdc_wait()

    # What the epilogue needs arrives while the product is computed.
    m = gl.arange(0, BLOCK_M, gl.SliceLayout(0, OUT))
    batch, position = (m // positions).to(gl.int64), m % positions
    filled = gl.load(lengths + batch * lengths_step, mask=m < M, other=0)
    to = position + gl.minimum(filled, most).to(gl.int32)
    table = (batch * table_batch + position.to(gl.int64) * table_position)[None, :] + (column * table_step)[:, None]
    turned = (m < M)[None, :] & (head < Q_HEADS + HEADS)[:, None]
    c = gl.load(cos + table, mask=turned, other=1.0).to(gl.float32)  # what is not rotated passes unchanged
    s = gl.load(sin + table, mask=turned, other=0.0).to(gl.float32)
    more = TO_PARTNER * table_step
    partner_c = gl.load(cos + table + more, mask=turned, other=1.0).to(gl.float32)
    partner_s = gl.load(sin + table + more, mask=turned, other=0.0).to(gl.float32)
    acc = multiply(asked, x, M, x_inner, x_outer_stride, x_inner_stride, "none", UNITS, COLUMNS, BLOCK_M, AHEAD)
    first, partner = partners_of(acc, BLOCK_M, OUT)
    if bias is not None:
        first += gl.load(bias + row * bias_step).to(gl.float32)[:, None]
        partner += gl.load(bias + (row + TO_PARTNER) * bias_step).to(gl.float32)[:, None]
    rotated = first * c - gl.where(turned, partner, 0.0) * s  # infinity times 0 is NaN
    partner = partner * partner_c + gl.where(turned, first, 0.0) * partner_s

    is_q, is_v = (head < Q_HEADS)[:, None], (head >= Q_HEADS + HEADS)[:, None]
    key = (head - Q_HEADS).to(gl.int64)[:, None]
    to_q = q_out + (m.to(gl.int64) * (Q_HEADS * D))[None, :] + row[:, None]
    to_k = k_cache + (batch * k_batch + to.to(gl.int64) * k_position)[None, :] + key * k_head
    to_v = v_cache + (batch * v_batch + to.to(gl.int64) * v_position)[None, :] + (key - HEADS) * v_head
    fits = (m < M)[None, :] & (pair < PAIRS)[:, None]
    in_cache = fits & (to < most)[None, :]
    column = column[:, None]
    gl.store(to_q, rotated.to(q_out.dtype.element_ty), mask=fits & is_q)
    gl.store(to_q + TO_PARTNER, partner.to(q_out.dtype.element_ty), mask=fits & is_q)
    is_k = (head >= Q_HEADS)[:, None] & (head < Q_HEADS + HEADS)[:, None]
    gl.store(to_k + column * k_step, rotated.to(q_out.dtype.element_ty), mask=in_cache & is_k)
    gl.store(to_k + (column + TO_PARTNER) * k_step, partner.to(q_out.dtype.element_ty), mask=in_cache & is_k)
    gl.store(to_v + column * v_step, rotated.to(q_out.dtype.element_ty), mask=in_cache & is_v)
    gl.store(to_v + (column + TO_PARTNER) * v_step, partner.to(q_out.dtype.element_ty), mask=in_cache & is_v)


def gemv_mma_append(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    interleaved: bool = False,
    config: Config | None = None,
) -> Tensor:
    """As `gemv_append`, of up to 16 rows of x (batch times positions) in float16 or bfloat16, contiguous along K."""
    B, S, _ = x.shape
    _, heads, most, D = k_cache.shape
    q_heads = weight.shape[0] // D - 2 * heads
    config = config or gemv_mma_append_configs(x, weight)[0]
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    table_batch = 0 if cos.dim() == 2 or cos.shape[0] == 1 else cos.stride(0)
    q_out, rows = x.new_empty(B, S, q_heads, D), rows_of(x)
    assert rows is not None
    pairs = (q_heads + 2 * heads) * (D // 2)
    launch(
        gemv_mma_append_kernel,
        (triton.cdiv(pairs, ROWS.value // 2),),
        *(x, weight, bias, q_out, k_cache, v_cache, cos, sin, lengths, rows.count, S, most),
        *(rows.inner, rows.stride_outer, rows.stride_inner, weight.stride(0), 1 if bias is None else bias.stride(0)),
        *(*k_cache.stride(), *v_cache.stride()),
        *(table_batch, *cos.stride()[-2:], 0 if lengths.numel() == 1 else lengths.stride(0)),
        config=config,
        like=x,
        Q_HEADS=q_heads,
        HEADS=heads,
        D=D,
        INTERLEAVED=interleaved,
        UNITS=x.shape[-1],
        COLUMNS=STEP_COLUMNS["none"],
        BLOCK_M=8 if rows.count <= 8 else 16,
    )
    return q_out.transpose(1, 2)


def gemv_mma_append_configs(x: Tensor, weight: Tensor) -> list[Config]:
    """Configs of `gemv_mma_append`, the most promising first."""
    return gemv_mma_configs(Product.of(x, weight, gated=True))
