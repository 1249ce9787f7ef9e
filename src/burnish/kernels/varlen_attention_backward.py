"""Attention backward within packed sequences: the weights are computed again, from the logsumexp of each row.

Three kernels: the products of gradient and result by row; dk and dv by blocks of keys, over the queries that see them;
dq by blocks of queries, over their keys. Nothing is added up by two programs, so every run gives the same bits.
Source of the method: Dao, "FlashAttention-2", arXiv:2307.08691, algorithm 2, with dq in a pass of its own instead of
atomics.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from burnish.kernels.attention_blocks import load_rows
from burnish.kernels.attention_configs import padded
from burnish.kernels.launch import Config, launch, launch_dependents, wait_for_inputs
from burnish.kernels.matmul import dot

_FAR = 1 << 29
_LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _span(sequence, starts):
    """Where a sequence starts, and how long it is."""
    first = tl.load(starts + sequence).to(tl.int64)
    return first, (tl.load(starts + sequence + 1).to(tl.int64) - first).to(tl.int32)


@triton.jit(do_not_specialize=["heads", "tokens"])
def row_products_kernel(
    grad, out, of_sums, products, heads, tokens, stride_gm, stride_gh, stride_om, stride_oh, DV: tl.constexpr,
    BLOCK_DV: tl.constexpr, WITH_SUMS: tl.constexpr, BLOCK_M: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """(heads, tokens): the sum of grad * out over each row of each head, less the gradient of its logsumexp."""
    launch_dependents(PDL)
    wait_for_inputs(PDL)
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_M
    g = load_rows(grad + head * stride_gh, row, tokens, stride_gm, DV, BLOCK_M, BLOCK_DV, True, BLOCK_DV == DV)
    o = load_rows(out + head * stride_oh, row, tokens, stride_om, DV, BLOCK_M, BLOCK_DV, True, BLOCK_DV == DV)
    rows = row + tl.arange(0, BLOCK_M)
    sums = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    if WITH_SUMS:
        sums -= tl.load(of_sums + head * tokens + rows, mask=rows < tokens, other=0.0)
    tl.store(products + head * tokens + rows, sums, mask=rows < tokens)


@triton.jit
def _weights(
    query, key, sums, rows, keys, lq, lk, before, after, scale, REACH: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The softmax of a block of scores; 0 where a query may not attend."""
    scores = dot(query, tl.trans(key), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
    weights = tl.exp2(scores * (scale * _LOG2_E) - (sums * _LOG2_E)[:, None])
    allowed = (rows < lq)[:, None] & (keys < lk)[None, :]
    if REACH != "all":
        distance = rows[:, None] + (lk - lq) - keys[None, :]
        allowed &= (distance <= before) & (distance >= -after)
    return tl.where(allowed, weights, 0.0)


@triton.jit(do_not_specialize=["heads", "key_heads", "tokens", "blocks", "before", "after"])
def varlen_dk_dv_kernel(
    q,
    k,
    v,
    grad,
    logsumexp,
    products,
    dk,
    dv,
    starts_q,
    starts_k,
    heads,
    key_heads,
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
    stride_gh,
    stride_gm,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    REACH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_N keys of one key head of one sequence, over the queries of its group that may attend to one of them."""
    launch_dependents(PDL)
    wait_for_inputs(PDL)
    program = tl.program_id(0)
    key_head = tl.cast(program // blocks % key_heads, tl.int64)
    sequence = program // blocks // key_heads
    first_q, lq = _span(sequence, starts_q)
    first_k, lk = _span(sequence, starts_k)
    column = program % blocks * BLOCK_N
    if column >= lk:
        return
    groups = heads // key_heads
    keys = column + tl.arange(0, BLOCK_N)
    key = load_rows(
        k + first_k * stride_kn + key_head * stride_kh, column, lk, stride_kn, D, BLOCK_N, BLOCK_D, True, BLOCK_D == D
    )
    value = load_rows(
        v + first_k * stride_vn + key_head * stride_vh, column, lk, stride_vn, DV, BLOCK_N, BLOCK_DV, True,
        BLOCK_DV == DV,
    )  # fmt: skip
    of_key = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    of_value = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    start, stop = 0, lq
    if REACH != "all":
        # A query at position p sees the keys from p - before to p + after.
        start = tl.maximum(column - after - (lk - lq), 0) // BLOCK_M * BLOCK_M
        stop = tl.minimum(tl.minimum(column + BLOCK_N, lk) - 1 + before + 1 - (lk - lq), lq)
    for member in range(0, groups):
        head = key_head * groups + member
        for row in range(start, stop, BLOCK_M):
            rows = row + tl.arange(0, BLOCK_M)
            base = head * tokens + first_q + rows
            sums = tl.load(logsumexp + base, mask=rows < lq, other=0.0)
            mean = tl.load(products + base, mask=rows < lq, other=0.0)
            query = load_rows(
                q + first_q * stride_qm + head * stride_qh, row, lq, stride_qm, D, BLOCK_M, BLOCK_D, True, BLOCK_D == D
            )
            g = load_rows(
                grad + first_q * stride_gm + head * stride_gh, row, lq, stride_gm, DV, BLOCK_M, BLOCK_DV, True,
                BLOCK_DV == DV,
            )  # fmt: skip
            weights = _weights(query, key, sums, rows, keys, lq, lk, before, after, scale, REACH, BLOCK_M, BLOCK_N)
            of_value = dot(tl.trans(weights.to(g.dtype)), g, of_value)
            of_weights = dot(g, tl.trans(value), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
            of_scores = weights * (of_weights - mean[:, None])
            of_key = dot(tl.trans(of_scores.to(query.dtype)), query, of_key)
    columns = tl.arange(0, BLOCK_D)[None, :]
    place = (first_k + keys)[:, None] * key_heads + key_head
    inside = (keys < lk)[:, None]
    tl.store(dk + place * D + columns, (of_key * scale).to(dk.dtype.element_ty), mask=inside & (columns < D))
    columns = tl.arange(0, BLOCK_DV)[None, :]
    tl.store(dv + place * DV + columns, of_value.to(dv.dtype.element_ty), mask=inside & (columns < DV))


@triton.jit(do_not_specialize=["heads", "groups", "tokens", "blocks", "before", "after"])
def varlen_dq_kernel(
    q,
    k,
    v,
    grad,
    logsumexp,
    products,
    dq,
    starts_q,
    starts_k,
    heads,
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
    stride_gh,
    stride_gm,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    REACH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_M queries of one head of one sequence, over the keys that one of them may attend to."""
    launch_dependents(PDL)
    wait_for_inputs(PDL)
    program = tl.program_id(0)
    head = tl.cast(program // blocks % heads, tl.int64)
    sequence = program // blocks // heads
    first_q, lq = _span(sequence, starts_q)
    first_k, lk = _span(sequence, starts_k)
    row = program % blocks * BLOCK_M
    if row >= lq:
        return
    rows = row + tl.arange(0, BLOCK_M)
    q += first_q * stride_qm + head * stride_qh
    grad += first_q * stride_gm + head * stride_gh
    k += first_k * stride_kn + head // groups * stride_kh
    v += first_k * stride_vn + head // groups * stride_vh
    query = load_rows(q, row, lq, stride_qm, D, BLOCK_M, BLOCK_D, True, BLOCK_D == D)
    g = load_rows(grad, row, lq, stride_gm, DV, BLOCK_M, BLOCK_DV, True, BLOCK_DV == DV)
    base = head * tokens + first_q + rows
    sums = tl.load(logsumexp + base, mask=rows < lq, other=0.0)
    mean = tl.load(products + base, mask=rows < lq, other=0.0)
    start, stop = 0, lk
    if REACH != "all":
        start = tl.maximum(row + (lk - lq) - before, 0) // BLOCK_N * BLOCK_N
        stop = tl.minimum(tl.minimum(row + BLOCK_M, lq) + (lk - lq) + after, lk)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for column in range(start, stop, BLOCK_N):
        keys = column + tl.arange(0, BLOCK_N)
        key = load_rows(k, column, lk, stride_kn, D, BLOCK_N, BLOCK_D, True, BLOCK_D == D)
        value = load_rows(v, column, lk, stride_vn, DV, BLOCK_N, BLOCK_DV, True, BLOCK_DV == DV)
        weights = _weights(query, key, sums, rows, keys, lq, lk, before, after, scale, REACH, BLOCK_M, BLOCK_N)
        of_weights = dot(g, tl.trans(value), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
        of_scores = weights * (of_weights - mean[:, None])
        acc = dot(of_scores.to(key.dtype), key, acc)
    columns = tl.arange(0, BLOCK_D)[None, :]
    pointers = dq + ((first_q + rows)[:, None] * heads + head) * D + columns
    tl.store(pointers, (acc * scale).to(dq.dtype.element_ty), mask=(rows < lq)[:, None] & (columns < D))


def varlen_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    is_causal: bool,
    window: int | None,
    scale: float | None,
    grad_logsumexp: Tensor | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, as of the Op `varlen_attention_backward`: float16, bfloat16 or float32, heads up to 256 wide."""
    grad, q, k, v, out = (t if t.stride(2) == 1 else t.contiguous() for t in (grad, q, k, v, out))
    (tokens, heads, d), (keys, key_heads, dv_width) = q.shape, v.shape
    if config is None:
        config = varlen_backward_configs(q, v)[0]
    products = torch.empty((heads, tokens), dtype=torch.float32, device=q.device)
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    starts_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    sequences = cu_seqlens_q.shape[0] - 1
    if cu_seqlens_k is None and max_seqlen_k is None:
        max_seqlen_k = max_seqlen_q
    blocks_q = triton.cdiv(tokens if max_seqlen_q is None else min(max_seqlen_q, tokens), config["BLOCK_M"])
    blocks_k = triton.cdiv(keys if max_seqlen_k is None else min(max_seqlen_k, keys), config["BLOCK_N"])
    reach = _FAR if window is None else min(window - 1, _FAR)
    widths = {"DV": dv_width, "BLOCK_DV": padded(dv_width)}
    launch(
        row_products_kernel,
        (triton.cdiv(tokens, 32), heads),
        grad,
        out,
        products if grad_logsumexp is None else grad_logsumexp.contiguous(),
        products,
        heads,
        tokens,
        grad.stride(0),
        grad.stride(1),
        out.stride(0),
        out.stride(1),
        config=Config.of(4, 1, BLOCK_M=32),
        like=q,
        WITH_SUMS=grad_logsumexp is not None,
        **widths,
    )
    inputs = q, k, v, grad, logsumexp.contiguous(), products
    limits = reach, 0 if is_causal else reach, float(d**-0.5 if scale is None else scale)
    strides = [stride for t in (q, k, v, grad) for stride in (t.stride(1), t.stride(0))]
    constants: dict[str, Any] = {
        "D": d,
        "BLOCK_D": padded(d),
        **widths,
        "REACH": "all" if not is_causal and window is None else "near",
    }
    if blocks_k * sequences:
        launch(
            varlen_dk_dv_kernel, (blocks_k * key_heads * sequences,), *inputs, dk, dv, cu_seqlens_q, starts_k, heads,
            key_heads, tokens, blocks_k, *limits, *strides, config=config, like=q, **constants,
        )  # fmt: skip
    if blocks_q * sequences:
        launch(
            varlen_dq_kernel, (blocks_q * heads * sequences,), *inputs, dq, cu_seqlens_q, starts_k, heads,
            heads // key_heads, tokens, blocks_q, *limits, *strides, config=config, like=q, **constants,
        )  # fmt: skip
    return dq, dk, dv


# BLOCK_M queries, BLOCK_N keys, warps and stages, by the width of a head: what compiles without spilling registers for
# sm_90 (64 x 64 with 4 warps spills 56 bytes with windows, 32 x 64 of 128 columns 8).
_HALF = {64: [(64, 64, 8, 2), (32, 32, 4, 2)], 128: [(32, 32, 4, 2)], 256: [(32, 32, 8, 1)]}
_FLOAT32 = {64: [(32, 32, 8, 1)], 128: [(16, 16, 8, 1)], 256: [(16, 16, 8, 1)]}


def varlen_backward_configs(q: Tensor, v: Tensor) -> list[Config]:
    """How `varlen_attention_backward` may be run on these inputs, the most promising first."""
    width = max(padded(q.shape[2]), padded(v.shape[2]))
    table = _FLOAT32 if q.dtype == torch.float32 else _HALF
    blocks = table[next(w for w in table if w >= width)]
    return [Config.of(warps, stages, BLOCK_M=m, BLOCK_N=n) for m, n, warps, stages in blocks]
