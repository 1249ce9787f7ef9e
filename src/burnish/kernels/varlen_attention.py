"""Attention forward within packed sequences: a program for each block of queries that a sequence may have.

How many blocks a sequence has only the device knows. There are programs for as many as the longest one may have, and
those past the end of theirs leave at once (1 us for 10 000 of them): the host never waits for the device.
Source of the method: as of `attention`, Dao, "FlashAttention-2", arXiv:2307.08691.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from burnish.kernels.attention_blocks import attend, block_of, load_rows
from burnish.kernels.attention_configs import padded
from burnish.kernels.launch import Config, launch, launch_dependents, target_of, wait_for_inputs

_FAR = 1 << 29  # more than any distance between positions, and small enough to be added to one in int32
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
_LN_2 = tl.constexpr(math.log(2))


@triton.jit
def _first_and_count(starts, sequence):
    """Where a sequence begins, and how many tokens it has."""
    first, end = tl.load(starts + sequence), tl.load(starts + sequence + 1)
    return first.to(tl.int64), (end - first).to(tl.int32)


@triton.jit(do_not_specialize=["tokens", "blocks", "before", "after"])
def varlen_attention_kernel(
    q,
    k,
    v,
    out,
    logsumexp,
    starts_q,
    starts_k,
    groups,
    tokens,
    blocks,
    before,
    after,
    scale,
    stride_qh,
    stride_qm,
    stride_kh,
    stride_kn,
    stride_vh,
    stride_vn,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SCALE_LATE: tl.constexpr,
    REACH: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_M queries of one head of one sequence, against all of its keys that one of them may attend to.

    before, after, REACH: as in `attention_kernel`. SUMS: write each row's logsumexp, too.
    """
    launch_dependents(PDL)
    rank, sequence = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    head = tl.program_id(1).to(tl.int64)
    wait_for_inputs(PDL)
    first_q, lq = _first_and_count(starts_q, sequence)
    first_k, lk = first_q, lq
    if starts_k is not None:
        first_k, lk = _first_and_count(starts_k, sequence)
    used = tl.cdiv(lq, BLOCK_M)
    if rank >= used:
        return
    row = (used - 1 - rank) * BLOCK_M  # last queries first: under causality they see the most keys
    key_head = head // groups
    q += first_q * stride_qm + head * stride_qh
    k += first_k * stride_kn + key_head * stride_kh
    v += first_k * stride_vn + key_head * stride_vh

    query = load_rows(q, row, lq, stride_qm, D, BLOCK_M, BLOCK_D, True, BLOCK_D == D)
    first, last = row + (lk - lq), tl.minimum(row + BLOCK_M, lq) - 1 + (lk - lq)  # positions of the queries
    if REACH != "all":
        start = tl.maximum(first - before, 0) // BLOCK_N * BLOCK_N
        stop = tl.minimum(last + after + 1, lk)
        full_start = tl.cdiv(tl.maximum(last - before, 0), BLOCK_N) * BLOCK_N
        full_stop = tl.maximum(tl.minimum(first + after + 1, lk), 0) // BLOCK_N * BLOCK_N
        full_stop = tl.maximum(full_stop, full_start)
        left_edges = tl.cdiv(tl.maximum(tl.minimum(full_start, stop) - start, 0), BLOCK_N)
        edges = left_edges + tl.cdiv(tl.maximum(stop - full_stop, 0), BLOCK_N)
    else:  # a bound for every key costs less than a second loop, where sequences are short
        start, full_start, full_stop, left_edges = 0, 0, 0, 0
        edges = tl.cdiv(lk, BLOCK_N)

    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    row_max = tl.full((BLOCK_M,), _LOWEST, tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    for EDGE in tl.static_range(1 if REACH == "all" else 0, 2):
        count = edges if EDGE else (full_stop - full_start) // BLOCK_N
        for i in range(0, count):
            block = block_of(i, EDGE, start, left_edges, full_start, full_stop, BLOCK_N)
            acc, row_max, row_sum = attend(
                acc, row_max, row_sum, query, k, v, q, None, 0, 0, 0, block, row, lq, lk, lk, before, after, scale,
                stride_kn, stride_vn, 0, 0, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, "", SCALE_LATE, REACH, EDGE,
                False,
            )  # fmt: skip
    nothing = row_sum == 0  # a query that reached no key gives zeros
    row_sum = tl.where(nothing, 1.0, row_sum)
    acc *= (1.0 / row_sum)[:, None]
    rows = row + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_DV)[None, :]
    pointers = out + ((first_q + rows[:, None]) * tl.num_programs(1) + head) * DV + columns
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=(rows < lq)[:, None] & (columns < DV))
    if SUMS:
        largest = row_max * _LN_2 if SCALE_LATE else row_max
        sums = tl.where(nothing, float("inf"), largest + tl.log(row_sum))
        tl.store(logsumexp + head * tokens + first_q + rows, sums, mask=rows < lq)


def varlen_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    is_causal: bool,
    window: int | None,
    scale: float | None,
    with_logsumexp: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The Op `varlen_attention`, and the logsumexp of each row (Hq, T), float32, where it is asked for.

    q (T, Hq, D), k (Tk, Hkv, D), v (Tk, Hkv, Dv), of float16, bfloat16 or float32; nothing empty, and head dimensions
    up to 256. Any strides; where the last one is not 1 the tensor is copied.
    """
    q, k, v = (t if t.stride(2) == 1 else t.contiguous() for t in (q, k, v))
    (tokens, heads, d), (_, key_heads, dv) = q.shape, v.shape
    if config is None:
        config = varlen_configs(q, v, cu_seqlens_q, max_seqlen_q)[0]
    out = torch.empty((tokens, heads, dv), dtype=q.dtype, device=q.device)
    logsumexp = torch.empty((heads, tokens), dtype=torch.float32, device=q.device) if with_logsumexp else None
    scale = d**-0.5 if scale is None else scale
    scale_late = scale > 0
    longest = tokens if max_seqlen_q is None else min(max_seqlen_q, tokens)
    blocks, sequences = triton.cdiv(longest, config["BLOCK_M"]), cu_seqlens_q.shape[0] - 1
    if blocks * sequences == 0:
        return out, logsumexp
    reach = _FAR if window is None else min(window - 1, _FAR)
    launch(
        varlen_attention_kernel,
        (blocks * sequences, heads),
        q,
        k,
        v,
        out,
        out if logsumexp is None else logsumexp,
        cu_seqlens_q,
        cu_seqlens_k,
        heads // key_heads,
        tokens,
        blocks,
        reach,
        0 if is_causal else reach,
        scale * math.log2(math.e) if scale_late else float(scale),
        q.stride(1),
        q.stride(0),
        k.stride(1),
        k.stride(0),
        v.stride(1),
        v.stride(0),
        config=config,
        like=q,
        registers=_registers(q, v),
        D=d,
        DV=dv,
        BLOCK_D=padded(d),
        BLOCK_DV=padded(dv),
        SCALE_LATE=scale_late,
        REACH="all" if not is_causal and window is None else "causal" if window is None else "window",
        SUMS=with_logsumexp,
    )
    return out, logsumexp


# BLOCK_M queries, BLOCK_N keys, warps and stages, by the width of a head: what compiles without spilling registers for
# sm_80 and sm_90 with every reach. Sequences are short as a rule: blocks that are large compute what nobody wants.
_HALF: dict[int, list[tuple[int, int, int, int]]] = {
    64: [(64, 64, 4, 2), (64, 32, 4, 2), (32, 64, 4, 2), (128, 64, 8, 2)],
    128: [(64, 32, 4, 2), (32, 32, 4, 2), (128, 32, 8, 2)],
    256: [(32, 32, 4, 2), (64, 32, 8, 2)],
}
_FLOAT32: dict[int, list[tuple[int, int, int, int]]] = {
    64: [(32, 32, 8, 1), (16, 32, 4, 1)],
    128: [(32, 32, 8, 1), (16, 32, 8, 1)],
    256: [(16, 32, 8, 1)],
}


def _registers(q: Tensor, v: Tensor) -> int | None:
    """The bound of a thread's registers. On Hopper ptxas, left alone, takes 80 where four programs to a multiprocessor
    may have 128, and asks for keys no sooner than it needs them: in a trial 8.1 us where it is 7.1."""
    narrow = max(padded(q.shape[2]), padded(v.shape[2])) <= 64
    return 128 if narrow and q.element_size() == 2 and target_of(q).capability[0] == 9 else None


def varlen_configs(q: Tensor, v: Tensor, cu_seqlens_q: Tensor, max_seqlen_q: int | None) -> list[Config]:
    """How `varlen_attention_forward` may be run on these inputs, the most promising first."""
    width = max(padded(q.shape[2]), padded(v.shape[2]))
    blocks = _of_width(_FLOAT32 if q.dtype == torch.float32 else _HALF, width)
    sequences = max(1, cu_seqlens_q.shape[0] - 1)
    few = q.shape[1] * -(-q.shape[0] // 64) < target_of(q).num_sms  # smaller blocks for more of the multiprocessors
    average = q.shape[0] / sequences
    if few or average <= 32:
        blocks = sorted(blocks, key=lambda b: b[0])
    longest = q.shape[0] if max_seqlen_q is None else max_seqlen_q
    found = [b for b in blocks if b[0] < 2 * max(longest, 16)] or [min(blocks)]
    return [Config.of(warps, stages, BLOCK_M=m, BLOCK_N=n) for m, n, warps, stages in found]


def _of_width(table: dict[int, list[Any]], width: int) -> list[Any]:
    return table[next(w for w in table if w >= width)]
