"""Which blocks attention's backward kernels may use, the most promising first."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from burnish.kernels.attention_configs import is_by_key, is_describable, padded
from burnish.kernels.launch import Config, target_of

_Blocks = tuple[int, int, int, int, int]  # BLOCK_M queries, BLOCK_N keys, warps, stages, TMA (0, 1 or 2)


@dataclass(frozen=True)
class BackwardConfig:
    """Of one backward pass: the kernel that goes over queries, that which goes over keys, and that of the bias."""

    keys: Config
    queries: Config
    bias: Config

    def __str__(self) -> str:
        return f"keys {self.keys}, queries {self.queries}"


_Table = dict[int, list[_Blocks]]  # by the width of a head

# With TMA 1 keys, values, queries and gradients come by descriptor, with 2 also the two numbers of each query: by
# pointers triton 3.6 has each thread copy all that it will need of them where there are fewer queries than threads (32
# copies a block, and 392 bytes on the stack with 64 x 64 in 3 stages; by descriptor 253 registers and none). That needs
# 32 queries or more: copies go to multiples of 128 bytes.
# Two programs of 4 warps on a multiprocessor, one multiplying while the other takes exponentials, are faster than one
# of 8, even where they spill: 12x12x1024x64, causal, on an H200 takes 314 us with dk and dv by 128 queries and 64 keys
# in 2 stages, 359 by 64 and 128 with 8 warps; and 281 with dq by 64 and 64, 359 by 128 and 64 with 8. With 2 stages the
# next block is asked for at the end of the one before it, so each waits for all of its way from the L2 cache; 3 hide
# that, and only 64 queries leave room for 3 twice.
# The others compile without spilling for sm_80, 90 and 100, by the most that their inputs may ask for. A bias of all
# pairs and dropout each want a tile more (SHORT of registers). Where both meet, with padding, up to 32 bytes spill.
_KEYS: _Table = {
    64: [
        (64, 64, 4, 3, 2),
        (128, 64, 4, 2, 1),
        (64, 128, 8, 3, 2),
        (32, 64, 8, 2, 0),
        (64, 64, 4, 4, 2),
        (32, 64, 4, 4, 2),
    ],
    128: [(32, 64, 4, 3, 2), (32, 64, 4, 2, 1), (32, 128, 8, 3, 2), (32, 64, 8, 2, 0), (64, 64, 8, 3, 2)],
    256: [(32, 32, 8, 1, 0)],
}
_KEYS_SHORT: _Table = {64: [(32, 64, 8, 2, 0)], 128: [(32, 32, 4, 2, 0)], 256: [(32, 32, 8, 1, 0)]}
_KEYS_ELSEWHERE: _Table = {64: [(32, 32, 4, 2, 0)], 128: [(32, 32, 4, 2, 0)], 256: [(32, 32, 8, 1, 0)]}
_KEYS_FLOAT32: _Table = {32: [(16, 16, 8, 2, 0)], 64: [(16, 32, 8, 2, 0)], 128: [(16, 16, 8, 2, 0)]}
_QUERIES: _Table = {
    64: [(64, 64, 4, 3, 1), (64, 64, 4, 2, 1), (64, 64, 4, 2, 0), (128, 64, 8, 2, 1)],
    128: [(64, 64, 4, 2, 1), (64, 64, 4, 3, 1), (64, 32, 4, 2, 0), (128, 64, 8, 2, 1)],
    256: [(32, 32, 8, 1, 0)],
}
_QUERIES_SHORT: _Table = {64: [(64, 32, 4, 2, 0)], 128: [(64, 32, 8, 2, 0)], 256: [(32, 32, 8, 1, 0)]}
_QUERIES_FLOAT32: _Table = {128: [(32, 32, 8, 2, 0)]}
_BIAS: _Table = {64: [(32, 32, 4, 1, 0)], 128: [(32, 32, 4, 1, 0)], 256: [(32, 32, 8, 1, 0)]}


def backward_configs_for(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: bool = False
) -> list[BackwardConfig]:
    """How `attention_backward` may be run on these inputs, the most promising first."""
    width = max(padded(q.shape[3]), padded(v.shape[3]))
    major = target_of(q).capability[0]
    tables = (_KEYS_ELSEWHERE if major >= 10 else _KEYS, _QUERIES)
    if q.dtype == torch.float32:
        tables = (_KEYS_FLOAT32, _QUERIES_FLOAT32)
    elif dropout or not is_by_key(bias):
        tables = (_KEYS_SHORT if major == 9 else _KEYS_ELSEWHERE, _QUERIES_SHORT)
    tma = target_of(q).tma
    keys, queries = (
        [b for b in _of_width(table, width) if not b[4] or (tma and all(map(is_describable, read)))]
        for table, read in zip(tables, ((q, grad), (k, v)), strict=True)
    )
    block_m, block_n, warps, stages, _ = _of_width(_BIAS, width)[0]
    of_bias = Config.of(warps, stages, BLOCK_M=block_m, BLOCK_N=block_n)
    pairs = itertools.zip_longest(keys, queries)
    return [BackwardConfig(_config(a or keys[0]), _config(b or queries[0]), of_bias) for a, b in pairs]


def _of_width(table: _Table, width: int) -> list[_Blocks]:
    return table[next(w for w in table if w >= width)]


def _config(blocks: _Blocks) -> Config:
    block_m, block_n, warps, stages, tma = blocks
    return Config.of(warps, stages, BLOCK_M=block_m, BLOCK_N=block_n, TMA=tma)
