"""Attention's backward pass in two kernels: no weights in memory, no atomics, the same bits at every run.

The first takes a block of queries and goes over its keys: the gradient of q. It also adds up delta, the sum over each
row of result times gradient, and leaves it. The second takes a block of keys and goes over the queries that see it:
gradients of k and v, of all heads of queries that share them, in a fixed order. Weights are computed twice, from the
logsumexp that forward left; in return no program waits for another of its kernel. A third kernel adds up the gradient
of a bias where one is wanted.

Source of the method: Dao, "FlashAttention-2", arXiv:2307.08691, section 3.1.2, there with atomic additions for q.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from burnish.kernels.attention_backward_blocks import (
    add_for_keys,
    aligned_rows,
    gradient_of_scores,
    load_block,
    load_by_query,
    prepared_sums,
)
from burnish.kernels.attention_backward_configs import BackwardConfig, backward_configs_for
from burnish.kernels.attention_bias_backward import bias_gradient
from burnish.kernels.attention_blocks import block_of, key_terms, load_rows
from burnish.kernels.attention_configs import padded
from burnish.kernels.attention_inputs import as_bytes, described, prepared_bias
from burnish.kernels.launch import launch, launch_dependents, wait_for_inputs
from burnish.kernels.matmul import dot
from burnish.ops._dropout import threshold_of

_FAR = 1 << 29  # more than any distance between positions, and small enough to be added to one in int32
_FEW = ["heads", "groups", "lq", "lk", "before", "after", "stride_pb", "threshold"]  # may be any number


@triton.jit(do_not_specialize=_FEW)
def attention_keys_backward_kernel(
    q,
    k,
    v,
    grad,
    sums,  # as the kernel of queries left them
    delta,
    dk,  # (B, Lk, Hkv, D)
    dv,
    bias,
    padding,
    seed,
    threshold,
    kept_scale,
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
    stride_gb,
    stride_gh,
    stride_gm,
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
    REACH: tl.constexpr,
    INSIDE: tl.constexpr,
    EDGES: tl.constexpr,
    DROPOUT: tl.constexpr,
    TMA: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_N keys and values of one head, against all queries that may attend to one of them.

    `before`, `after` and REACH are as in `attention_kernel`. Keys past the last, and those that padding hides, need no
    care until they are stored: what is added for one key does not touch another. Blocks of queries that reach all of
    the keys come first (INSIDE: there are such), then those at the edges (EDGES), the last one too if it is not whole.
    """
    launch_dependents(PDL)
    wait_for_inputs(PDL)
    blocks = tl.cdiv(lk, BLOCK_N)
    batch_head = tl.program_id(0) // blocks  # of keys; the blocks of one head run at about the same time
    start = tl.program_id(0) % blocks * BLOCK_N  # first keys first: under causality most queries see them
    key_heads = heads // groups
    batch = tl.cast(batch_head // key_heads, tl.int64)
    key_head = tl.cast(batch_head % key_heads, tl.int64)
    key = load_rows(
        k + batch * stride_kb + key_head * stride_kh, start, lk, stride_kn, D, BLOCK_N, BLOCK_D, True, BLOCK_D == D
    )
    value = load_rows(
        v + batch * stride_vb + key_head * stride_vh, start, lk, stride_vn, DV, BLOCK_N, BLOCK_DV, True, BLOCK_DV == DV
    )
    keys = start + tl.arange(0, BLOCK_N)
    shown = keys < lk
    if PADDING:
        shown = tl.load(padding + batch * stride_pb + tl.cast(keys, tl.int64) * stride_pn, mask=shown, other=0) != 0

    offset = lk - lq  # the position of the first query
    if REACH != "all":
        first = tl.maximum(start - after - offset, 0) // BLOCK_M * BLOCK_M
        stop = tl.minimum(tl.minimum(start + BLOCK_N, lk) + before - offset, lq)
        full_first = tl.cdiv(tl.maximum(start + BLOCK_N - 1 - after - offset, 0), BLOCK_M) * BLOCK_M
        full_stop = tl.maximum(tl.minimum(start + before - offset + 1, lq), 0) // BLOCK_M * BLOCK_M
        full_stop = tl.maximum(full_stop, full_first)
        left_edges = tl.cdiv(tl.maximum(tl.minimum(full_first, stop) - first, 0), BLOCK_M)
        edges = left_edges + tl.cdiv(tl.maximum(stop - full_stop, 0), BLOCK_M)
    else:
        first, full_first, left_edges = 0, 0, 0
        full_stop = lq // BLOCK_M * BLOCK_M
        edges = tl.cdiv(lq - full_stop, BLOCK_M)
    key_seed = None
    if DROPOUT:
        key_seed = tl.load(seed)
    members = groups
    if PADDING:
        members = tl.where(tl.max(shown.to(tl.int32), 0) == 0, 0, groups)  # nothing to do where all are hidden
    dk_sum = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv_sum = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    for member in range(0, members):
        head = key_head * groups + member
        place = batch * heads + head
        head_q, head_grad, head_sums, head_delta = q, grad, sums, delta
        if not TMA:
            head_q, head_grad = q + batch * stride_qb + head * stride_qh, grad + batch * stride_gb + head * stride_gh
        if TMA < 2:
            head_sums, head_delta = sums + place * aligned_rows(lq), delta + place * aligned_rows(lq)
        head_bias = bias + batch * stride_bb + head * stride_bh
        terms = None
        if BIAS == "added by key" or BIAS == "allowed by key":
            terms = key_terms(head_bias, padding, start, lk, stride_bn, stride_pn, BIAS, False, BLOCK_N)
        for EDGE in tl.static_range(2):
            if (EDGE and EDGES) or (not EDGE and INSIDE):
                count = edges if EDGE else (full_stop - full_first) // BLOCK_M
                for i in range(0, count):
                    row = block_of(i, EDGE, first, left_edges, full_first, full_stop, BLOCK_M)
                    dk_sum, dv_sum = add_for_keys(
                        dk_sum, dv_sum, key, value, head_q, head_grad, head_sums, head_delta,
                        head_bias, terms, tl.cast(batch, tl.int32), tl.cast(head, tl.int32), row, start, lq, lk, before,
                        after, scale, stride_qm, stride_gm, stride_bm, stride_bn, key_seed, tl.cast(place, tl.int32),
                        threshold, kept_scale, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, BIAS, REACH, EDGE, TMA,
                    )  # fmt: skip
    if PADDING:
        dk_sum, dv_sum = tl.where(shown[:, None], dk_sum, 0.0), tl.where(shown[:, None], dv_sum, 0.0)
    if DROPOUT:
        dv_sum *= kept_scale
    rows = ((batch * lk + keys) * (heads + 2 * key_heads if PACKED else key_heads) + key_head)[:, None]
    columns, value_columns = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_DV)[None, :]
    there = (keys < lk)[:, None]
    tl.store(dk + rows * D + columns, (dk_sum * scale).to(dk.dtype.element_ty), mask=there & (columns < D))
    tl.store(dv + rows * DV + value_columns, dv_sum.to(dv.dtype.element_ty), mask=there & (value_columns < DV))


@triton.jit(do_not_specialize=_FEW)
def attention_queries_backward_kernel(
    q,
    k,
    v,
    grad,
    out,  # (B, Lq, Hq, DV), contiguous
    logsumexp,  # (B, Hq, Lq)
    sums,  # (B, Hq, aligned_rows(Lq)), written
    delta,
    dq,  # (B, Lq, Hq, D)
    bias,
    padding,
    seed,
    threshold,
    kept_scale,
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
    stride_gb,
    stride_gh,
    stride_gm,
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
    REACH: tl.constexpr,
    INSIDE: tl.constexpr,
    EDGES: tl.constexpr,
    DROPOUT: tl.constexpr,
    TMA: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_M queries of one head, against all keys that one of them may attend to, in the order of
    `attention_kernel`. Leaves delta, and logsumexp as `prepared_sums` has it, for the kernels that come after."""
    launch_dependents(PDL)
    wait_for_inputs(PDL)
    blocks = tl.cdiv(lq, BLOCK_M)
    place = tl.cast(tl.program_id(0) // blocks, tl.int64)
    row = (
        blocks - 1 - tl.program_id(0) % blocks
    ) * BLOCK_M  # last queries first: under causality they see the most keys
    batch, head = place // heads, place % heads
    key_head = head // groups
    if not TMA:
        k += batch * stride_kb + key_head * stride_kh
        v += batch * stride_vb + key_head * stride_vh
    bias += batch * stride_bb + head * stride_bh
    padding += batch * stride_pb
    query = load_rows(
        q + batch * stride_qb + head * stride_qh, row, lq, stride_qm, D, BLOCK_M, BLOCK_D, True, BLOCK_D == D
    )
    gradient = load_rows(
        grad + batch * stride_gb + head * stride_gh, row, lq, stride_gm, DV, BLOCK_M, BLOCK_DV, True, BLOCK_DV == DV
    )
    results = load_rows(
        out + (batch * lq * heads + head) * DV, row, lq, tl.cast(heads, tl.int64) * DV, DV, BLOCK_M, BLOCK_DV, True,
        BLOCK_DV == DV,
    )  # fmt: skip
    less = tl.sum(results.to(tl.float32) * gradient.to(tl.float32), 1)
    by_query = load_by_query(logsumexp + place * lq, row, lq, float("inf"), BLOCK_M, True)
    by_query = prepared_sums(by_query, BIAS)
    rows = row + tl.arange(0, BLOCK_M)
    tl.store(delta + place * aligned_rows(lq) + rows, less, mask=rows < lq)
    tl.store(sums + place * aligned_rows(lq) + rows, by_query, mask=rows < lq)

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
    key_seed = None
    if DROPOUT:
        key_seed = tl.load(seed)
    KEYED: tl.constexpr = PADDING or BIAS == "added by key" or BIAS == "allowed by key"
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for EDGE in tl.static_range(2):
        if (EDGE and EDGES) or (not EDGE and INSIDE):
            count = edges if EDGE else (full_stop - full_start) // BLOCK_N
            for i in range(0, count):
                block = block_of(i, EDGE, start, left_edges, full_start, full_stop, BLOCK_N)
                terms = None
                if KEYED:
                    terms = key_terms(bias, padding, block, lk, stride_bn, stride_pn, BIAS, PADDING, BLOCK_N)
                key = load_block(
                    k, tl.cast(batch, tl.int32), tl.cast(key_head, tl.int32), block, lk, stride_kn, D, BLOCK_N, BLOCK_D,
                    EDGE, TMA,
                )  # fmt: skip
                value = load_block(
                    v, tl.cast(batch, tl.int32), tl.cast(key_head, tl.int32), block, lk, stride_vn, DV, BLOCK_N,
                    BLOCK_DV, EDGE, TMA,
                )  # fmt: skip
                dscores = gradient_of_scores(
                    query, gradient, key, value, by_query, less, bias, terms, row, block, lq, lk, before, after, scale,
                    stride_bm, stride_bn, key_seed, tl.cast(place, tl.int32), threshold, kept_scale, BLOCK_M, BLOCK_N,
                    BIAS, REACH, EDGE,
                )  # fmt: skip
                acc = dot(dscores.to(key.dtype), key, acc)
    rows = rows[:, None]
    columns = tl.arange(0, BLOCK_D)[None, :]
    pointers = dq + ((batch * lq + rows) * (heads + 2 * (heads // groups) if PACKED else heads) + head) * D + columns
    tl.store(pointers, (acc * scale).to(dq.dtype.element_ty), mask=(rows < lq) & (columns < D))


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    window: int | None,
    scale: float | None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    bias_grad: bool = False,
    config: BackwardConfig | None = None,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and, if it is wanted, of bias; arguments as of the Op `attention_backward`.

    Of float16, bfloat16 or float32; nothing empty, and head dimensions up to 256 (float32: 128). Any strides; where the
    last one is not 1 the tensor is copied. Results are stored heads last: (B, L, H, D).
    With `packed`, contiguous of shape (B, L, Hq + 2 * Hkv, D), those of q, k and v are written side by side into that,
    and are views of it; lengths and head dimensions must then be the same.
    """
    q, k, v, grad = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v, grad))
    out = out.transpose(1, 2).contiguous()
    logsumexp = logsumexp.contiguous()
    (batch, heads, lq, d), (_, key_heads, lk, dv) = q.shape, v.shape
    config = config or backward_configs_for(grad, q, k, v, bias, dropout_p > 0)[0]
    kind, prepared, bias_strides = prepared_bias(bias, q, (batch, heads, lq, lk))
    padding, padding_strides = q, [0, 0]
    if key_padding_mask is not None:
        padding, padding_strides = as_bytes(key_padding_mask), [*key_padding_mask.stride()]
    scale = float(d**-0.5 if scale is None else scale)
    near = is_causal or window is not None
    reach = _FAR if window is None else min(window - 1, _FAR)
    masks = (prepared, padding, q if seed is None else seed, threshold_of(dropout_p), 1 / (1 - dropout_p))
    sizes = (heads, heads // key_heads, lq, lk, reach, 0 if is_causal else reach, scale)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3], *bias_strides, *padding_strides)
    widths = padded(d), padded(dv)
    constants: dict[str, Any] = {
        "D": d, "DV": dv, "BLOCK_D": widths[0], "BLOCK_DV": widths[1], "BIAS": kind,
        "PADDING": key_padding_mask is not None, "DROPOUT": dropout_p > 0,
        "REACH": "all" if not near else "causal" if window is None else "window",
    }  # fmt: skip
    if packed is None:
        shapes = (batch, lq, heads, d), (batch, lk, key_heads, d), (batch, lk, key_heads, dv)
        dq, dk, dvalues = (torch.empty(shape, dtype=q.dtype, device=q.device) for shape in shapes)
    else:
        dq, dk, dvalues = packed.split([heads, key_heads, key_heads], dim=2)

    aligned = triton.cdiv(lq, 4) * 4  # as in `aligned_rows`
    sums, delta = (torch.empty((batch, heads, aligned), dtype=torch.float32, device=q.device) for _ in range(2))
    keys, queries = config.keys, config.queries
    rows = queries["BLOCK_N"]
    tma = queries["TMA"]
    launch(
        attention_queries_backward_kernel, (batch * heads * triton.cdiv(lq, queries["BLOCK_M"]),),
        q, described(k, rows, widths[0]) if tma else k, described(v, rows, widths[1]) if tma else v, grad,
        out, logsumexp, sums, delta, dq, *masks, *sizes, *strides,
        config=queries, like=q, INSIDE=lk >= rows, EDGES=near or lk % rows != 0, PACKED=packed is not None, **constants,
    )  # fmt: skip
    rows = keys["BLOCK_M"]
    tma = keys["TMA"]
    of_queries = (sums, delta)
    if tma == 2:
        of_queries = tuple(TensorDescriptor(t, [batch * heads, lq], [aligned, 1], [1, rows]) for t in of_queries)
    launch(
        attention_keys_backward_kernel, (batch * key_heads * triton.cdiv(lk, keys["BLOCK_N"]),),
        described(q, rows, widths[0]) if tma else q, k, v, described(grad, rows, widths[1]) if tma else grad,
        *of_queries, dk, dvalues, *masks, *sizes, *strides,
        config=keys, like=q, INSIDE=lq >= rows, EDGES=near or lq % rows != 0, PACKED=packed is not None, **constants,
    )  # fmt: skip
    dbias = None
    if bias_grad and bias is not None:
        dbias = bias_gradient((q, k, v, grad, sums, delta), masks, sizes, strides, bias, constants, config.bias)
    return dq.transpose(1, 2), dk.transpose(1, 2), dvalues.transpose(1, 2), dbias
