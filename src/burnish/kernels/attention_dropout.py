"""Which attention weights dropout keeps, as `burnish.ops._dropout` states it, for blocks of them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def kept_weights(seed, batch_head, row, start, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether each weight stays, of BLOCK_M queries from `row` on and BLOCK_N keys from `start` on, a multiple of four.

    One counter gives the words of four neighbouring keys. These are compared before they are put in their places, for
    which they go through shared memory: as bytes a quarter of it.
    """
    quads = start // 4 + tl.arange(0, BLOCK_N // 4)[None, :]
    rows = row + tl.arange(0, BLOCK_M)[:, None]
    w0, w1, w2, w3 = tl.philox(seed, quads, rows, batch_head, 0)
    w0, w1, w2, w3 = (
        _is_kept(w0, threshold),
        _is_kept(w1, threshold),
        _is_kept(w2, threshold),
        _is_kept(w3, threshold),
    )
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK_M, BLOCK_N)) != 0


@triton.jit
def _is_kept(word, threshold):
    return ((word >> 1).to(tl.int32) >= threshold).to(tl.int8)
