"""Attention forward in one kernel: no scores and no mask in memory.

Source of the method: Dao, "FlashAttention-2", arXiv:2307.08691; the running maximum and sum are those of Milakov and
Gimelshein, "Online normalizer calculation for softmax", arXiv:1805.02867.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from burnish.kernels.attention_configs import configs_for, padded
from burnish.kernels.attention_inputs import as_bytes, described, prepared_bias
from burnish.kernels.launch import Config, launch, launch_dependents, target_of, wait_for_inputs

_FAR = 1 << 29  # more than any distance between positions, and small enough to be added to one in int32
_LOG2_E = tl.constexpr(math.log2(math.e))
# Where the running maximum starts: the lowest float32, not -inf, so that a row that is masked so far needs no care:
# exp2(-inf - lowest) is 0 where exp2(-inf - -inf) is NaN. A bias may itself be that low without becoming -inf.
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _dot(a, b, acc):
    """`acc + a @ b`, with exact products of float32."""
    if _INTERPRETED:  # the interpreter multiplies the bits of bfloat16 as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _load_rows(
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
        return _load_rows(base + column, start, lk, stride, WIDTH - column, ROWS, BLOCK, BOUNDED, WIDTH % BLOCK == 0)


@triton.jit
def _attend(
    acc,  # (BLOCK_M, BLOCK_DV) float32: weighted sum of v so far
    row_max,  # (BLOCK_M,) float32: largest score so far; in units of log2 with SCALE_LATE
    row_sum,  # (BLOCK_M,) float32: sum of the weights so far
    query,
    k,
    v,
    bias,
    padding,
    batch,
    key_head,
    part,  # first column of v
    start,  # first key of the block
    row,  # first query of the block
    lq,
    lk,
    before,
    after,
    scale,
    stride_kn,
    stride_vn,
    stride_bm,
    stride_bn,
    stride_pn,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BIAS: tl.constexpr,
    PADDING: tl.constexpr,
    SCALE_LATE: tl.constexpr,
    REACH: tl.constexpr,
    EDGE: tl.constexpr,
    TMA: tl.constexpr,
):
    """One block of keys; see the kernel. Only with EDGE may some of its keys be out of reach, or past the last."""
    keys = start + tl.arange(0, BLOCK_N)
    rows = row + tl.arange(0, BLOCK_M)
    key = _load_keys(k, batch, key_head, start, lk, stride_kn, 0, D, BLOCK_N, BLOCK_D, EDGE, TMA)
    scores = _dot(query, tl.trans(key), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
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
    # What depends on the key alone is added at once; adding -inf costs less than selecting.
    BIAS_BY_KEY: tl.constexpr = BIAS == "added by key" or BIAS == "allowed by key"
    if BIAS_BY_KEY or PADDING or (EDGE and REACH == "all"):
        by_key = tl.zeros((BLOCK_N,), tl.float32)
        if BIAS_BY_KEY:
            offsets = tl.cast(start, tl.int64) * stride_bn + tl.arange(0, BLOCK_N) * stride_bn
            entries = tl.load(bias + offsets, mask=keys < lk, other=0)
            if BIAS == "added by key":
                by_key = entries.to(tl.float32)
            else:
                by_key = tl.where(entries != 0, by_key, -float("inf"))
        if PADDING:
            offsets = tl.cast(start, tl.int64) * stride_pn + tl.arange(0, BLOCK_N) * stride_pn
            real = tl.load(padding + offsets, mask=keys < lk, other=0)
            by_key = tl.where(real != 0, by_key, -float("inf"))
        if EDGE:
            by_key = tl.where(keys < lk, by_key, -float("inf"))
        scores += by_key[None, :]
    if EDGE and REACH != "all":
        # Bounds of each row, relative to the block: of positions of each pair the compiler keeps a tile in registers.
        columns = tl.arange(0, BLOCK_N)[None, :]
        position = rows + (lk - lq)
        allowed = columns <= (tl.minimum(position + after, lk - 1) - start)[:, None]
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
    value = _load_keys(v, batch, key_head, start, lk, stride_vn, part, DV, BLOCK_N, BLOCK_DV, EDGE, TMA)
    acc = _dot(weights.to(value.dtype), value, acc * shrink[:, None])
    return acc, new_max, row_sum


@triton.jit(do_not_specialize=["heads", "groups", "lq", "lk", "before", "after"])
def attention_kernel(
    q,
    k,
    v,
    out,
    bias,
    padding,
    heads,
    groups,
    lq,
    lk,
    before,
    after,
    scale,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_bb,
    stride_bh,
    stride_bm,
    stride_bn,
    stride_pb,
    stride_pn,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BIAS: tl.constexpr,
    PADDING: tl.constexpr,
    SCALE_LATE: tl.constexpr,
    REACH: tl.constexpr,
    INSIDE: tl.constexpr,
    EDGES: tl.constexpr,
    SPREAD: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
    PARTS: tl.constexpr = 1,
):
    """BLOCK_M queries of one head, against all keys that one of them may attend to.

    A key at most `before` positions before the query and at most `after` behind it is in reach. REACH: "all" are,
    "causal" if only `after` sets a bound, else "window".
    With PARTS > 1 a program computes BLOCK_DV columns of the result only, and others the same weights for the rest: a
    head of 512 columns is more than the registers of a block hold.
    Blocks of keys that all of the queries reach come first and compare no positions (INSIDE: there are such); those at
    the edges come then (EDGES): the order of the keys does not matter.
    """
    launch_dependents(PDL)
    wait_for_inputs(PDL)
    blocks = tl.cdiv(lq, BLOCK_M)
    program = tl.program_id(0)
    part = program % PARTS * BLOCK_DV
    program = program // PARTS
    if SPREAD:
        # All programs run at once, the i-th and the i + 132nd on one multiprocessor: one with the most keys is to meet
        # one with the fewest.
        batch_head = program % (tl.num_programs(0) // PARTS // blocks)
        rank = program // (tl.num_programs(0) // PARTS // blocks)
        rank = tl.where(rank * 2 < blocks, rank, blocks - 1 - (rank - (blocks + 1) // 2))
    else:
        # The blocks of one head run at about the same time, and its keys stay in the L2 cache.
        batch_head = program // blocks
        rank = program % blocks
    row = (blocks - 1 - rank) * BLOCK_M  # last queries first: under causality they see the most keys
    batch = tl.cast(batch_head // heads, tl.int64)
    head = tl.cast(batch_head % heads, tl.int64)
    q += batch * stride_qb + head * stride_qh
    key_head = head // groups
    if not TMA:
        k += batch * stride_kb + key_head * stride_kh
        v += batch * stride_vb + key_head * stride_vh
    bias += batch * stride_bb + head * stride_bh
    padding += batch * stride_pb

    first, last = row + (lk - lq), tl.minimum(row + BLOCK_M, lq) - 1 + (lk - lq)  # positions of the queries
    if REACH != "all":
        start = tl.maximum(first - before, 0) // BLOCK_N * BLOCK_N
        stop = tl.minimum(last + after + 1, lk)
        full_start = tl.cdiv(tl.maximum(last - before, 0), BLOCK_N) * BLOCK_N
        full_stop = tl.maximum(tl.minimum(first + after + 1, lk), 0) // BLOCK_N * BLOCK_N
        full_stop = tl.maximum(full_stop, full_start)
        left_edges = tl.cdiv(tl.maximum(tl.minimum(full_start, stop) - start, 0), BLOCK_N)
        edges = left_edges + tl.cdiv(tl.maximum(stop - full_stop, 0), BLOCK_N)
    else:
        start, full_start, left_edges = 0, 0, 0
        full_stop = lk // BLOCK_N * BLOCK_N
        edges = tl.cdiv(lk - full_stop, BLOCK_N)

    query = _load_rows(q, row, lq, stride_qm, D, BLOCK_M, BLOCK_D, True, BLOCK_D == D)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    row_max = tl.full((BLOCK_M,), _LOWEST, tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    for EDGE in tl.static_range(2):
        if (EDGE and EDGES) or (not EDGE and INSIDE):
            count = edges if EDGE else (full_stop - full_start) // BLOCK_N
            for i in range(0, count):
                if EDGE:
                    block = tl.where(i < left_edges, start + i * BLOCK_N, full_stop + (i - left_edges) * BLOCK_N)
                else:
                    block = full_start + i * BLOCK_N
                acc, row_max, row_sum = _attend(
                    acc,
                    row_max,
                    row_sum,
                    query,
                    k,
                    v,
                    bias,
                    padding,
                    tl.cast(batch, tl.int32),
                    tl.cast(key_head, tl.int32),
                    part,
                    block,
                    row,
                    lq,
                    lk,
                    before,
                    after,
                    scale,
                    stride_kn,
                    stride_vn,
                    stride_bm,
                    stride_bn,
                    stride_pn,
                    D,
                    DV,
                    BLOCK_D,
                    BLOCK_DV,
                    BLOCK_M,
                    BLOCK_N,
                    BIAS,
                    PADDING,
                    SCALE_LATE,
                    REACH,
                    EDGE,
                    TMA,
                )
    # A query that reached no key has a sum of zero and gives zeros.
    acc *= (1.0 / tl.where(row_sum == 0, 1.0, row_sum))[:, None]
    rows = row + tl.arange(0, BLOCK_M)[:, None]
    columns = part + tl.arange(0, BLOCK_DV)[None, :]
    pointers = out + ((batch * lq + rows) * heads + head) * DV + columns
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=(rows < lq) & (columns < DV))


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    window: int | None,
    scale: float | None,
    config: Config | None = None,
) -> Tensor:
    """`softmax(q @ k.T * scale + bias, over the keys allowed) @ v`, arguments as of the Op `attention`.

    q (B, Hq, Lq, D), k (B, Hkv, Lk, D), v (B, Hkv, Lk, Dv), of float16, bfloat16 or float32; nothing empty, and head
    dimensions up to 512 (float32: 256). Any strides; where the last one is not 1 the tensor is copied. The result is
    (B, Hq, Lq, Dv), stored as (B, Lq, Hq, Dv).
    """
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    (batch, heads, lq, d), (_, key_heads, lk, dv) = q.shape, v.shape
    if config is None:
        config = configs_for(q, k, v, bias, key_padding_mask)[0]
    out = torch.empty((batch, lq, heads, dv), dtype=q.dtype, device=q.device)
    scale = d**-0.5 if scale is None else scale
    kind, bias, bias_strides = prepared_bias(bias, q, (batch, heads, lq, lk))
    padding, padding_strides = q, [0, 0]
    if key_padding_mask is not None:
        padding, padding_strides = as_bytes(key_padding_mask), [*key_padding_mask.stride()]
    scale_late = scale > 0 and "added" not in kind
    near = is_causal or window is not None
    tma, parts = bool(config["TMA"]), dict(config.blocks).get("PARTS", 1)
    widths = padded(d), padded(dv) // parts
    blocks = triton.cdiv(lq, config["BLOCK_M"])
    launch(
        attention_kernel,
        (blocks * batch * heads * parts,),
        q,
        described(k, config["BLOCK_N"], widths[0]) if tma else k,
        described(v, config["BLOCK_N"], widths[1]) if tma else v,
        out,
        bias,
        padding,
        heads,
        heads // key_heads,
        lq,
        lk,
        _FAR if window is None else min(window - 1, _FAR),
        0 if is_causal else _FAR if window is None else min(window - 1, _FAR),
        scale * math.log2(math.e) if scale_late else float(scale),
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *bias_strides,
        *padding_strides,
        config=config,
        like=q,
        D=d,
        DV=dv,
        BLOCK_D=widths[0],
        BLOCK_DV=widths[1],
        BIAS=kind,
        PADDING=key_padding_mask is not None,
        SCALE_LATE=scale_late,
        REACH="all" if not near else "causal" if window is None else "window",
        INSIDE=lk >= config["BLOCK_N"],
        EDGES=near or lk % config["BLOCK_N"] != 0,
        SPREAD=is_causal and blocks * batch * heads <= 3 * target_of(q).num_sms,
    )
    return out.transpose(1, 2)
