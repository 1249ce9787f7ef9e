"""The gradient of q from gradients of scores that the kernel over keys left in memory.

They are written and read once, in half precision: for 12 x 12 heads of 1024 tokens under causality twice 151 MB, 72 us
of an H200, where computing them again takes two products of five and the weights' exponentials.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from burnish.kernels.attention_backward_blocks import load_block
from burnish.kernels.attention_blocks import block_of
from burnish.kernels.attention_inputs import described
from burnish.kernels.launch import Config, launch, launch_dependents, wait_for_inputs
from burnish.kernels.matmul import dot

_WHOLE = 128  # what is left is in whole blocks of any kernel: no bounds
MOST_BYTES = 1 << 30
"""Of gradients of scores: beside it stands what the backward pass has freed of a model's activations."""


def left_scores(q: Tensor, k: Tensor) -> Tensor:
    """Memory for them, (B, Hq, keys, queries), of q's dtype."""
    lq, lk = (-(-t.shape[2] // _WHOLE) * _WHOLE for t in (q, k))
    return q.new_empty(*q.shape[:2], lk, lq)


def can_be_left(q: Tensor, k: Tensor) -> bool:
    lq, lk = (-(-t.shape[2] // _WHOLE) * _WHOLE for t in (q, k))
    return q.shape[0] * q.shape[1] * lq * lk * q.element_size() <= MOST_BYTES


@triton.jit(do_not_specialize=["heads", "groups", "lq", "lk", "before", "after"])
def _kernel(
    left,  # a descriptor of (B, Hq, keys, queries), in whole blocks
    k,  # a descriptor of (B, Hkv, Lk, D)
    dq,  # (B, Lq, Hq, D)
    heads,
    groups,
    lq,
    lk,
    before,
    after,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REACH: tl.constexpr,
    INSIDE: tl.constexpr,
    EDGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_M queries of one head. What no key of theirs reaches was never written: at the edges it is masked."""
    launch_dependents(PDL)
    wait_for_inputs(PDL)
    blocks = tl.cdiv(lq, BLOCK_M)
    place = tl.program_id(0) // blocks
    row = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M  # last queries first, as elsewhere
    batch, head = place // heads, place % heads
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
    rows, keys = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for EDGE in tl.static_range(2):
        if (EDGE and EDGES) or (not EDGE and INSIDE):
            count = edges if EDGE else (full_stop - full_start) // BLOCK_N
            for i in range(0, count):
                block = block_of(i, EDGE, start, left_edges, full_start, full_stop, BLOCK_N)
                dscores = left.load([batch, head, block, row]).reshape(BLOCK_N, BLOCK_M)
                if EDGE:
                    seen = keys[:, None] < lk - block
                    if REACH != "all":
                        position = (rows + first - block)[None, :]
                        seen &= (keys[:, None] <= position + after) & (keys[:, None] >= position - before)
                    dscores = tl.where(seen, dscores, 0.0)
                key = load_block(k, batch, head // groups, block, lk, 0, D, BLOCK_N, BLOCK_D, EDGE, True)
                acc = dot(tl.trans(dscores), key, acc)
    at = (row + rows)[:, None]
    columns = tl.arange(0, BLOCK_D)[None, :]
    pointers = dq + ((tl.cast(batch, tl.int64) * lq + at) * heads + head) * D + columns
    tl.store(pointers, (acc * scale).to(dq.dtype.element_ty), mask=(at < lq) & (columns < D))


def queries_from_left_scores(
    left: Tensor, q: Tensor, k: Tensor, dq: Tensor, before: int, after: int, scale: float, reach: str, width: int,
    config: Config,
) -> None:  # fmt: skip
    """Writes dq, (B, Lq, Hq, D), for the gradients of scores in `left`; `reach` and its bounds as of the other
    kernels."""
    (batch, heads, lq, d), (_, key_heads, lk, _) = q.shape, k.shape
    block_m, block_n = config["BLOCK_M"], config["BLOCK_N"]
    launch(
        _kernel, (batch * heads * triton.cdiv(lq, block_m),), described(left, block_n, block_m),
        described(k, block_n, width), dq, heads, heads // key_heads, lq, lk, before, after, scale,
        config=config, like=q, D=d, BLOCK_D=width, REACH=reach, INSIDE=lk >= block_n,
        EDGES=reach != "all" or lk % block_n != 0,
    )  # fmt: skip
