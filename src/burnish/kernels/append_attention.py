"""One new token of a model that decodes: rotated, written into the cache, and attended from, in one launch.

As `burnish.kernels.decode_attention`, but for the newest key and value, which every program has in registers and none
takes from the cache: what is written here is read by later kernels only, and no program waits for another one's store.
Programs of one block put both in their places in it. Where there are more blocks, which go to shared memory without
passing through registers, the first program begins with them instead. The one that uses them also stores them.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from burnish.kernels.decode_attention import (
    FAR,
    constants_of,
    decode_configs,
    padding_and_steps,
    parts_and_counter,
)
from burnish.kernels.decode_blocks import LOWEST, add_block, add_blocks, ask_ahead, finish, first_and_stop, one_block
from burnish.kernels.launch import Config, launch, launch_dependents, wait_for_inputs


@triton.jit
def _rotated(values, partner, cos, sin):
    """Rows that are not rotated have a cos of 1 and a sin and partner of 0."""
    return (values.to(tl.float32) * cos + partner.to(tl.float32) * sin).to(values.dtype)


@triton.jit(do_not_specialize=["most", "window", "groups"])
def append_attention_kernel(
    q, k, v, cos, sin, k_cache, v_cache, out, padding, lengths, parts, counter, most, window, scale, groups,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh, stride_tb, stride_tn, stride_kcb, stride_kch,
    stride_kcn, stride_vcb, stride_vch, stride_vcn, stride_pb, stride_pn, stride_length,
    R: tl.constexpr, INTERLEAVED: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, ROWS: tl.constexpr, KEPT: tl.constexpr, PADDED: tl.constexpr, WINDOW: tl.constexpr,
    SINGLE: tl.constexpr, GUESS: tl.constexpr, AHEAD: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Every SPLITS-th block of the keys of one key head, and the new key.

    SINGLE, GUESS and `parts` as in `decode_attention_kernel`.
    """
    launch_dependents(PDL)
    batch, split, key_head = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    k_cache += batch * stride_kcb + key_head * stride_kch
    v_cache += batch * stride_vcb + key_head * stride_vch
    lengths += batch * stride_length
    padding += batch * stride_pb
    if PDL:
        ask_ahead(
            k_cache, v_cache, lengths, split, 1, most, window, stride_kcn, stride_vcn, D, DV, WINDOW, GUESS, AHEAD,
            BLOCK_N, SPLITS,
        )  # fmt: skip
    wait_for_inputs(PDL)

    # Volatile, so that no compiler takes it to be a load from before the wait.
    before = tl.load(lengths, volatile=True)
    fits = before < most
    old = tl.minimum(before, most).to(tl.int32)
    length = tl.where(fits, old + 1, old)
    first, blocks = first_and_stop(length, split, 1, window, BLOCK_N, WINDOW)

    # Single rows are tiles, too, laid out as the others are.
    row, column, value_column = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_DV)[None, :]
    inside, turns = column < D, column < R
    if INTERLEAVED:
        is_first, partner = column % 2 == 0, column ^ 1
    else:
        is_first = column < R // 2
        partner = tl.where(is_first, column + R // 2, column - R // 2)
    head = key_head * groups + tl.minimum(row, groups - 1)  # the last row fills up those that do not exist
    q_rows = (q + batch * stride_qb + head * stride_qh)[:, None]
    k += batch * stride_kb + key_head * stride_kh
    v += batch * stride_vb + key_head * stride_vh
    table = batch * stride_tb + column * stride_tn
    queries = tl.load(q_rows + column, inside, other=0.0)
    # Another half's entry is in another thread; that the same line is read again costs a hit in L1.
    query_partners = tl.load(q_rows + partner, turns, other=0.0)
    c = tl.load(cos + table, turns, other=1.0).to(tl.float32)
    s = tl.load(sin + table, turns, other=0.0).to(tl.float32)
    new_key = tl.load(k + column, inside, other=0.0)
    new_partner = tl.load(k + partner, turns, other=0.0)
    new_value = tl.load(v + value_column, value_column < DV, other=0.0)
    if SINGLE:
        key, real, keys, values = one_block(
            k_cache, v_cache, padding, first, length, most, stride_kcn, stride_vcn, stride_pn, D, DV, BLOCK_D, BLOCK_DV,
            PADDED, GUESS, BLOCK_N,
        )  # fmt: skip
        tl.debug_barrier()  # no load is put off until what the others are for is computed
    s = tl.where(is_first, -s, s)
    queries = _rotated(queries, query_partners, c, s)
    new_key = _rotated(new_key, new_partner, c, s)

    last = length - 1 + tl.zeros((ROWS,), tl.int32)  # the last key that each row's query sees
    acc = tl.zeros((ROWS, BLOCK_DV), tl.float32)
    row_max = tl.full((ROWS,), LOWEST, tl.float32)
    row_sum = tl.zeros((ROWS,), tl.float32)
    if SINGLE:
        mine = fits & (first <= old) & (old < first + BLOCK_N)
        is_new = (key == tl.where(fits, old, -1))[:, None]
        keys, values = tl.where(is_new, new_key, keys), tl.where(is_new, new_value, values)
        acc, row_max, row_sum = add_block(
            acc, row_max, row_sum, queries, keys, values, real, key, length, last, window, scale, PADDED, WINDOW, True
        )
    else:
        mine = fits & (split == 0)  # which has a part for every length
        seen = mine
        if PADDED:
            seen = tl.load(padding + old * stride_pn, mine, other=0) != 0
        scores = tl.sum(queries.to(tl.float32) * new_key.to(tl.float32), 1) * scale
        row_max, row_sum = tl.where(seen, scores, row_max), tl.where(seen, 1.0, row_sum)
        acc = tl.where(seen, new_value.to(tl.float32), acc)
        acc, row_max, row_sum = add_blocks(
            acc, row_max, row_sum, queries, k_cache, v_cache, padding, first, old, last, window, scale, stride_kcn,
            stride_vcn, stride_pn, D, DV, BLOCK_D, BLOCK_DV, PADDED, WINDOW, True, BLOCK_N, SPLITS,
        )  # fmt: skip
    # Nobody reads the new row before the next kernel, and loads that follow a store might wait for it. It is stored as
    # the first row of a tile like the queries', so that it is where it is in those.
    to, to_value = old.to(tl.int64) * stride_kcn + column, old.to(tl.int64) * stride_vcn + value_column
    only = (row == tl.where(mine, 0, -1))[:, None]
    tl.store(k_cache + to + row[:, None] * 0, new_key, only & inside)
    tl.store(v_cache + to_value + row[:, None] * 0, new_value, only & (value_column < DV))
    finish(
        acc, row_max, row_sum, out, parts, counter, batch, key_head, split, blocks, groups, 1, DV, BLOCK_DV, ROWS, KEPT,
        CHUNK, SPLITS,
    )  # fmt: skip


def append_attention_configs(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> list[Config]:
    """How `append_attention` may be run, the most promising first."""
    return decode_configs(q, k_cache, v_cache)


def append_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    key_padding_mask: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    interleaved: bool = False,
    config: Config | None = None,
) -> Tensor:
    """Writes k, rotated, and v to position `lengths` of the caches, where there is one, and returns the attention of
    q, rotated, over what is filled then; arguments as of the Op `rope_append_attention`.

    q (B, Hq, 1, D) with at most 64 heads for each key head, k (B, Hkv, 1, D), v (B, Hkv, 1, Dv), cos and sin (1, R) or
    (1 or B, 1, R), the caches (B, Hkv, Lmax, D or Dv), whose last dimension has a stride of 1 and no two entries of
    which share memory; head dimensions up to 256. The result is (B, Hq, 1, Dv), stored as (B, 1, Hq, Dv).
    """
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    (batch, heads, _, d), (_, key_heads, most, dv) = q.shape, v_cache.shape
    config = config or append_attention_configs(q, k_cache, v_cache)[0]
    out = q.new_empty((batch, 1, heads, dv))
    padding, *steps = padding_and_steps(key_padding_mask, q)
    constants = constants_of(q, k_cache, v_cache, window, config)
    launch(
        append_attention_kernel, (batch, config["SPLITS"], key_heads), q, k, v, cos, sin, k_cache, v_cache, out,
        padding, lengths, *parts_and_counter(q, batch * key_heads, constants, config), most,
        FAR if window is None else min(window, FAR), (d**-0.5 if scale is None else scale) * math.log2(math.e),
        heads // key_heads, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        0 if cos.dim() == 2 or cos.shape[0] == 1 else cos.stride(0), cos.stride(-1), *k_cache.stride()[:3],
        *v_cache.stride()[:3], *steps, 0 if lengths.numel() == 1 else lengths.stride(0), config=config, like=q,
        R=cos.shape[-1], INTERLEAVED=interleaved, PADDED=key_padding_mask is not None, **constants,
    )  # fmt: skip
    return out.transpose(1, 2)
