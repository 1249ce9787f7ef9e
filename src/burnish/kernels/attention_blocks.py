"""The parts of the attention kernel: what it reads, which keys are seen, and one block of keys."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from burnish.kernels.attention_dropout import kept_weights
from burnish.kernels.matmul import dot

_LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def load_rows(
    base,
    start,
    limit,
    stride,
    columns_left,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BOUNDED: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Rows start to start + ROWS of a matrix, BLOCK columns; zeros from row `limit` on, and from column `columns_left`
    on unless all columns are there (WHOLE)."""
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    pointers = base + tl.cast(start, tl.int64) * stride + rows * stride + columns
    if BOUNDED:
        if WHOLE:
            block = tl.load(pointers, mask=rows < limit - start, other=0.0)
        else:
            block = tl.load(pointers, mask=(rows < limit - start) & (columns < columns_left), other=0.0)
    else:
        if WHOLE:
            block = tl.load(pointers)
        else:
            block = tl.load(pointers, mask=columns < columns_left, other=0.0)
    return block


@triton.jit
def _load_keys(
    base,
    batch,
    head,
    start,
    lk,
    stride,
    column,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BOUNDED: tl.constexpr,
    TMA: tl.constexpr,
):
    """ROWS rows of k or v, BLOCK of the WIDTH columns from `column` on, by a pointer to the head's first row or by a
    descriptor of the whole (which needs no bounds)."""
    if TMA:
        return base.load([batch, head, start, column]).reshape(ROWS, BLOCK)
    else:
        return load_rows(base + column, start, lk, stride, WIDTH - column, ROWS, BLOCK, BOUNDED, WIDTH % BLOCK == 0)


@triton.jit
def key_terms(
    bias,
    padding,
    start,
    lk,
    stride_bn,
    stride_pn,
    BIAS: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What is added to the scores of a block of keys and depends on the key alone: -inf for one that is not to be seen,
    because adding it costs less than selecting."""
    keys = start + tl.arange(0, BLOCK_N)
    terms = tl.zeros((BLOCK_N,), tl.float32)
    if BIAS == "added by key" or BIAS == "allowed by key":
        offsets = tl.cast(start, tl.int64) * stride_bn + tl.arange(0, BLOCK_N) * stride_bn
        entries = tl.load(bias + offsets, mask=keys < lk, other=0)
        terms = entries.to(tl.float32) if BIAS == "added by key" else tl.where(entries != 0, terms, -float("inf"))
    if PADDING:
        offsets = tl.cast(start, tl.int64) * stride_pn + tl.arange(0, BLOCK_N) * stride_pn
        real = tl.load(padding + offsets, mask=keys < lk, other=0)
        terms = tl.where(real != 0, terms, -float("inf"))
    return terms


@triton.jit
def shown_keys(padding, lk, stride_pn):
    """How many keys there are up to the last that a padding mask shows, and whether it hides one of these."""
    stop, shown = 0, 0
    for start in range(0, lk, 512):
        keys = start + tl.arange(0, 512)
        real = tl.load(padding + keys.to(tl.int64) * stride_pn, mask=keys < lk, other=0) != 0
        stop = tl.maximum(stop, tl.max(tl.where(real, keys + 1, 0)))
        shown += tl.sum(real.to(tl.int32))
    return stop, shown < stop


@triton.jit
def attend(
    acc,  # (BLOCK_M, BLOCK_DV) float32: weighted sum of v so far
    row_max,  # (BLOCK_M,) float32: largest score so far; in units of log2 with SCALE_LATE
    row_sum,  # (BLOCK_M,) float32: sum of the weights so far
    query,
    k,
    v,
    bias,
    key_terms,  # (BLOCK_N,) float32 or None: what is added to the scores of each key
    batch,
    key_head,
    part,  # first column of v
    start,  # first key of the block
    row,  # first query of the block
    lq,
    lk,
    limit,  # keys from here on are not seen
    before,
    after,
    scale,
    stride_kn,
    stride_vn,
    stride_bm,
    stride_bn,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BIAS: tl.constexpr,
    SCALE_LATE: tl.constexpr,
    REACH: tl.constexpr,
    EDGE: tl.constexpr,
    TMA: tl.constexpr,
    seed=None,  # of dropout; None for none
    batch_head=0,
    threshold=0,
):
    """One block of keys; see the kernel. Only with EDGE may some of its keys be out of reach, or past the last."""
    keys = start + tl.arange(0, BLOCK_N)
    rows = row + tl.arange(0, BLOCK_M)
    key = _load_keys(k, batch, key_head, start, lk, stride_kn, 0, D, BLOCK_N, BLOCK_D, EDGE, TMA)
    scores = dot(query, tl.trans(key), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
    if not SCALE_LATE:
        scores *= scale
    if BIAS == "added" or BIAS == "allowed":
        # No bounds where none are needed (rows past the last read the last one's): the compiler knows nothing of lk,
        # and under a bound by it loads entry by entry (8x8x512x64, boolean, H200: 57 us, and 12 without a mask).
        tile_rows = tl.minimum(tl.arange(0, BLOCK_M), lq - 1 - row)
        offsets = tl.cast(row, tl.int64) * stride_bm + tl.cast(start, tl.int64) * stride_bn
        pointers = bias + offsets + tile_rows[:, None] * stride_bm + tl.arange(0, BLOCK_N)[None, :] * stride_bn
        if EDGE:
            entries = tl.load(pointers, mask=keys[None, :] < lk, other=0)
        else:
            entries = tl.load(pointers)
        if BIAS == "added":
            scores += entries.to(tl.float32)
        else:
            scores = tl.where(entries != 0, scores, -float("inf"))
    if key_terms is not None:
        scores += key_terms[None, :]
    if EDGE and REACH == "all":
        scores += tl.where(keys < limit, 0.0, -float("inf"))[None, :]
    if EDGE and REACH != "all":
        # Bounds of each row, relative to the block: of positions of each pair the compiler keeps a tile in registers.
        columns = tl.arange(0, BLOCK_N)[None, :]
        position = rows + (lk - lq)
        allowed = columns <= (tl.minimum(position + after, limit - 1) - start)[:, None]
        if REACH == "window":
            allowed &= columns >= (position - before - start)[:, None]
        scores = tl.where(allowed, scores, -float("inf"))
    if SCALE_LATE:
        # The scale is multiplied in by the subtraction of the maximum: one operation less for each score.
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - new_max[:, None])
        shrink = tl.exp2(row_max - new_max)
    else:
        # Subtracted first: a bias near the lowest float32 times log2(e) would be -inf.
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        weights = tl.exp2((scores - new_max[:, None]) * _LOG2_E)
        shrink = tl.exp2((row_max - new_max) * _LOG2_E)
    row_sum = row_sum * shrink + tl.sum(weights, 1)
    if seed is not None:
        weights = tl.where(kept_weights(seed, batch_head, row, start, threshold, BLOCK_M, BLOCK_N), weights, 0.0)
    value = _load_keys(v, batch, key_head, start, lk, stride_vn, part, DV, BLOCK_N, BLOCK_DV, EDGE, TMA)
    acc = dot(weights.to(value.dtype), value, acc * shrink[:, None])
    return acc, new_max, row_sum


@triton.jit
def block_of(i, EDGE: tl.constexpr, start, left_edges, full_start, full_stop, BLOCK_N: tl.constexpr):
    """First key of the i-th block: of those that all queries reach, or of those at the edges, on the left first."""
    if EDGE:
        return tl.where(i < left_edges, start + i * BLOCK_N, full_stop + (i - left_edges) * BLOCK_N)
    else:
        return full_start + i * BLOCK_N
