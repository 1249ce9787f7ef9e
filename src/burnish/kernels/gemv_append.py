"""Queries, keys and values of a few new tokens by one product, rotated, keys and values right into a cache: one launch.

The product is `gemv`'s: where that has rows of gate and up, a program here has both partners of each rotation, so its
epilogue rotates what is in its registers. How many positions are filled is read on the device, as in `append`.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from burnish.kernels.gemv import gemv_configs, multiply
from burnish.kernels.launch import Config, launch, launch_dependents, wait_for_inputs
from burnish.kernels.layout import rows_of
from burnish.kernels.matmul import row_offsets
from burnish.kernels.matmul_configs import Product


@triton.jit(do_not_specialize=["most"])
def _gemv_append_kernel(
    x, weight, bias, q_out, k_cache, v_cache, cos, sin, lengths, M, K, positions, most,
    x_inner, x_outer_stride, x_inner_stride, x_step, weight_row, bias_step,
    k_batch, k_head, k_position, k_step, v_batch, v_head, v_position, v_step,
    table_batch, table_position, table_step, lengths_step,
    Q_HEADS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, INTERLEAVED: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    launch_dependents(PDL)
    HALF: tl.constexpr = D // 2
    TO_PARTNER: tl.constexpr = 1 if INTERLEAVED else HALF
    # Nothing rotates values, but they are shared out by pairs as well.
    m, k, side = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K), tl.arange(0, 2)
    pair = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    head, column = pair // HALF, pair % HALF
    if INTERLEAVED:
        column *= 2
    in_rows, in_heads = m < M, head < Q_HEADS + 2 * HEADS

    # As in gemv: (rows of x, rows of weight, K), and the weight's first block before the wait.
    row = head * D + column
    weight_ptrs = weight + (row.to(tl.int64) * weight_row)[None, :, None] + k[None, None, :]
    x_ptrs = x + row_offsets(m, x_inner, x_outer_stride, x_inner_stride)[:, None, None]
    x_ptrs += k.to(tl.int64)[None, None, :] * x_step
    weight_mask, x_mask = in_heads[None, :, None], in_rows[:, None, None]
    mask = weight_mask if EVEN_K else weight_mask & (k < K)[None, None, :]
    first_block = tl.load(weight_ptrs, mask=mask, other=0.0)
    partners_block = tl.load(weight_ptrs + TO_PARTNER * weight_row, mask=mask, other=0.0)
    wait_for_inputs(PDL)

    # From here on (rows of x, pairs, both of each). What the epilogue needs arrives while the product is computed.
    batch, position = (m // positions).to(tl.int64), m % positions
    to = position + tl.minimum(tl.load(lengths + batch * lengths_step, mask=in_rows, other=0), most).to(tl.int32)
    columns = column[None, :, None] + (side * TO_PARTNER)[None, None, :]
    table = (batch * table_batch + position.to(tl.int64) * table_position)[:, None, None] + columns * table_step
    turned = in_rows[:, None, None] & (head < Q_HEADS + HEADS)[None, :, None]
    c = tl.load(cos + table, mask=turned, other=1.0).to(tl.float32)  # what is not rotated passes unchanged
    s = tl.load(sin + table, mask=turned, other=0.0).to(tl.float32)
    if bias is not None:
        added = tl.load(bias + ((head * D)[None, :, None] + columns) * bias_step, mask=weight_mask, other=0.0)
    firsts, partners, _ = multiply(
        weight_ptrs, x_ptrs, first_block, partners_block, TO_PARTNER * weight_row, weight_mask, x_mask, k, K, x_step,
        None, 1, True, False, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    sums = tl.sum(tl.join(firsts, partners), axis=2)
    if bias is not None:
        sums += added.to(tl.float32)
    first, second = tl.split(sums)
    partner = tl.where(turned, tl.join(-second, first), 0.0)  # infinity times 0 is NaN
    result = (sums * c + partner * s).to(q_out.dtype.element_ty)

    is_q, is_v = (head < Q_HEADS)[None, :], (head >= Q_HEADS + HEADS)[None, :]
    key = (head - Q_HEADS).to(tl.int64)[None, :]
    to_q = q_out + m.to(tl.int64)[:, None] * (Q_HEADS * D) + (head * D)[None, :]
    to_k = k_cache + (batch * k_batch + to.to(tl.int64) * k_position)[:, None] + key * k_head
    to_v = v_cache + (batch * v_batch + to.to(tl.int64) * v_position)[:, None] + (key - HEADS) * v_head
    out = tl.where(is_q, to_q, tl.where(is_v, to_v, to_k))
    step = tl.where(is_q, 1, tl.where(is_v, v_step, k_step))
    fits = in_rows[:, None] & in_heads[None, :] & (is_q | (to < most)[:, None])
    tl.store(out[:, :, None] + columns * step[:, :, None], result, mask=fits[:, :, None])


def gemv_append(
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
    """Rows q, k and v of `x @ weight.T + bias`: q rotated is returned, k rotated and v go into the caches from position
    `lengths` on; what would lie past their end is dropped.

    Shapes: x (B, S, K) of at most BLOCK_M rows; weight ((Hq + 2 * Hkv) * D, K), contiguous along K; bias its rows'
    number; cos and sin (S, D) or (1 or B, S, D); the caches (B, Hkv, Lmax, D), of any strides; lengths one int32 or
    int64 number, or (B,). q is (B, Hq, S, D), stored as (B, S, Hq, D).
    Dtypes: float16, bfloat16 or float32, one but for the tables, which have their own; sums are float32, and what is
    written is rounded once.
    """
    B, S, K = x.shape
    _, heads, most, D = k_cache.shape
    q_heads = weight.shape[0] // D - 2 * heads
    config = config or gemv_append_configs(x, weight)[0]
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    table_batch = 0 if cos.dim() == 2 or cos.shape[0] == 1 else cos.stride(0)
    q_out, rows = x.new_empty(B, S, q_heads, D), rows_of(x)
    assert rows is not None
    pairs = (q_heads + 2 * heads) * (D // 2)
    arguments: tuple[Any, ...] = (
        *(x, weight, bias, q_out, k_cache, v_cache, cos, sin, lengths, rows.count, K, S, most),
        *(rows.inner, rows.stride_outer, rows.stride_inner, x.stride(-1)),
        *(weight.stride(0), 1 if bias is None else bias.stride(0)),
        *(*k_cache.stride(), *v_cache.stride()),
        *(table_batch, *cos.stride()[-2:], 0 if lengths.numel() == 1 else lengths.stride(0)),
    )
    launch(
        _gemv_append_kernel, (triton.cdiv(pairs, config["BLOCK_N"]),), *arguments, config=config, like=x,
        Q_HEADS=q_heads, HEADS=heads, D=D, INTERLEAVED=interleaved, EVEN_K=K % config["BLOCK_K"] == 0,
    )  # fmt: skip
    return q_out.transpose(1, 2)


def gemv_append_configs(x: Tensor, weight: Tensor) -> list[Config]:
    """Configs of `gemv_append`, the most promising first; BLOCK_N counts pairs of the weight's rows."""
    return gemv_configs(Product.of(x, weight, gated=True))
