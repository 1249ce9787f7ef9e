"""The gradient of attention's bias: that of the scores, summed where the bias was the same for several of them."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from burnish.kernels.attention_backward_blocks import aligned_rows, gradient_of_scores, load_by_query
from burnish.kernels.attention_blocks import key_terms, load_rows
from burnish.kernels.launch import Config, launch, launch_dependents, wait_for_inputs


@triton.jit(do_not_specialize=["heads", "groups", "lq", "lk", "before", "after", "stride_pb", "threshold", "batches"])
def attention_bias_backward_kernel(
    q,
    k,
    v,
    grad,
    sums,  # as the kernel of queries left them
    delta,
    dbias,  # (B or 1, Hq or 1, Lq or blocks of queries, Lk or blocks of keys) float32
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
    batches,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BIAS: tl.constexpr,
    PADDING: tl.constexpr,
    REACH: tl.constexpr,
    DROPOUT: tl.constexpr,
    EACH_BATCH: tl.constexpr,
    EACH_HEAD: tl.constexpr,
    EACH_QUERY: tl.constexpr,
    EACH_KEY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """A block of the bias, against all batch entries and heads that it was added to, one after the other."""
    launch_dependents(PDL)
    wait_for_inputs(PDL)
    row_blocks, key_blocks = tl.cdiv(lq, BLOCK_M), tl.cdiv(lk, BLOCK_N)
    program = tl.program_id(0)
    row = program % row_blocks * BLOCK_M
    start = program // row_blocks % key_blocks * BLOCK_N
    of_bias = program // (row_blocks * key_blocks)
    first_batch, last_batch, first_head, last_head = of_bias, of_bias + 1, of_bias * 0, heads
    if EACH_HEAD:
        first_batch, last_batch = of_bias // heads, of_bias // heads + 1
        first_head, last_head = of_bias % heads, of_bias % heads + 1
    if not EACH_BATCH:
        first_batch, last_batch = of_bias * 0, batches
    if REACH != "all":  # nothing to add up where no query of the block reaches a key of it
        last = tl.minimum(row + BLOCK_M, lq) - 1 + (lk - lq)
        beyond = (start > last + after) | (start + BLOCK_N <= row + (lk - lq) - before)
        last_batch = tl.where(beyond, first_batch, last_batch)
    key_seed = None
    if DROPOUT:
        key_seed = tl.load(seed)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for batch_index in range(first_batch, last_batch):
        for head_index in range(first_head, last_head):
            batch, head = tl.cast(batch_index, tl.int64), tl.cast(head_index, tl.int64)
            key_head, place = head // groups, batch * heads + head
            query = load_rows(
                q + batch * stride_qb + head * stride_qh, row, lq, stride_qm, D, BLOCK_M, BLOCK_D, True, BLOCK_D == D
            )
            gradient = load_rows(
                grad + batch * stride_gb + head * stride_gh,
                row, lq, stride_gm, DV, BLOCK_M, BLOCK_DV, True, BLOCK_DV == DV,
            )  # fmt: skip
            key = load_rows(
                k + batch * stride_kb + key_head * stride_kh,
                start, lk, stride_kn, D, BLOCK_N, BLOCK_D, True, BLOCK_D == D,
            )  # fmt: skip
            value = load_rows(
                v + batch * stride_vb + key_head * stride_vh,
                start, lk, stride_vn, DV, BLOCK_N, BLOCK_DV, True, BLOCK_DV == DV,
            )  # fmt: skip
            by_query = load_by_query(sums + place * aligned_rows(lq), row, lq, float("inf"), BLOCK_M, True)
            less = load_by_query(delta + place * aligned_rows(lq), row, lq, 0.0, BLOCK_M, True)
            head_bias = bias + batch * stride_bb + head * stride_bh
            terms = None
            if PADDING or BIAS == "added by key":
                terms = key_terms(
                    head_bias, padding + batch * stride_pb, start, lk, stride_bn, stride_pn, BIAS, PADDING, BLOCK_N
                )
            acc += gradient_of_scores(
                query, gradient, key, value, by_query, less, head_bias, terms, row, start, lq, lk, before, after, scale,
                stride_bm, stride_bn, key_seed, tl.cast(place, tl.int32), threshold, kept_scale, BLOCK_M, BLOCK_N, BIAS,
                REACH, True,
            )  # fmt: skip
    rows, keys = row + tl.arange(0, BLOCK_M), start + tl.arange(0, BLOCK_N)
    many = lq if EACH_QUERY else row_blocks
    wide = lk if EACH_KEY else key_blocks
    dbias += tl.cast(of_bias, tl.int64) * many * wide
    if EACH_QUERY and EACH_KEY:
        there = (rows < lq)[:, None] & (keys < lk)[None, :]
        tl.store(dbias + tl.cast(rows, tl.int64)[:, None] * wide + keys[None, :], acc, mask=there)
    elif EACH_QUERY:
        tl.store(dbias + tl.cast(rows, tl.int64) * wide + start // BLOCK_N, tl.sum(acc, 1), mask=rows < lq)
    elif EACH_KEY:
        tl.store(dbias + tl.cast(row // BLOCK_M, tl.int64) * wide + keys, tl.sum(acc, 0), mask=keys < lk)
    else:
        tl.store(dbias + tl.cast(row // BLOCK_M, tl.int64) * wide + start // BLOCK_N, tl.sum(tl.sum(acc, 1), 0))


def bias_gradient(
    tensors: tuple[Tensor, ...],
    masks: tuple[Any, ...],
    sizes: tuple[Any, ...],
    strides: tuple[int, ...],
    bias: Tensor,
    constants: dict[str, Any],
    config: Config,
) -> Tensor:
    """The gradient of an additive `bias`, of its shape and dtype; the other arguments are the kernel's."""
    q = tensors[0]
    heads, _, lq, lk = sizes[:4]
    shape = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    # Dimensions of one entry are counted as such: what is summed over nothing else needs no sum.
    each = [size == whole for size, whole in zip(shape, (q.shape[0], heads, lq, lk), strict=True)]
    blocks = triton.cdiv(lq, config["BLOCK_M"]), triton.cdiv(lk, config["BLOCK_N"])
    parts = (lq if each[2] else blocks[0], lk if each[3] else blocks[1])
    found = torch.empty((*shape[:2], *parts), dtype=torch.float32, device=q.device)
    launch(
        attention_bias_backward_kernel, (shape[0] * shape[1] * blocks[0] * blocks[1],),
        *tensors, found, *masks, *sizes, *strides, q.shape[0],
        config=config, like=q, EACH_BATCH=each[0], EACH_HEAD=each[1], EACH_QUERY=each[2], EACH_KEY=each[3], **constants,
    )  # fmt: skip
    for dim in (2, 3):
        if not each[dim]:
            found = found.sum(dim=dim, keepdim=True)
    return found.reshape(bias.shape).to(bias.dtype)
