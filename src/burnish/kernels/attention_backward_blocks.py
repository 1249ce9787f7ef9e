"""The parts of attention's backward kernels: one block of weights and their gradients, and what is added for it."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from burnish.kernels.attention_blocks import load_rows
from burnish.kernels.attention_dropout import kept_weights
from burnish.kernels.matmul import dot

_LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def load_block(
    base,
    batch,
    head,
    start,
    limit,
    stride,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BOUNDED: tl.constexpr,
    TMA: tl.constexpr,
):
    """ROWS rows of one head, by a pointer to its first or by a descriptor of all heads (which needs no bounds)."""
    if TMA:
        return base.load([batch, head, start, 0]).reshape(ROWS, BLOCK)
    else:
        return load_rows(base, start, limit, stride, WIDTH, ROWS, BLOCK, BOUNDED, WIDTH == BLOCK)


@triton.jit
def aligned_rows(lq):
    """How far apart the numbers that the kernel of queries leaves begin: descriptors want multiples of 16 bytes."""
    return (lq + 3) // 4 * 4


@triton.jit
def load_by_query(base, row, lq, OTHER: tl.constexpr, ROWS: tl.constexpr, BOUNDED: tl.constexpr):
    """One number for each of ROWS queries; OTHER for those past the last."""
    rows = row + tl.arange(0, ROWS)
    if BOUNDED:
        return tl.load(base + rows, mask=rows < lq, other=OTHER)
    else:
        return tl.load(base + rows)


@triton.jit
def prepared_sums(logsumexp, BIAS: tl.constexpr):
    """As `weights_of` takes it: in units of log2, unless a bias is added."""
    if BIAS == "added" or BIAS == "added by key":
        return logsumexp
    else:
        return logsumexp * _LOG2_E


@triton.jit
def weights_of(
    scores,  # (queries, keys), or (keys, queries) if TURNED: products of q and k
    sums,  # of each query, by `prepared_sums`
    bias,
    terms,  # (keys,) float32 or None: what is added to the scores of each key
    row,
    start,
    lq,
    lk,
    before,
    after,
    scale,
    stride_bm,
    stride_bn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BIAS: tl.constexpr,
    REACH: tl.constexpr,
    EDGE: tl.constexpr,
    TURNED: tl.constexpr,
    BOUND_KEYS: tl.constexpr,
):
    """The weights that forward had: exp(score - logsumexp). Of a query past the last, or without keys, that is +inf,
    and its weights are zeros. With BOUND_KEYS keys past the last have zeros too."""
    rows, keys = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    if TURNED:
        by_row, by_key = rows[None, :], keys[:, None]
        sums = sums[None, :]
    else:
        by_row, by_key = rows[:, None], keys[None, :]
        sums = sums[:, None]
    ADDED: tl.constexpr = BIAS == "added" or BIAS == "added by key"
    hidden = None
    if BIAS == "added" or BIAS == "allowed":
        # Rows and keys past the last read the last one's: under a bound entries would be loaded one by one.
        offsets = tl.cast(row, tl.int64) * stride_bm + tl.cast(start, tl.int64) * stride_bn
        at = tl.minimum(by_row, lq - 1 - row) * stride_bm + tl.minimum(by_key, lk - 1 - start) * stride_bn
        entries = tl.load(bias + offsets + at)
        if BIAS == "added":
            scores = scores * scale + entries.to(tl.float32)
        else:
            hidden = entries == 0
    if terms is not None:
        terms = terms[:, None] if TURNED else terms[None, :]
    if ADDED:  # subtracted first: a bias near the lowest float32 times log2(e) would be -inf
        if BIAS == "added by key":
            scores *= scale
        if terms is not None:
            scores += terms
        weights = tl.exp2((scores - sums) * _LOG2_E)
    else:
        exponents = scores * (scale * _LOG2_E) - sums
        if terms is not None:
            exponents += terms
        weights = tl.exp2(exponents)
    if hidden is not None:
        weights = tl.where(hidden, 0.0, weights)
    if EDGE:
        if REACH != "all":
            # Bounds of each query, relative to the block.
            position = by_row + (row + (lk - lq) - start)
            seen = by_key <= (tl.minimum(position + after, lk - 1 - start) if BOUND_KEYS else position + after)
            if REACH == "window":
                seen &= by_key >= position - before
            weights = tl.where(seen, weights, 0.0)
        elif BOUND_KEYS:
            weights = tl.where(by_key < lk - start, weights, 0.0)
    return weights


@triton.jit
def add_for_keys(
    dk,  # (BLOCK_N, BLOCK_D) float32
    dv,  # (BLOCK_N, BLOCK_DV) float32
    key,
    value,
    q,
    grad,
    sums,
    delta,
    bias,
    terms,
    batch,
    head,
    row,  # first query of the block
    start,  # first key
    lq,
    lk,
    before,
    after,
    scale,
    stride_qm,
    stride_gm,
    stride_bm,
    stride_bn,
    seed,
    batch_head,
    threshold,
    kept_scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BIAS: tl.constexpr,
    REACH: tl.constexpr,
    EDGE: tl.constexpr,
    TMA: tl.constexpr,
):
    """What a block of queries adds to the gradients of a block of keys and values."""
    query = load_block(q, batch, head, row, lq, stride_qm, D, BLOCK_M, BLOCK_D, EDGE, TMA)
    if TMA == 2:
        # All four side by side, so that none is waited for between two products: then ptxas would finish each of the
        # instructions that these are made of before the next one.
        gradient = load_block(grad, batch, head, row, lq, stride_gm, DV, BLOCK_M, BLOCK_DV, EDGE, TMA)
        by_query = sums.load([batch_head, row]).reshape(BLOCK_M)
        less = delta.load([batch_head, row]).reshape(BLOCK_M)
        if EDGE and (BIAS == "added" or BIAS == "added by key"):  # zeros of queries past the last are not enough
            by_query = tl.where(row + tl.arange(0, BLOCK_M) < lq, by_query, float("inf"))
    scores = dot(key, tl.trans(query), tl.zeros((BLOCK_N, BLOCK_M), tl.float32))
    if TMA < 2:
        by_query = load_by_query(sums, row, lq, float("inf"), BLOCK_M, EDGE)
        gradient = load_block(grad, batch, head, row, lq, stride_gm, DV, BLOCK_M, BLOCK_DV, EDGE, TMA)
    dweights = dot(value, tl.trans(gradient), tl.zeros((BLOCK_N, BLOCK_M), tl.float32))
    weights = weights_of(
        scores, by_query, bias, terms, row, start, lq, lk, before, after, scale, stride_bm, stride_bn, BLOCK_M, BLOCK_N,
        BIAS, REACH, EDGE, True, False,
    )  # fmt: skip
    if seed is not None:
        kept = tl.trans(kept_weights(seed, batch_head, row, start, threshold, BLOCK_M, BLOCK_N))
        dv = dot(tl.where(kept, weights, 0.0).to(gradient.dtype), gradient, dv)
        dweights = tl.where(kept, dweights * kept_scale, 0.0)
    else:
        dv = dot(weights.to(gradient.dtype), gradient, dv)
    if TMA < 2:
        less = load_by_query(delta, row, lq, 0.0, BLOCK_M, EDGE)
    dscores = weights * (dweights - less[None, :])
    dk = dot(dscores.to(query.dtype), query, dk)
    return dk, dv


@triton.jit
def gradient_of_scores(
    query,
    gradient,
    key,
    value,
    sums,
    less,
    bias,
    terms,
    row,
    start,
    lq,
    lk,
    before,
    after,
    scale,
    stride_bm,
    stride_bn,
    seed,
    batch_head,
    threshold,
    kept_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BIAS: tl.constexpr,
    REACH: tl.constexpr,
    EDGE: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) float32, without the scale."""
    scores = dot(query, tl.trans(key), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
    dweights = dot(gradient, tl.trans(value), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
    weights = weights_of(
        scores, sums, bias, terms, row, start, lq, lk, before, after, scale, stride_bm, stride_bn, BLOCK_M, BLOCK_N,
        BIAS, REACH, EDGE, False, True,
    )  # fmt: skip
    if seed is not None:
        kept = kept_weights(seed, batch_head, row, start, threshold, BLOCK_M, BLOCK_N)
        dweights = tl.where(kept, dweights * kept_scale, 0.0)
    return weights * (dweights - less[:, None])
