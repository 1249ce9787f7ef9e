"""Attention of a few new queries over a cache, its keys split among programs: bound by reading k and v, or by latency.

The query heads that share a key head are rows of one block, so that k and v are read once for all of them. The number
of filled keys is read on the device: one launch, and one captured graph, serve every length. A program takes every
SPLITS-th block of keys, so that where its first one lies is known before the length is. Each program leaves its part in
memory, and the last to arrive for a key head loads them all at once and adds them up.
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
from burnish.kernels.launch import Config, Target, launch, launch_dependents, prefetch, target_of, wait_for_inputs
from burnish.kernels.matmul import dot

_FAR = 1 << 29
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # exp2(-inf - lowest) is 0 where exp2(-inf - -inf) is NaN
_MERGED = 512  # bytes of parts that a thread adds up at once: 128 registers
_GUESSED = 1 << 22  # bytes of a cache that is read to its end sooner than its length is known
_AHEAD = 1 << 24  # bytes that are asked for before the kernel ahead is done: a third of the L2 cache of an H100


@triton.jit
def first_and_stop(length, split, lq, window, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr):
    """Where the program's first block starts, and how many blocks there are for all programs."""
    begin = 0
    if WINDOW:
        begin = tl.maximum(length - lq - window + 1, 0) // BLOCK_N * BLOCK_N
    return begin + split * BLOCK_N, tl.cdiv(length - begin, BLOCK_N)


@triton.jit
def _prefetch_rows(x, stride_n, start, stop, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr):
    """Asks for the BLOCK_N rows of x from `start` on, those before `stop`, which there has to be one of."""
    LINE: tl.constexpr = 1024 // x.dtype.element_ty.primitive_bitwidth  # entries of a line of 128 bytes
    LINES: tl.constexpr = triton.next_power_of_2((WIDTH + LINE - 1) // LINE)
    row = tl.minimum(start + tl.arange(0, BLOCK_N), stop - 1).to(tl.int64)
    prefetch(x + row[:, None] * stride_n + tl.minimum(tl.arange(0, LINES) * LINE, WIDTH - 1)[None, :])


@triton.jit
def ask_ahead(
    k, v, lengths, split, lq, most, window, stride_kn, stride_vn, D: tl.constexpr, DV: tl.constexpr,
    WINDOW: tl.constexpr, GUESS: tl.constexpr, AHEAD: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Asks for what the program will read first, before the kernel ahead is done.

    That may yet write the length, and keys and values: from what there is now follows only what is asked for, which L2
    keeps up to date. L1 is not told, so the load is past it.
    """
    STEP: tl.constexpr = SPLITS * BLOCK_N
    if GUESS:
        first, stop = split * BLOCK_N, most
    else:
        stop = tl.minimum(tl.load(lengths, cache_modifier=".cg").to(tl.int32), most)
        first = first_and_stop(stop, split, lq, window, BLOCK_N, WINDOW)[0]
    for start in range(first, tl.minimum(stop, first + AHEAD * STEP), STEP):
        _prefetch_rows(k, stride_kn, start, stop, D, BLOCK_N)
        _prefetch_rows(v, stride_vn, start, stop, DV, BLOCK_N)


@triton.jit
def _rows(x, key, stride_n, bound, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows `key` of k or v; zeros from `bound` on."""
    column = tl.arange(0, BLOCK)
    there = (key < bound)[:, None]
    pointers = x + key.to(tl.int64)[:, None] * stride_n + column[None, :]
    return tl.load(pointers, mask=there if BLOCK == WIDTH else there & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def one_block(
    k, v, padding, first, length, most, stride_kn, stride_vn, stride_pn, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PADDED: tl.constexpr, GUESS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What `add_block` takes of the only block that a program has: positions, whether they are real, keys and values.

    Without a loop nothing goes round by asynchronous copies: all of it is asked for first, then waited for.
    """
    key = first + tl.arange(0, BLOCK_N)
    bound = most if GUESS else length
    real = key
    if PADDED:
        real = tl.load(padding + key * stride_pn, mask=key < bound, other=0)
    # Keys come last: Triton has them go to shared memory at once, and no later load is issued before they have.
    values = _rows(v, key, stride_vn, bound, DV, BLOCK_DV)
    keys = _rows(k, key, stride_kn, bound, D, BLOCK_D)
    if GUESS:
        values = tl.where((key < length)[:, None], values, 0.0)  # a weight of 0 does not rid it of a NaN
    return key, real, keys, values


@triton.jit
def add_block(
    acc, row_max, row_sum, queries, keys, values, real, key, length, last, window, scale, PADDED: tl.constexpr,
    WINDOW: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """One step of the softmax over blocks of keys, which are at the positions `key`."""
    scores = dot(queries, tl.trans(keys), tl.zeros((queries.shape[0], keys.shape[0]), tl.float32)) * scale
    seen = (key < length)[None, :]
    if PADDED:
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
    return dot(weights.to(values.dtype), values, acc * shrink[:, None]), new_max, row_sum


@triton.jit
def add_blocks(
    acc, row_max, row_sum, queries, k, v, padding, first, length, last, window, scale, stride_kn, stride_vn, stride_pn,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PADDED: tl.constexpr,
    WINDOW: tl.constexpr, ONE: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """`add_block` of every block of a program, of which the first one starts at `first`."""
    for start in range(first, length, SPLITS * BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        real = key
        if PADDED:
            real = tl.load(padding + key * stride_pn, mask=key < length, other=0)
        keys = _rows(k, key, stride_kn, length, D, BLOCK_D)
        values = _rows(v, key, stride_vn, length, DV, BLOCK_DV)
        acc, row_max, row_sum = add_block(
            acc, row_max, row_sum, queries, keys, values, real, key, length, last, window, scale, PADDED, WINDOW, ONE
        )
    return acc, row_max, row_sum


@triton.jit
def _merge(
    acc, row_max, row_sum, parts, maxima, sums, first, used, SPLITS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_DV: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Adds parts `first` to `first` + CHUNK, of which there are `used` in all, to those before; all loads at once."""
    # Rows come first, so that Triton gives those, not splits, to a warp's threads: each thread then adds up alone.
    row, other, column = tl.arange(0, ROWS)[:, None], (first + tl.arange(0, CHUNK))[None, :], tl.arange(0, BLOCK_DV)
    there = (other < used) & (row >= 0)
    # Past L1, in which there may be what an earlier launch of this multiprocessor read there.
    line = row * SPLITS + other
    their_max = tl.load(maxima + line, mask=there, other=_LOWEST, cache_modifier=".cg")
    their_sum = tl.load(sums + line, mask=there, other=0.0, cache_modifier=".cg")
    accs = tl.load(
        parts + (other * ROWS + row)[:, :, None] * BLOCK_DV + column[None, None, :], mask=there[:, :, None], other=0.0,
        cache_modifier=".cg",
    )  # fmt: skip
    tl.debug_barrier()  # no load is put off until a maximum is there
    new_max = tl.maximum(row_max, tl.max(their_max, 1))
    grow, shrink = tl.math.exp2(their_max - new_max[:, None]), tl.math.exp2(row_max - new_max)
    row_sum = row_sum * shrink + tl.sum(their_sum * grow, 1)
    return acc * shrink[:, None] + tl.sum(accs * grow[:, :, None], 1), new_max, row_sum


@triton.jit
def _write(
    acc, row_sum, out, batch, key_head, groups, lq, ROWS: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr
):
    row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK_DV)
    acc *= (1.0 / tl.where(row_sum == 0, 1.0, row_sum))[:, None]  # a query that saw no key gives zeros
    head, query = key_head * groups + row // lq, row % lq
    heads = groups * tl.num_programs(2)
    to = out + ((batch * lq + query) * heads + head)[:, None] * DV + column[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=(row < groups * lq)[:, None] & (column < DV)[None, :])


@triton.jit
def finish(
    acc, row_max, row_sum, out, parts, counter, batch, key_head, split, blocks, groups, lq, DV: tl.constexpr,
    BLOCK_DV: tl.constexpr, ROWS: tl.constexpr, KEPT: tl.constexpr, CHUNK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Leaves the program's part for the last of those for its key head to arrive, or is that one, and writes `out`."""
    pair, row = batch * tl.num_programs(2) + key_head, tl.arange(0, ROWS)
    used = tl.maximum(tl.minimum(blocks, SPLITS), 1)
    if SPLITS == 1:
        _write(acc, row_sum, out, batch, key_head, groups, lq, ROWS, DV, BLOCK_DV)
    elif used == 1:
        if split == 0:
            _write(acc, row_sum, out, batch, key_head, groups, lq, ROWS, DV, BLOCK_DV)
    elif split < used:
        LINES: tl.constexpr = SPLITS * KEPT  # of a pair
        pairs, of_pair = tl.num_programs(0).to(tl.int64) * tl.num_programs(2), pair * LINES
        maxima = parts + pairs * LINES * BLOCK_DV + of_pair
        sums = maxima + pairs * LINES
        parts += of_pair * BLOCK_DV
        kept, line = row < KEPT, row * SPLITS + split
        to = parts + (split * KEPT + row)[:, None] * BLOCK_DV + tl.arange(0, BLOCK_DV)[None, :]
        tl.store(to, acc, mask=kept[:, None])
        tl.store(maxima + line, row_max, mask=kept)
        tl.store(sums + line, row_sum, mask=kept)
        tl.debug_barrier()  # one thread counts for all of them: their stores have to come before
        if tl.atomic_add(counter + pair, 1, sem="acq_rel", scope="gpu") == used - 1:
            tl.store(counter + pair, 0)  # as the next launch wants it
            total = tl.zeros((KEPT, BLOCK_DV), tl.float32)
            largest, weight = tl.full((KEPT,), _LOWEST, tl.float32), tl.zeros((KEPT,), tl.float32)
            if CHUNK >= SPLITS:
                total, largest, weight = _merge(
                    total, largest, weight, parts, maxima, sums, 0, used, SPLITS, KEPT, BLOCK_DV, CHUNK
                )
            else:
                for chunk in range(0, used, CHUNK):
                    total, largest, weight = _merge(
                        total, largest, weight, parts, maxima, sums, chunk, used, SPLITS, KEPT, BLOCK_DV, CHUNK
                    )
            _write(total, weight, out, batch, key_head, groups, lq, KEPT, DV, BLOCK_DV)


@triton.jit(do_not_specialize=["lq", "most", "window", "groups"])
def decode_attention_kernel(
    q, k, v, out, padding, lengths, parts, counter, lq, most, window, scale, groups, stride_qb, stride_qh,
    stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_pb, stride_pn, stride_length,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr,
    KEPT: tl.constexpr, PADDED: tl.constexpr, WINDOW: tl.constexpr, ONE: tl.constexpr, SINGLE: tl.constexpr,
    GUESS: tl.constexpr, AHEAD: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Every SPLITS-th block of the keys of one key head.

    `parts` is float32: for each batch, key head and split KEPT rows of BLOCK_DV; then for each batch, key head
    and row SPLITS maxima; then as many sums.
    SINGLE: a program has one block at most. GUESS: that block is read, in any case, before the length is known.
    """
    launch_dependents(PDL)
    batch, split, key_head = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if ONE:
        lq = 1  # no division by it is left
    k += batch * stride_kb + key_head * stride_kh
    v += batch * stride_vb + key_head * stride_vh
    lengths += batch * stride_length
    if PDL:
        ask_ahead(
            k, v, lengths, split, lq, most, window, stride_kn, stride_vn, D, DV, WINDOW, GUESS, AHEAD, BLOCK_N, SPLITS
        )
    wait_for_inputs(PDL)

    # Volatile, so that no compiler takes it to be the load above.
    length = tl.minimum(tl.load(lengths, volatile=True).to(tl.int32), most)
    first, blocks = first_and_stop(length, split, lq, window, BLOCK_N, WINDOW)
    row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    # The last row fills up those that do not exist: no mask would be kept, or spilled, from here to the last store.
    there = tl.minimum(row, groups * lq - 1)
    head, query = key_head * groups + there // lq, there % lq
    q_rows = (q + batch * stride_qb + head * stride_qh + query.to(tl.int64) * stride_qm)[:, None] + column[None, :]
    queries = tl.load(q_rows, mask=None if BLOCK_D == D else (column < D)[None, :])
    last = length - lq + query  # the position of each row's query: the last key that it sees
    padding += batch * stride_pb

    acc = tl.zeros((ROWS, BLOCK_DV), tl.float32)
    row_max = tl.full((ROWS,), _LOWEST, tl.float32)
    row_sum = tl.zeros((ROWS,), tl.float32)
    if SINGLE:
        key, real, keys, values = one_block(
            k, v, padding, first, length, most, stride_kn, stride_vn, stride_pn, D, DV, BLOCK_D, BLOCK_DV, PADDED, GUESS,
            BLOCK_N,
        )  # fmt: skip
        acc, row_max, row_sum = add_block(
            acc, row_max, row_sum, queries, keys, values, real, key, length, last, window, scale, PADDED, WINDOW, ONE
        )
    else:
        acc, row_max, row_sum = add_blocks(
            acc, row_max, row_sum, queries, k, v, padding, first, length, last, window, scale, stride_kn, stride_vn,
            stride_pn, D, DV, BLOCK_D, BLOCK_DV, PADDED, WINDOW, ONE, BLOCK_N, SPLITS,
        )  # fmt: skip
    finish(
        acc, row_max, row_sum, out, parts, counter, batch, key_head, split, blocks, groups, lq, DV, BLOCK_DV, ROWS,
        KEPT, CHUNK, SPLITS,
    )  # fmt: skip


def decode_configs(q: Tensor, k: Tensor, v: Tensor) -> list[Config]:
    """How `decode_attention` may be run, the most promising first."""
    target = target_of(q)
    return _configs(k.shape[0] * k.shape[1], k.shape[2], max(k.shape[3], v.shape[3]), q.dtype, target)


def _configs(pairs: int, most: int, width: int, dtype: torch.dtype, target: Target) -> list[Config]:
    if dtype == torch.float32:
        shapes = [(32, 4, 2)]
    elif width <= 64:
        shapes = [(64, 4, 4), (128, 4, 3), (64, 2, 4), (32, 4, 4)]
    elif width <= 128:
        shapes = [(64, 4, 4), (128, 4, 2), (32, 4, 4)]  # two programs fit on a multiprocessor of sm_90
    else:
        shapes = [(32, 8, 3), (64, 8, 2)]
    waves = (2, 1, 4) if pairs < target.num_sms else (2, 4, 8)  # programs for each multiprocessor
    configs = []
    for n, warps, stages in shapes:
        blocks = -(-most // n)
        for wave in waves:
            splits = min(blocks, max(1, wave * target.num_sms // pairs), 64)
            if 16 < splits < blocks:
                splits -= splits % 16  # a power of two of parts is added up at once
            configs.append(Config.of(warps, stages, BLOCK_N=n, SPLITS=splits))
    return list(dict.fromkeys(configs))[:9]


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
    groups, pairs = heads // key_heads, batch * key_heads
    config = config or decode_configs(q, k, v)[0]
    splits, block_n, block_dv = config["SPLITS"], config["BLOCK_N"], padded(dv)
    kept = triton.next_power_of_2(groups * lq)  # rows of the parts; a product of blocks has 16 at least
    out = q.new_empty((batch, lq, heads, dv))
    parts, counter = None, None
    if splits > 1:
        parts = q.new_empty(pairs * splits * kept * (block_dv + 2), dtype=torch.float32)
        counter = counters(q, pairs)
    padding = q if key_padding_mask is None else as_bytes(key_padding_mask)
    steps = (0, 0) if key_padding_mask is None else key_padding_mask.stride()
    single = splits * block_n >= most
    position_bytes = pairs * (d + dv) * q.element_size()
    launch(
        decode_attention_kernel, (batch, splits, key_heads), q, k, v, out, padding, lengths, parts, counter, lq, most,
        _FAR if window is None else min(window, _FAR), (d**-0.5 if scale is None else scale) * math.log2(math.e),
        groups, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *steps, 0 if lengths.numel() == 1 else
        lengths.stride(0), config=config, like=q, D=d, DV=dv, BLOCK_D=padded(d), BLOCK_DV=block_dv, ROWS=max(16, kept),
        KEPT=kept, PADDED=key_padding_mask is not None, WINDOW=window is not None, ONE=lq == 1, SINGLE=single,
        GUESS=single and window is None and position_bytes * most <= _GUESSED,
        AHEAD=1 if single else max(1, min(4, _AHEAD // (position_bytes * splits * block_n))),
        CHUNK=_chunk(splits, kept * block_dv * 4, config.num_warps),
    )  # fmt: skip
    return out.transpose(1, 2)


def _chunk(splits: int, part_bytes: int, warps: int) -> int:
    """How many parts are added up at once, a power of two."""
    return min(triton.next_power_of_2(splits), max(1, _MERGED * 32 * warps // part_bytes))
