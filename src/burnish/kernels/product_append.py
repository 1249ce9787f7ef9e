"""What products of queries, keys and values have in common that rotate their heads and append to a cache themselves.

A program has both partners of each rotation, pairs of the weight's rows, so that its epilogue rotates what is in its
registers. How many positions are filled is read on the device, as in `append`, and decides only where rows go and which
are dropped. Without tables nothing is rotated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from burnish.kernels.layout import rows_of


@triton.jit
def columns_of(pair, D: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The head, and in it the columns of the first partners and (..., 2) of both."""
    HALF: tl.constexpr = D // 2
    column = pair % HALF
    if INTERLEAVED:
        column *= 2
    return pair // HALF, column, column[:, None] + (tl.arange(0, 2) * (1 if INTERLEAVED else HALF))[None, :]


@triton.jit
def ask(
    lengths, cos, sin, bias, m, head, columns, M, positions, most, lengths_step, table_batch, table_position,
    table_step, bias_step, Q_HEADS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """What `rotate_and_append` goes on with: loads that are on their way while the product is computed.

    Blocks are (rows of x, pairs, both of each).
    """
    in_rows = m < M
    batch, position = (m // positions).to(tl.int64), m % positions
    to = position + tl.minimum(tl.load(lengths + batch * lengths_step, mask=in_rows, other=0), most).to(tl.int32)
    c, s, added = to, to, to  # there may be no tables, and no bias
    if cos is not None:
        table = (batch * table_batch + position.to(tl.int64) * table_position)[:, None, None]
        table += columns[None, :, :] * table_step
        turned = in_rows[:, None, None] & (head < Q_HEADS + HEADS)[None, :, None]
        c = tl.load(cos + table, mask=turned, other=1.0)  # what is not rotated passes unchanged
        s = tl.load(sin + table, mask=turned, other=0.0)
    if bias is not None:
        inside = (head < Q_HEADS + 2 * HEADS)[None, :, None]
        added = tl.load(bias + ((head * D)[:, None] + columns)[None, :, :] * bias_step, mask=inside, other=0.0)
    return batch, to, c, s, added


@triton.jit
def rotate_and_append(
    sums, asked, q_out, k_cache, v_cache, m, head, columns, M, most,
    k_batch, k_head, k_position, k_step, v_batch, v_head, v_position, v_step,
    ROTATED: tl.constexpr, BIASED: tl.constexpr, Q_HEADS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The way of a product's sums (rows of x, pairs, both of each) into q and the caches."""
    batch, to, c, s, added = asked
    if BIASED:
        sums += added.to(tl.float32)
    if ROTATED:
        first, second = tl.split(sums)
        turned = (m < M)[:, None, None] & (head < Q_HEADS + HEADS)[None, :, None]
        partner = tl.where(turned, tl.join(-second, first), 0.0)  # infinity times 0 is NaN
        sums = sums * c.to(tl.float32) + partner * s.to(tl.float32)
    is_q, is_v = (head < Q_HEADS)[None, :], (head >= Q_HEADS + HEADS)[None, :]
    key = (head - Q_HEADS).to(tl.int64)[None, :]
    to_q = q_out + m.to(tl.int64)[:, None] * (Q_HEADS * D) + (head * D)[None, :]
    to_k = k_cache + (batch * k_batch + to.to(tl.int64) * k_position)[:, None] + key * k_head
    to_v = v_cache + (batch * v_batch + to.to(tl.int64) * v_position)[:, None] + (key - HEADS) * v_head
    out = tl.where(is_q, to_q, tl.where(is_v, to_v, to_k))
    step = tl.where(is_q, 1, tl.where(is_v, v_step, k_step))
    fits = (m < M)[:, None] & (head < Q_HEADS + 2 * HEADS)[None, :] & (is_q | (to < most)[:, None])
    out = out[:, :, None] + columns[None, :, :] * step[:, :, None]
    tl.store(out, sums.to(q_out.dtype.element_ty), mask=fits[:, :, None])


@dataclass(frozen=True)
class Appending:
    """What a launch has to know of such a product's other arguments, as every kernel here takes them.

    Attributes:
        q_out: (B, S, Hq, D), contiguous, to be filled.
        rows: of x.
        pairs: of the weight's rows.
        tensors: q_out, the caches, the tables and the lengths.
        sizes: rows of x, positions in x and in the caches, x's rows' `inner` and two strides.
        strides: the caches', the tables' and the lengths'.
        constants: the numbers of heads, their width, and which rows are partners.
    """

    q_out: Tensor
    rows: int
    pairs: int
    tensors: tuple[Any, ...]
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    constants: dict[str, Any]

    @classmethod
    def of(
        cls,
        x: Tensor,
        weight: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        k_cache: Tensor,
        v_cache: Tensor,
        lengths: Tensor,
        interleaved: bool,
    ) -> Appending:
        """For x (B, S, K), its rows by at most two strides, and the other arguments of `gemv_append`."""
        B, S, _ = x.shape
        _, heads, most, D = k_cache.shape
        q_heads = weight.shape[0] // D - 2 * heads
        q_out, rows = x.new_empty(B, S, q_heads, D), rows_of(x)
        assert rows is not None
        table_strides: tuple[int, ...] = (0, 0, 0)
        if cos is not None and sin is not None:
            if cos.stride() != sin.stride():
                cos, sin = cos.contiguous(), sin.contiguous()
            table_strides = (0 if cos.dim() == 2 or cos.shape[0] == 1 else cos.stride(0), *cos.stride()[-2:])
        return cls(
            q_out,
            rows.count,
            weight.shape[0] // 2,
            (q_out, k_cache, v_cache, cos, sin, lengths),
            (rows.count, S, most, rows.inner, rows.stride_outer, rows.stride_inner),
            (*k_cache.stride(), *v_cache.stride(), *table_strides, 0 if lengths.numel() == 1 else lengths.stride(0)),
            # Partners of nothing may be any rows: neighbours, so that a program's follow each other.
            {"Q_HEADS": q_heads, "HEADS": heads, "D": D, "INTERLEAVED": interleaved or cos is None},
        )
