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

from burnish.kernels.attention_blocks import attend, block_of, key_terms, load_rows, shown_keys
from burnish.kernels.attention_configs import configs_for, padded
from burnish.kernels.attention_inputs import as_bytes, described, prepared_bias
from burnish.kernels.launch import Config, cdiv, launch, launch_dependents, target_of, wait_for_inputs
from burnish.ops._dropout import threshold_of

# With more keys it pays to read the padding mask once beforehand. H200: 1x12x384x64 7.5 -> 6.3 us, but 32x12x128x64
# 9.4 -> 11.6.
_SCANNED = 256
_FAR = 1 << 29  # more than any distance between positions, and small enough to be added to one in int32
# Where the running maximum starts: the lowest float32, not -inf, so that a row that is masked so far needs no care:
# exp2(-inf - lowest) is 0 where exp2(-inf - -inf) is NaN. A bias may itself be that low without becoming -inf.
_LN_2 = tl.constexpr(math.log(2))
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit(do_not_specialize=["heads", "groups", "lq", "lk", "before", "after", "stride_pb", "threshold"])
def attention_kernel(
    q,
    k,
    v,
    out,
    bias,
    padding,
    logsumexp,
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
    SCAN: tl.constexpr,
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
    LOGSUMEXP: tl.constexpr = False,
    DROPOUT: tl.constexpr = False,
):
    """BLOCK_M queries of one head, against all keys that one of them may attend to.

    A key at most `before` positions before the query and at most `after` behind it is in reach. REACH: "all" are,
    "causal" if only `after` sets a bound, else "window".
    With PARTS > 1 a program computes BLOCK_DV columns of the result only, and others the same weights for the rest: a
    head of 512 columns is more than the registers of a block hold.
    With SCAN the padding mask is read once beforehand: if it only cuts off the end, its keys need no look one by one.
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

    query = load_rows(q, row, lq, stride_qm, D, BLOCK_M, BLOCK_D, True, BLOCK_D == D)
    limit, holes = lk, False
    if SCAN:
        limit, holes = shown_keys(padding, lk, stride_pn)
    first, last = row + (lk - lq), tl.minimum(row + BLOCK_M, lq) - 1 + (lk - lq)  # positions of the queries
    if REACH != "all":
        start = tl.maximum(first - before, 0) // BLOCK_N * BLOCK_N
        stop = tl.minimum(last + after + 1, limit)
        full_start = tl.cdiv(tl.maximum(last - before, 0), BLOCK_N) * BLOCK_N
        full_stop = tl.maximum(tl.minimum(first + after + 1, limit), 0) // BLOCK_N * BLOCK_N
        full_stop = tl.maximum(full_stop, full_start)
        left_edges = tl.cdiv(tl.maximum(tl.minimum(full_start, stop) - start, 0), BLOCK_N)
        edges = left_edges + tl.cdiv(tl.maximum(stop - full_stop, 0), BLOCK_N)
    else:
        start, full_start, left_edges = 0, 0, 0
        full_stop = limit // BLOCK_N * BLOCK_N
        edges = tl.cdiv(limit - full_stop, BLOCK_N)

    key_seed = None
    if DROPOUT:
        key_seed = tl.load(seed)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    row_max = tl.full((BLOCK_M,), _LOWEST, tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    for HOLES in tl.static_range(2 if SCAN else 1):
        if not SCAN or holes == (HOLES == 1):
            MASKED: tl.constexpr = PADDING and (HOLES == 1 or not SCAN)
            KEYED: tl.constexpr = MASKED or BIAS == "added by key" or BIAS == "allowed by key"
            for EDGE in tl.static_range(2):
                if (EDGE and EDGES) or (not EDGE and INSIDE):
                    count = edges if EDGE else (full_stop - full_start) // BLOCK_N
                    block = block_of(0, EDGE, start, left_edges, full_start, full_stop, BLOCK_N)
                    terms = None
                    if KEYED:
                        terms = key_terms(bias, padding, block, lk, stride_bn, stride_pn, BIAS, MASKED, BLOCK_N)
                    for i in range(0, count):
                        following = block_of(i + 1, EDGE, start, left_edges, full_start, full_stop, BLOCK_N)
                        if KEYED:  # asked for a block ahead: nothing else hides the time that they take to come
                            next_terms = key_terms(
                                bias, padding, following, lk, stride_bn, stride_pn, BIAS, MASKED, BLOCK_N
                            )
                        acc, row_max, row_sum = attend(
                            acc, row_max, row_sum, query, k, v, bias, terms, tl.cast(batch, tl.int32),
                            tl.cast(key_head, tl.int32), part, block, row, lq, lk, limit, before, after, scale,
                            stride_kn, stride_vn, stride_bm, stride_bn, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N,
                            BIAS, SCALE_LATE, REACH, EDGE, TMA, key_seed, tl.cast(batch_head, tl.int32), threshold,
                        )  # fmt: skip
                        block = following
                        if KEYED:
                            terms = next_terms
    # A query that reached no key has a sum of zero and gives zeros.
    acc *= ((kept_scale if DROPOUT else 1.0) / tl.where(row_sum == 0, 1.0, row_sum))[:, None]
    rows = row + tl.arange(0, BLOCK_M)[:, None]
    columns = part + tl.arange(0, BLOCK_DV)[None, :]
    pointers = out + ((batch * lq + rows) * heads + head) * DV + columns
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=(rows < lq) & (columns < DV))
    if LOGSUMEXP:
        # The maximum is in units of log2 where the scale was multiplied in late, and in natural ones else.
        found = row_max * _LN_2 if SCALE_LATE else row_max
        found = tl.where(row_sum == 0, float("inf"), found + tl.log2(tl.where(row_sum == 0, 1.0, row_sum)) * _LN_2)
        places = row + tl.arange(0, BLOCK_M)
        tl.store(
            logsumexp + tl.cast(batch_head, tl.int64) * lq + places, found, mask=places < tl.where(part == 0, lq, 0)
        )


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    window: int | None,
    scale: float | None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    training: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`softmax(q @ k.T * scale + bias, over the keys allowed) @ v`, arguments as of the Op `attention`; in training the
    logsumexp too, as of the Op `attention_with_logsumexp`.

    q (B, Hq, Lq, D), k (B, Hkv, Lk, D), v (B, Hkv, Lk, Dv), of float16, bfloat16 or float32; nothing empty, and head
    dimensions up to 512 (float32: 256). Any strides; where the last one is not 1 the tensor is copied. The result is
    (B, Hq, Lq, Dv), stored as (B, Lq, Hq, Dv).
    """
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    (batch, heads, lq, d), (_, key_heads, lk, dv) = q.shape, v.shape
    if config is None:
        config = configs_for(q, k, v, bias, key_padding_mask, training, dropout_p > 0)[0]
    logsumexp = torch.empty((batch, heads, lq), dtype=torch.float32, device=q.device) if training else None
    out = torch.empty((batch, lq, heads, dv), dtype=q.dtype, device=q.device)
    scale = d**-0.5 if scale is None else scale
    kind, bias, bias_strides = prepared_bias(bias, q, (batch, heads, lq, lk))
    padding, padding_strides = q, [0, 0]
    if key_padding_mask is not None:
        padding, padding_strides = as_bytes(key_padding_mask), [*key_padding_mask.stride()]
    scale_late = scale > 0 and "added" not in kind
    near = is_causal or window is not None
    scan = key_padding_mask is not None and lk > _SCANNED
    tma, parts = bool(config["TMA"]), dict(config.blocks).get("PARTS", 1)
    widths = padded(d), padded(dv) // parts
    blocks = cdiv(lq, config["BLOCK_M"])
    launch(
        attention_kernel,
        (blocks * batch * heads * parts,),
        q,
        described(k, config["BLOCK_N"], widths[0]) if tma else k,
        described(v, config["BLOCK_N"], widths[1]) if tma else v,
        out,
        bias,
        padding,
        out if logsumexp is None else logsumexp,
        out if seed is None else seed,
        threshold_of(dropout_p),
        1 / (1 - dropout_p),
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
        SCAN=scan,
        SCALE_LATE=scale_late,
        REACH="all" if not near else "causal" if window is None else "window",
        INSIDE=lk >= config["BLOCK_N"],
        EDGES=near or scan or lk % config["BLOCK_N"] != 0,
        SPREAD=is_causal and blocks * batch * heads <= 3 * target_of(q).num_sms,
        LOGSUMEXP=training,
        DROPOUT=dropout_p > 0,
    )
    return out.transpose(1, 2), logsumexp
