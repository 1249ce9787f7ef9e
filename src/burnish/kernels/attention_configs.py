"""Which blocks the attention kernel may use for given sizes, the most promising first.

The tables hold what compiles without spilling registers; `tests/kernels/test_attention.py` compiles them.
"""

from __future__ import annotations

import torch

from burnish.kernels.launch import Config, Target

_Blocks = tuple[int, int, int, int]  # BLOCK_M queries, BLOCK_N keys, warps, stages

_SHARED_MEMORY = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}  # KiB of a block; else 99

# By the width of a head. Few blocks of queries leave multiprocessors idle: SHORT has blocks of few queries, for those.
_SHORT: dict[int, list[_Blocks]] = {
    64: [(16, 64, 4, 2), (32, 64, 4, 2), (64, 64, 4, 2), (16, 128, 4, 2), (64, 128, 4, 2)],
    128: [(16, 64, 4, 2), (32, 64, 4, 2), (64, 64, 4, 2)],
    256: [(16, 32, 4, 2), (32, 32, 4, 2)],
}
_LONG: dict[int, list[_Blocks]] = {
    32: [(64, 128, 4, 3), (128, 64, 4, 3), (128, 128, 8, 3), (64, 64, 4, 3), (128, 64, 8, 3)],
    64: [(128, 64, 4, 3), (64, 64, 4, 3), (128, 128, 8, 3), (128, 64, 8, 3), (64, 128, 4, 2)],
    128: [(128, 128, 8, 3), (128, 64, 8, 3), (64, 64, 4, 3)],
    256: [(128, 64, 8, 2), (64, 32, 4, 2), (128, 32, 8, 2)],
}
# A bias with an entry for each pair takes as many registers as the scores do.
_BIASED: dict[int, list[_Blocks]] = {
    64: [(64, 32, 4, 2), (128, 64, 8, 2), (32, 64, 4, 2), (128, 32, 8, 2)],
    128: [(64, 32, 4, 2), (128, 32, 8, 2), (32, 32, 4, 2)],
    256: [(32, 32, 4, 2), (16, 32, 4, 2)],
}
_FLOAT32: dict[int, list[_Blocks]] = {
    64: [(32, 32, 8, 1), (32, 32, 4, 1), (64, 32, 8, 1), (16, 32, 4, 1)],
    128: [(32, 32, 8, 1), (16, 32, 4, 2)],
    256: [(32, 32, 8, 1)],
}


def attention_configs(
    heads: int, lq: int, lk: int, width: int, dtype: torch.dtype, kind: str, tma: bool, target: Target
) -> list[Config]:
    """Configs for `heads` heads in all of lq queries and lk keys, `width` a head's padded dimension.

    `kind` is "plain", "row" (padding, or a bias for each key) or "tile" (a bias for each pair). With `tma` k and v may
    be read through descriptors: TMA=1.
    """
    few = heads * -(-lq // 64) < 2 * target.num_sms
    if dtype == torch.float32:
        table = _FLOAT32
    elif kind == "tile":
        table = _BIASED
    else:
        table = _SHORT if few or lq <= 16 else _LONG
    blocks = table[next(w for w in sorted(table) if w >= width)]
    # Larger blocks than there are queries and keys do nothing for them.
    fitting = [b for b in blocks if b[0] < 2 * max(lq, 16) and b[1] < 2 * max(lk, 64)] or blocks[-1:]
    if lq * lk <= 64 * 64:
        fitting = fitting[:2]  # a few microseconds, whichever it is
    found = [_config(b, 0) for b in fitting]
    if tma and table is not _FLOAT32:
        described = [_config(b, 1) for b in fitting if b[0] >= 64]
        found = [*described, *found] if table is _LONG else [*found, *described]
    limit = _SHARED_MEMORY.get(target.capability, 99) * 1024
    size = dtype.itemsize
    return [c for c in found if _fits(c, width, size, kind, target) and _shared_memory(c, width, size) <= limit]


def _config(blocks: _Blocks, tma: int) -> Config:
    block_m, block_n, warps, stages = blocks
    return Config.of(warps, stages, BLOCK_M=block_m, BLOCK_N=block_n, TMA=tma)


def _shared_memory(config: Config, width: int, size: int) -> int:
    """Bytes of q, and of each stage's k and v, and a few more for barriers."""
    return width * size * (config["BLOCK_M"] + 2 * config["BLOCK_N"] * config.num_stages) + 1024


def _fits(config: Config, width: int, size: int, kind: str, target: Target) -> bool:
    return True
