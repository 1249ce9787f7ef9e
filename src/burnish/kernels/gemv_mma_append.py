"""Queries, keys and values of up to 16 new tokens by `gemv_mma`'s product, rotated, keys and values right into a cache.

As `burnish.kernels.gemv_append`, on tensor cores and of a weight in 16, 8 or 4 bits.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra import cuda as tl_cuda

from burnish.kernels.gemv_mma import ROWS, ask, block_m, first_row, gemv_mma_configs, multiply, partners_of
from burnish.kernels.launch import Config, launch
from burnish.kernels.matmul_configs import Product
from burnish.kernels.product_append import Appending
from burnish.kernels.widen import STEP_COLUMNS


@gluon.jit
def _append(
    first, partner, q_out, k_cache, v_cache, m, batch, to, pair, row, head, column, M, most, k_batch, k_head,
    k_position, k_step, v_batch, v_head, v_position, v_step, TO_PARTNER: gl.constexpr, Q_HEADS: gl.constexpr,
    HEADS: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Stores pairs of sums (pairs, rows of x) as q and in the caches."""
    is_q, is_v = (head < Q_HEADS)[:, None], (head >= Q_HEADS + HEADS)[:, None]
    key = (head - Q_HEADS).to(gl.int64)[:, None]
    to_q = q_out + (m.to(gl.int64) * (Q_HEADS * D))[None, :] + row[:, None]
    to_k = k_cache + (batch * k_batch + to.to(gl.int64) * k_position)[None, :] + key * k_head
    to_v = v_cache + (batch * v_batch + to.to(gl.int64) * v_position)[None, :] + (key - HEADS) * v_head
    fits = (m < M)[None, :] & (pair < (Q_HEADS + 2 * HEADS) * D // 2)[:, None]
    in_cache = fits & (to < most)[None, :]
    is_k = (head >= Q_HEADS)[:, None] & (head < Q_HEADS + HEADS)[:, None]
    column = column[:, None]
    first, partner = first.to(q_out.dtype.element_ty), partner.to(q_out.dtype.element_ty)
    gl.store(to_q, first, mask=fits & is_q)
    gl.store(to_q + TO_PARTNER, partner, mask=fits & is_q)
    gl.store(to_k + column * k_step, first, mask=in_cache & is_k)
    gl.store(to_k + (column + TO_PARTNER) * k_step, partner, mask=in_cache & is_k)
    gl.store(to_v + column * v_step, first, mask=in_cache & is_v)
    gl.store(to_v + (column + TO_PARTNER) * v_step, partner, mask=in_cache & is_v)


@gluon.jit(do_not_specialize=["most"])
def gemv_mma_append_kernel(
    x, weight, scales, bias, q_out, k_cache, v_cache, cos, sin, lengths, M, positions, most, x_inner, x_outer_stride,
    x_inner_stride, weight_row, scales_row, bias_step, k_batch, k_head, k_position, k_step, v_batch, v_head, v_position,
    v_step, table_batch, table_position, table_step, lengths_step, KIND: gl.constexpr, Q_HEADS: gl.constexpr,
    HEADS: gl.constexpr, D: gl.constexpr, INTERLEAVED: gl.constexpr, UNITS: gl.constexpr, COLUMNS: gl.constexpr,
    BLOCK_M: gl.constexpr, ROWS: gl.constexpr, AHEAD: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """UNITS and COLUMNS as in `gemv_mma_kernel`."""
    if PDL:
        tl_cuda.gdc_launch_dependents()
    OUT: gl.constexpr = gl.BlockedLayout([1, 1], [8, 4], [1, gl.num_warps()], [0, 1])
    TO_PARTNER: gl.constexpr = 1 if INTERLEAVED else D // 2
    PAIRS: gl.constexpr = (Q_HEADS + 2 * HEADS) * D // 2
    TILE: gl.constexpr = ROWS // 2
    tile = gl.program_id(0)
    asked = ask(
        weight, scales, tile, PAIRS, TO_PARTNER, weight_row, scales_row, KIND, True, D, INTERLEAVED, UNITS, AHEAD, ROWS
    )  # fmt: skip
    pair = tile * TILE + gl.arange(0, TILE, gl.SliceLayout(1, OUT))
    row = first_row(gl.minimum(pair, PAIRS - 1), D, INTERLEAVED)
    head, column = row // D, row % D
    if KIND == "int8" or KIND == "fp8":
        scale = gl.load(scales + row).to(gl.float32)
        partner_scale = gl.load(scales + row + TO_PARTNER).to(gl.float32)
    if PDL:
        tl_cuda.gdc_wait()

    # What the epilogue needs arrives while the product is computed.
    m = gl.arange(0, BLOCK_M, gl.SliceLayout(0, OUT))
    batch, position = (m // positions).to(gl.int64), m % positions
    filled = gl.load(lengths + batch * lengths_step, mask=m < M, other=0)
    to = position + gl.minimum(filled, most).to(gl.int32)
    if cos is not None:
        table = (batch * table_batch + position.to(gl.int64) * table_position)[None, :] + (column * table_step)[:, None]
        turned = (m < M)[None, :] & (head < Q_HEADS + HEADS)[:, None]
        c = gl.load(cos + table, mask=turned, other=1.0).to(gl.float32)  # what is not rotated passes unchanged
        s = gl.load(sin + table, mask=turned, other=0.0).to(gl.float32)
        more = TO_PARTNER * table_step
        partner_c = gl.load(cos + table + more, mask=turned, other=1.0).to(gl.float32)
        partner_s = gl.load(sin + table + more, mask=turned, other=0.0).to(gl.float32)
    acc = multiply(asked, x, M, x_inner, x_outer_stride, x_inner_stride, KIND, UNITS, COLUMNS, BLOCK_M, AHEAD, ROWS)
    first, partner = partners_of(acc, BLOCK_M, OUT)
    if KIND == "int8" or KIND == "fp8":
        first, partner = first * scale[:, None], partner * partner_scale[:, None]
    if bias is not None:
        first += gl.load(bias + row * bias_step).to(gl.float32)[:, None]
        partner += gl.load(bias + (row + TO_PARTNER) * bias_step).to(gl.float32)[:, None]
    if cos is not None:
        rotated = first * c - gl.where(turned, partner, 0.0) * s  # infinity times 0 is NaN
        partner = partner * partner_c + gl.where(turned, first, 0.0) * partner_s
        first = rotated
    _append(
        first, partner, q_out, k_cache, v_cache, m, batch, to, pair, row, head, column, M, most, k_batch, k_head,
        k_position, k_step, v_batch, v_head, v_position, v_step, TO_PARTNER, Q_HEADS, HEADS, D,
    )  # fmt: skip


def gemv_mma_append(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    interleaved: bool = False,
    config: Config | None = None,
    *,
    kind: str = "none",
    scales: Tensor | None = None,
) -> Tensor:
    """As `gemv_append`, of up to 16 rows of x (batch times positions) in float16 or bfloat16, contiguous along K, and
    of a weight as `gemv_mma` takes it."""
    config = config or gemv_mma_append_configs(x, weight, kind)[0]
    height = dict(config.blocks).get("ROWS", ROWS.value)
    given = Appending.of(x, weight, cos, sin, k_cache, v_cache, lengths, interleaved)
    stored = weight if kind == "none" else weight.view(torch.int32)
    launch(
        gemv_mma_append_kernel,
        (triton.cdiv(given.pairs, height // 2),),
        *(x, stored, scales, bias, *given.tensors, *given.sizes),
        *(stored.stride(0), 1 if scales is None else scales.stride(0), 1 if bias is None else bias.stride(0)),
        *given.strides,
        config=config,
        like=x,
        KIND=kind,
        UNITS=stored.shape[1],
        COLUMNS=STEP_COLUMNS[kind],
        BLOCK_M=block_m(Product.of(x, weight), kind),
        ROWS=height,
        **given.constants,
    )
    return given.q_out.transpose(1, 2)


def gemv_mma_append_configs(x: Tensor, weight: Tensor, kind: str = "none") -> list[Config]:
    """Configs of `gemv_mma_append`, the most promising first."""
    return gemv_mma_configs(Product.of(x, weight, gated=True), kind)
