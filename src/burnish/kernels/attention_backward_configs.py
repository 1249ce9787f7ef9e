"""Which blocks attention's backward kernels may use, the most promising first."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from burnish.kernels.attention_configs import is_by_key, is_describable, padded
from burnish.kernels.attention_left_scores import can_be_left
from burnish.kernels.launch import Config, target_of

_Blocks = tuple[int, int, int, int, int]  # BLOCK_M queries, BLOCK_N keys, warps, stages, TMA


@dataclass(frozen=True)
class BackwardConfig:
    """Of one backward pass: the kernel that goes over queries, that which goes over keys, and that of the bias.

    Attributes:
        leaves_scores: the gradients of scores are left in memory for the kernel of the queries.
    """

    keys: Config
    queries: Config
    bias: Config
    leaves_scores: bool = False

    def __str__(self) -> str:
        return f"keys {self.keys}, queries {self.queries}{', left scores' if self.leaves_scores else ''}"


_Table = dict[int, list[_Blocks]]  # by the width of a head

# What compiles without spilling for sm_80, 90 and 100, by the most that its inputs may ask for. dk and dv take 128 of a
# thread's 255 registers at 128 keys of 128 columns, 8 warps; with 64 queries at a time 104 bytes spill there. A bias of
# all pairs and dropout each want a tile more (SHORT of registers). Where both meet, with padding, up to 32 bytes spill.
_KEYS: _Table = {
    64: [(64, 128, 8, 2, 1), (32, 64, 8, 2, 0), (32, 128, 8, 2, 1)],
    128: [(32, 128, 8, 2, 1), (32, 64, 8, 2, 0), (32, 128, 8, 3, 1)],
    256: [(32, 32, 8, 1, 0)],
}
_KEYS_SHORT: _Table = {64: [(32, 64, 8, 2, 0)], 128: [(32, 32, 4, 2, 0)], 256: [(32, 32, 8, 1, 0)]}
_KEYS_ELSEWHERE: _Table = {64: [(32, 32, 4, 2, 0)], 128: [(32, 32, 4, 2, 0)], 256: [(32, 32, 8, 1, 0)]}
_KEYS_FLOAT32: _Table = {32: [(16, 16, 8, 2, 0)], 64: [(16, 32, 8, 2, 0)], 128: [(16, 16, 8, 2, 0)]}
_QUERIES: _Table = {
    64: [(128, 64, 8, 2, 1), (64, 64, 4, 2, 0), (128, 128, 8, 2, 1)],
    128: [(128, 64, 8, 2, 1), (64, 32, 4, 2, 0), (64, 64, 8, 2, 1)],
    256: [(32, 32, 8, 1, 0)],
}
_QUERIES_SHORT: _Table = {64: [(64, 32, 4, 2, 0)], 128: [(64, 32, 8, 2, 0)], 256: [(32, 32, 8, 1, 0)]}
_QUERIES_FLOAT32: _Table = {128: [(32, 32, 8, 2, 0)]}
_LEFT: dict[int, list[tuple[int, int, int, int]]] = {
    64: [(128, 64, 8, 3), (128, 64, 4, 4), (64, 128, 4, 3)],
    128: [(128, 64, 8, 3)],
}
_BIAS: _Table = {64: [(32, 32, 4, 1, 0)], 128: [(32, 32, 4, 1, 0)], 256: [(32, 32, 8, 1, 0)]}


def backward_configs_for(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: bool = False, padded_keys: bool = False
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
    found = [BackwardConfig(_config(a or keys[0]), _config(b or queries[0]), of_bias) for a, b in pairs]
    plain = q.dtype != torch.float32 and bias is None and not padded_keys
    if tma and plain and width in _LEFT and is_describable(k) and can_be_left(q, k):
        found = [
            BackwardConfig(_config(a), _of_left(*b), of_bias, True) for a in keys for b in _LEFT[width] if a[4]
        ] + found
    return found


def _of_left(block_m: int, block_n: int, warps: int, stages: int) -> Config:
    return Config.of(warps, stages, BLOCK_M=block_m, BLOCK_N=block_n)


def _of_width(table: _Table, width: int) -> list[_Blocks]:
    return table[next(w for w in table if w >= width)]


def _config(blocks: _Blocks) -> Config:
    block_m, block_n, warps, stages, tma = blocks
    return Config.of(warps, stages, BLOCK_M=block_m, BLOCK_N=block_n, TMA=tma)
