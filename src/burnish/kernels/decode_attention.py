"""Attention of a few new queries over a cache, its keys split among programs: bound by reading k and v, or by latency.

The query heads that share a key head are rows of one block, so that k and v are read once for all of them. The number
of filled keys is read on the device: one launch, and one captured graph, serve every length. The parts of a program are
in `burnish.kernels.decode_blocks`.
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
from burnish.kernels.decode_blocks import (
    LOWEST,
    add_block,
    add_blocks,
    ask_ahead,
    bias_block,
    finish,
    first_and_stop,
    one_block,
)
from burnish.kernels.launch import Config, Target, launch, launch_dependents, target_of, wait_for_inputs
from burnish.kernels.matmul_configs import shared_memory

FAR = 1 << 29
_MERGED = 512  # bytes of parts that a thread adds up at once: 128 registers
_GUESSED = 1 << 22  # bytes of a cache that is read to its end sooner than its length is known
_AHEAD = 1 << 24  # bytes that are asked for before the kernel ahead is done: a third of the L2 cache of an H100


@triton.jit(do_not_specialize=["lq", "most", "window", "groups"])
def decode_attention_kernel(
    q, k, v, out, padding, lengths, parts, counter, lq, most, window, scale, groups, stride_qb, stride_qh,
    stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_pb, stride_pn, stride_length,
    bias, stride_bb, stride_bh, stride_bm, stride_bn,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr,
    KEPT: tl.constexpr, PADDED: tl.constexpr, WINDOW: tl.constexpr, ONE: tl.constexpr, SINGLE: tl.constexpr,
    GUESS: tl.constexpr, AHEAD: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Every SPLITS-th block of the keys of one key head.

    `parts` is float32: for each batch, key head and split KEPT rows of BLOCK_DV; then for each batch, key head
    and row SPLITS maxima; then as many sums.
    SINGLE: a program has one block at most. GUESS: that block is read, in any case, before the length is known.
    lengths is None where all `most` keys are filled, and bias where there is none.
    """
    launch_dependents(PDL)
    batch, split, key_head = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if ONE:
        lq = 1  # no division by it is left
    k += batch * stride_kb + key_head * stride_kh
    v += batch * stride_vb + key_head * stride_vh
    if lengths is not None:
        lengths += batch * stride_length
    if PDL:
        ask_ahead(
            k, v, lengths, split, lq, most, window, stride_kn, stride_vn, D, DV, WINDOW, GUESS, AHEAD, BLOCK_N, SPLITS
        )
    wait_for_inputs(PDL)

    length = most
    if lengths is not None:  # volatile, so that no compiler takes it to be the load above
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
    if bias is not None:
        bias += batch * stride_bb + head * stride_bh + query.to(tl.int64) * stride_bm

    acc = tl.zeros((ROWS, BLOCK_DV), tl.float32)
    row_max = tl.full((ROWS,), LOWEST, tl.float32)
    row_sum = tl.zeros((ROWS,), tl.float32)
    if SINGLE:
        extra = bias_block(bias, first + tl.arange(0, BLOCK_N), stride_bn, length)
        key, real, keys, values = one_block(
            k, v, padding, first, length, most, stride_kn, stride_vn, stride_pn, D, DV, BLOCK_D, BLOCK_DV, PADDED,
            GUESS, BLOCK_N,
        )  # fmt: skip
        acc, row_max, row_sum = add_block(
            acc, row_max, row_sum, queries, keys, values, real, key, length, last, window, scale, PADDED, WINDOW, ONE,
            extra,
        )  # fmt: skip
    else:
        acc, row_max, row_sum = add_blocks(
            acc, row_max, row_sum, queries, k, v, padding, first, length, last, window, scale, stride_kn, stride_vn,
            stride_pn, D, DV, BLOCK_D, BLOCK_DV, PADDED, WINDOW, ONE, BLOCK_N, SPLITS, bias, stride_bn,
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
    if width <= 128 and pairs >= target.num_sms // 2 and dtype != torch.float32:
        # Nothing to merge: 16x32/8x1024x128 on H200 21.2 us where halves take 21.7.
        configs += [Config.of(8, 3, BLOCK_N=128, SPLITS=1)] if shared_memory(target) >= 160 << 10 else []
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
    lengths: Tensor | None,
    key_padding_mask: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Attention of q over the first `lengths` keys of a cache (None: all), arguments as of the Op `cached_attention`.

    q (B, Hq, Lq, D) with at most 64 queries for each key head (Hq / Hkv * Lq), k (B, Hkv, Lmax, D), v (B, Hkv, Lmax,
    Dv), of one dtype; head dimensions up to 256. The result is (B, Hq, Lq, Dv), stored as (B, Lq, Hq, Dv).
    """
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    (batch, heads, lq, d), (_, key_heads, most, dv) = q.shape, v.shape
    config = config or decode_configs(q, k, v)[0]
    out = q.new_empty((batch, lq, heads, dv))
    padding, *steps = padding_and_steps(key_padding_mask, q)
    constants = constants_of(q, k, v, window, config)
    launch(
        decode_attention_kernel, (batch, config["SPLITS"], key_heads), q, k, v, out, padding, lengths,
        *parts_and_counter(q, batch * key_heads, constants, config), lq, most,
        FAR if window is None else min(window, FAR), (d**-0.5 if scale is None else scale) * math.log2(math.e),
        heads // key_heads, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *steps,
        0 if lengths is None or lengths.numel() == 1 else lengths.stride(0), *_bias_and_steps(bias, q, most),
        config=config, like=q, PADDED=key_padding_mask is not None, ONE=lq == 1, **constants,
    )  # fmt: skip
    return out.transpose(1, 2)


def constants_of(q: Tensor, k: Tensor, v: Tensor, window: int | None, config: Config) -> dict[str, int]:
    """What a kernel that attends to a cache is compiled for, apart from its blocks."""
    (batch, heads, lq, d), (_, key_heads, most, dv) = q.shape, v.shape
    kept = triton.next_power_of_2(heads // key_heads * lq)  # rows of the parts; a product of blocks has 16 at least
    splits, block_n = config["SPLITS"], config["BLOCK_N"]
    single = splits * block_n >= most
    position_bytes = batch * key_heads * (d + dv) * q.element_size()
    return {
        "D": d,
        "DV": dv,
        "BLOCK_D": padded(d),
        "BLOCK_DV": padded(dv),
        "ROWS": max(16, kept),
        "KEPT": kept,
        "WINDOW": window is not None,
        "SINGLE": single,
        "GUESS": single and window is None and position_bytes * most <= _GUESSED,
        "AHEAD": 1 if single else max(1, min(4, _AHEAD // (position_bytes * splits * block_n))),
        "CHUNK": _chunk(splits, kept * padded(dv) * 4, config.num_warps),
    }


def parts_and_counter(
    like: Tensor, pairs: int, constants: dict[str, int], config: Config
) -> tuple[Tensor | None, Tensor | None]:
    """Memory that the programs of each of `pairs` key heads share."""
    splits = config["SPLITS"]
    if splits == 1:
        return None, None
    size = pairs * splits * constants["KEPT"] * (constants["BLOCK_DV"] + 2)
    return like.new_empty(size, dtype=torch.float32), counters(like, pairs)


def padding_and_steps(key_padding_mask: Tensor | None, like: Tensor) -> tuple[Tensor, int, int]:
    """The mask as the kernels take it (any tensor where there is none), and its strides."""
    if key_padding_mask is None:
        return like, 0, 0
    return as_bytes(key_padding_mask), key_padding_mask.stride(0), key_padding_mask.stride(1)


def _bias_and_steps(bias: Tensor | None, q: Tensor, most: int) -> tuple[Tensor | None, int, int, int, int]:
    """The bias and its strides. Where there is none, those are 1: Triton makes a constant of that, no argument."""
    if bias is None:
        return None, 1, 1, 1, 1
    steps = bias.expand(*q.shape[:3], most).stride()
    return bias, steps[0], steps[1], steps[2], steps[3]


def _chunk(splits: int, part_bytes: int, warps: int) -> int:
    """How many parts are added up at once, a power of two."""
    return min(triton.next_power_of_2(splits), max(1, _MERGED * 32 * warps // part_bytes))
