"""What kernels do that attend to a cache by parts: ask for blocks ahead, add them up, and add up the programs' parts.

A program takes every SPLITS-th block of keys, so that where its first one lies is known before the length is. Each
program leaves its part in memory, and the last to arrive for a key head loads them all at once and adds them up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from burnish.kernels.launch import prefetch
from burnish.kernels.matmul import dot

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # exp2(-inf - lowest) is 0 where exp2(-inf - -inf) is NaN


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
    elif lengths is None:
        first, stop = first_and_stop(most, split, lq, window, BLOCK_N, WINDOW)[0], most
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
def bias_block(bias, key, stride_bn, length):
    """What is added to the scores, for each row and key; `bias` points to where each row begins, or is None."""
    block = None
    if bias is not None:
        pointers = bias[:, None] + key.to(tl.int64)[None, :] * stride_bn
        block = tl.load(pointers, mask=(key < length)[None, :], other=0.0).to(tl.float32)
        block = tl.maximum(block, LOWEST / 4)  # the lowest number, which masks are made of, times log2(e) is -inf
    return block


@triton.jit
def add_block(
    acc, row_max, row_sum, queries, keys, values, real, key, length, last, window, scale, PADDED: tl.constexpr,
    WINDOW: tl.constexpr, ONE: tl.constexpr, bias=None,
):  # fmt: skip
    """One step of the softmax over blocks of keys, which are at the positions `key`; `bias` for each row and key."""
    scores = dot(queries, tl.trans(keys), tl.zeros((queries.shape[0], keys.shape[0]), tl.float32)) * scale
    if bias is not None:
        scores += bias * 1.4426950408889634  # log2(e), as it is in the scale
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
    WINDOW: tl.constexpr, ONE: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, bias=None, stride_bn=0,
):  # fmt: skip
    """`add_block` of every block of a program, of which the first one starts at `first`; `bias` as of `bias_block`."""
    for start in range(first, length, SPLITS * BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        real = key
        if PADDED:
            real = tl.load(padding + key * stride_pn, mask=key < length, other=0)
        keys = _rows(k, key, stride_kn, length, D, BLOCK_D)
        values = _rows(v, key, stride_vn, length, DV, BLOCK_DV)
        acc, row_max, row_sum = add_block(
            acc, row_max, row_sum, queries, keys, values, real, key, length, last, window, scale, PADDED, WINDOW, ONE,
            bias_block(bias, key, stride_bn, length),
        )  # fmt: skip
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
    their_max = tl.load(maxima + line, mask=there, other=LOWEST, cache_modifier=".cg")
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
            largest, weight = tl.full((KEPT,), LOWEST, tl.float32), tl.zeros((KEPT,), tl.float32)
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
