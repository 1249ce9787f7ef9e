"""Attention of a few new queries over a cache, its keys split among programs: bound by reading k and v.

The query heads that share a key head are rows of one block, so that k and v are read once for all of them. The number
of filled keys is read on the device: one launch, and one captured graph, serve every length. Each program leaves its
part in memory, and the last to arrive for a key head adds them up.
Source of the method: Dao et al., "Flash-Decoding for long-context inference" (2023).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from burnish.kernels.attention_configs import padded
from burnish.kernels.attention_inputs import as_bytes
from burnish.kernels.counters import counters
from burnish.kernels.launch import Config, Target, launch, launch_dependents, target_of, wait_for_inputs
from burnish.kernels.matmul import dot

_FAR = 1 << 29
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # exp2(-inf - lowest) is 0 where exp2(-inf - -inf) is NaN


@triton.jit
def _part(
    q, k, v, padding, lengths, batch, key_head, split, lq, most, window, scale, groups, stride_qb, stride_qh, stride_qm,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_pb, stride_pn, stride_length,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, PADDED: tl.constexpr, WINDOW: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """The unscaled result, largest score and sum of weights over one part of the keys, and how many parts there are."""
    length = tl.minimum(tl.load(lengths + batch * stride_length).to(tl.int32), most)
    begin = 0
    if WINDOW:
        begin = tl.maximum(length - lq - window + 1, 0) // BLOCK_N * BLOCK_N
    blocks = tl.cdiv(length - begin, BLOCK_N)
    each = tl.maximum(tl.cdiv(blocks, SPLITS), 1)
    first = begin + split * each * BLOCK_N
    stop = tl.minimum(first + each * BLOCK_N, length)

    row = tl.arange(0, ROWS)
    head, query = key_head * groups + row // lq, row % lq
    column, value_column = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    q_rows = q + batch * stride_qb + head.to(tl.int64) * stride_qh + query.to(tl.int64) * stride_qm
    inside = (row < groups * lq)[:, None]
    queries = tl.load(q_rows[:, None] + column[None, :], mask=inside & (column < D)[None, :], other=0.0)
    last = length - lq + query  # the position of each row's query: the last key that it sees
    k += batch * stride_kb + key_head * stride_kh
    v += batch * stride_vb + key_head * stride_vh

    acc = tl.zeros((ROWS, BLOCK_DV), tl.float32)
    row_max = tl.full((ROWS,), _LOWEST, tl.float32)
    row_sum = tl.zeros((ROWS,), tl.float32)
    for start in range(first, stop, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        there = (key < stop)[:, None]
        k_rows = k + key.to(tl.int64)[:, None] * stride_kn + column[None, :]
        keys = tl.load(k_rows, mask=there if BLOCK_D == D else there & (column < D)[None, :], other=0.0)
        scores = dot(queries, tl.trans(keys), tl.zeros((ROWS, BLOCK_N), tl.float32)) * scale
        seen = (key < stop)[None, :]
        if PADDED:
            real = tl.load(padding + batch * stride_pb + key * stride_pn, mask=key < stop, other=0)
            seen = seen & (real != 0)[None, :]
        if not ONE:
            seen = seen & (key[None, :] <= last[:, None])
        if WINDOW:
            seen = seen & (key[None, :] > last[:, None] - window)
        scores = tl.where(seen, scores, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        weights = tl.math.exp2(scores - new_max[:, None])
        shrink = tl.math.exp2(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(weights, 1)
        v_rows = v + key.to(tl.int64)[:, None] * stride_vn + value_column[None, :]
        values = tl.load(v_rows, mask=there if BLOCK_DV == DV else there & (value_column < DV)[None, :], other=0.0)
        acc = dot(weights.to(values.dtype), values, acc * shrink[:, None])
        row_max = new_max
    return acc, row_max, row_sum, tl.maximum(tl.cdiv(blocks, each), 1)


@triton.jit(do_not_specialize=["lq", "most", "window", "groups"])
def decode_attention_kernel(
    q, k, v, out, padding, lengths, parts, counter, heads, lq, most, window, scale, groups, stride_qb, stride_qh,
    stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_pb, stride_pn, stride_length,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr,
    PADDED: tl.constexpr, WINDOW: tl.constexpr, ONE: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One part of the keys of one key head; `parts` is (batch * key heads, SPLITS, ROWS, BLOCK_DV + 2) float32."""
    launch_dependents(PDL)
    wait_for_inputs(PDL)
    key_heads = heads // groups
    pair, split = tl.program_id(0), tl.program_id(1)
    batch, key_head = (pair // key_heads).to(tl.int64), (pair % key_heads).to(tl.int64)
    acc, row_max, row_sum, used = _part(
        q, k, v, padding, lengths, batch, key_head, split, lq, most, window, scale, groups, stride_qb, stride_qh,
        stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_pb, stride_pn,
        stride_length, D, DV, BLOCK_D, BLOCK_DV, ROWS, BLOCK_N, SPLITS, PADDED, WINDOW, ONE,
    )  # fmt: skip
    row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK_DV)
    done = split < used
    if SPLITS > 1:
        WIDTH: tl.constexpr = BLOCK_DV + 2
        part = parts + ((pair * SPLITS).to(tl.int64) * ROWS + row) * WIDTH
        if done and used > 1:
            mine = part + split * ROWS * WIDTH
            tl.store(mine[:, None] + column[None, :], acc)
            tl.store(mine + BLOCK_DV, row_max)
            tl.store(mine + BLOCK_DV + 1, row_sum)
            tl.debug_barrier()  # one thread counts for all of them: their stores have to come before
            done = tl.atomic_add(counter + pair, 1, sem="acq_rel", scope="gpu") == used - 1
            if done:
                tl.store(counter + pair, 0)  # as the next launch wants it
                acc = tl.zeros((ROWS, BLOCK_DV), tl.float32)
                row_max = tl.full((ROWS,), _LOWEST, tl.float32)
                row_sum = tl.zeros((ROWS,), tl.float32)
                for other in range(0, used):
                    theirs = part + other * ROWS * WIDTH
                    their_max = tl.load(theirs + BLOCK_DV, cache_modifier=".cg")
                    new_max = tl.maximum(row_max, their_max)
                    shrink, grow = tl.math.exp2(row_max - new_max), tl.math.exp2(their_max - new_max)
                    row_sum = row_sum * shrink + grow * tl.load(theirs + BLOCK_DV + 1, cache_modifier=".cg")
                    their_acc = tl.load(theirs[:, None] + column[None, :], cache_modifier=".cg")
                    acc = acc * shrink[:, None] + their_acc * grow[:, None]
                    row_max = new_max
    if done:
        acc *= (1.0 / tl.where(row_sum == 0, 1.0, row_sum))[:, None]  # a query that saw no key gives zeros
        head, query = key_head * groups + row // lq, row % lq
        to = out + ((batch * lq + query) * heads + head)[:, None] * DV + column[None, :]
        tl.store(to, acc.to(out.dtype.element_ty), mask=(row < groups * lq)[:, None] & (column < DV)[None, :])


def decode_configs(q: Tensor, k: Tensor, v: Tensor) -> list[Config]:
    """How `decode_attention` may be run, the most promising first."""
    target = target_of(q)
    return _configs(k.shape[0] * k.shape[1], k.shape[2], max(k.shape[3], v.shape[3]), q.dtype, target)


def _configs(pairs: int, most: int, width: int, dtype: torch.dtype, target: Target) -> list[Config]:
    if dtype == torch.float32:
        shapes = [(32, 4, 2)]
    else:
        shapes = [(64, 4, 4), (128, 4, 3), (32, 4, 4)] if width <= 128 else [(32, 4, 3), (64, 4, 2)]
    configs = []
    for n, warps, stages in shapes:
        longest = max(1, -(-most // (2 * n)))  # a shorter part does nothing but begin
        for waves in (2, 1, 4):
            splits = min(longest, max(1, waves * target.num_sms // pairs), 64)
            configs.append(Config.of(warps, stages, BLOCK_N=n, SPLITS=splits))
    return list(dict.fromkeys(configs))


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    key_padding_mask: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    config: Config | None = None,
) -> Tensor:
    """Attention of q over the first `lengths` keys of a cache, arguments as of the Op `cached_attention`.

    q (B, Hq, Lq, D) with at most 64 queries for each key head (Hq / Hkv * Lq), k (B, Hkv, Lmax, D), v (B, Hkv, Lmax,
    Dv), of one dtype; head dimensions up to 256. The result is (B, Hq, Lq, Dv), stored as (B, Lq, Hq, Dv).
    """
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    (batch, heads, lq, d), (_, key_heads, most, dv) = q.shape, v.shape
    groups = heads // key_heads
    config = config or decode_configs(q, k, v)[0]
    splits, rows, block_dv = config["SPLITS"], max(16, triton.next_power_of_2(groups * lq)), padded(dv)
    out = q.new_empty((batch, lq, heads, dv))
    parts, counter = None, None
    if splits > 1:
        size = batch * key_heads * splits * rows * (block_dv + 2)
        parts, counter = q.new_empty(size, dtype=torch.float32), counters(q, batch * key_heads)
    padding = q if key_padding_mask is None else as_bytes(key_padding_mask)
    steps = (0, 0) if key_padding_mask is None else key_padding_mask.stride()
    launch(
        decode_attention_kernel, (batch * key_heads, splits), q, k, v, out, padding, lengths, parts, counter, heads, lq,
        most, _FAR if window is None else min(window, _FAR), (d**-0.5 if scale is None else scale) * math.log2(math.e),
        groups, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *steps, 0 if lengths.numel() == 1 else
        lengths.stride(0), config=config, like=q, D=d, DV=dv, BLOCK_D=padded(d), BLOCK_DV=block_dv, ROWS=rows,
        PADDED=key_padding_mask is not None, WINDOW=window is not None, ONE=lq == 1,
    )  # fmt: skip
    return out.transpose(1, 2)
