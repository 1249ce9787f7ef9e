"""Which blocks the attention kernel may use for given sizes, the most promising first.

The tables hold what compiles without spilling registers for sm_80 and sm_90, with causality and with the masks that the
table is for (bfloat16; for sm_100 ptxas puts up to 16 bytes of six of them on the stack).
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from burnish.kernels.launch import Config, Target, target_of

_Blocks = tuple[int, int, int, int]  # BLOCK_M queries, BLOCK_N keys, warps, stages

_SHARED_MEMORY = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}  # KiB of a block; else 99

# All by the width of a head. Where the queries make few blocks, multiprocessors stand idle: SHORT has smaller ones.
_SHORT: dict[int, list[_Blocks]] = {
    64: [(16, 64, 4, 2), (32, 64, 4, 2), (64, 64, 4, 2), (16, 128, 4, 2)],
    128: [(16, 64, 4, 2), (32, 64, 4, 2), (64, 64, 4, 2)],
    256: [(16, 32, 4, 2), (32, 32, 4, 2)],
}
_LONG: dict[int, list[_Blocks]] = {
    32: [(64, 128, 4, 3), (128, 64, 4, 3), (64, 64, 4, 3), (128, 128, 8, 3)],
    64: [(64, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 3)],
    128: [(128, 64, 8, 3), (64, 64, 4, 2)],
    256: [(32, 32, 4, 2), (64, 32, 8, 2)],
}
# With descriptors for k and v no registers hold addresses: 204 where pointers take 254 and spill (128 x 64, width 64,
# 4 warps).
_DESCRIBED: dict[int, list[_Blocks]] = {
    32: [(64, 128, 4, 3), (128, 64, 4, 3), (128, 128, 8, 3), (64, 64, 4, 3), (128, 64, 8, 3)],
    64: [(128, 64, 4, 3), (64, 64, 4, 3), (64, 128, 4, 2), (128, 128, 8, 3), (128, 64, 8, 3)],
    128: [(128, 128, 8, 3), (128, 64, 8, 3), (64, 64, 4, 3)],
    256: [(128, 64, 8, 2), (64, 32, 4, 2)],
}
# A bias with an entry for each pair takes as many registers as the scores do.
_BIASED: dict[int, list[_Blocks]] = {
    64: [(64, 32, 4, 2), (128, 64, 8, 2), (32, 64, 4, 2), (128, 32, 8, 2)],
    128: [(64, 32, 4, 2), (128, 32, 8, 2), (16, 32, 4, 2)],
    256: [(32, 32, 4, 2), (16, 32, 4, 2)],
}
_FLOAT32: dict[int, list[_Blocks]] = {
    64: [(32, 32, 8, 1), (64, 32, 8, 1), (16, 32, 4, 1)],
    128: [(32, 32, 8, 1), (16, 32, 4, 2)],
    256: [(32, 32, 8, 1)],
}


def configs_for(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, key_padding_mask: Tensor | None) -> list[Config]:
    """How `attention_forward` may be run on these inputs, the most promising first."""
    target = target_of(q)
    kind = "plain" if bias is None and key_padding_mask is None else "row" if is_by_key(bias) else "tile"
    return _configs(
        q.shape[0] * q.shape[1],
        q.shape[2],
        k.shape[2],
        max(padded(q.shape[3]), padded(v.shape[3])),
        q.dtype,
        kind,
        target.tma and _is_describable(k) and _is_describable(v),
        target,
    )


def padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def is_by_key(bias: Tensor | None) -> bool:
    """Whether all queries share one row of the bias (there may be none)."""
    return bias is None or bias.dim() < 2 or bias.shape[-2] == 1 or bias.stride(-2) == 0


def _is_describable(t: Tensor) -> bool:
    """Whether the tensor memory accelerator can read it: 16-byte steps, and no dimension that stands still."""
    steps = [stride * t.element_size() for stride in t.stride()[:3]]
    return t.stride(3) == 1 and t.data_ptr() % 16 == 0 and all(step > 0 and step % 16 == 0 for step in steps)


def _configs(
    heads: int, lq: int, lk: int, width: int, dtype: torch.dtype, kind: str, tma: bool, target: Target
) -> list[Config]:
    """Configs for `heads` heads in all of lq queries and lk keys, `width` a head's padded dimension.

    `kind` is "plain", "row" (padding, or a bias for each key) or "tile" (a bias for each pair). With `tma` k and v may
    be read through descriptors: TMA=1.
    """
    few = heads * -(-lq // 64) < 2 * target.num_sms
    described: list[_Blocks] = []
    if dtype == torch.float32:
        pointed = _of_width(_FLOAT32, width)
    elif kind == "tile":
        pointed = _of_width(_BIASED, width)
    elif few or lq <= 16:
        pointed = _of_width(_SHORT, width)
        described = _of_width(_DESCRIBED, width)[:2] if tma and lq > 16 else []
    else:
        pointed = _of_width(_LONG, width)
        described = _of_width(_DESCRIBED, width) if tma else []
    limit = _SHARED_MEMORY.get(target.capability, 99) * 1024
    by_descriptor, by_pointer = [(b, 1) for b in described], [(b, 0) for b in pointed]
    blocks = by_pointer + by_descriptor if few else by_descriptor + by_pointer
    # Blocks that are larger than there are queries and keys do nothing for them.
    found = [
        _config(b, tma)
        for b, tma in blocks
        if b[0] < 2 * max(lq, 16) and b[1] < 2 * max(lk, 64) and _shared_memory(b, width, dtype.itemsize) <= limit
    ]
    if max(lq, lk) <= 64:
        found = found[:1]  # a few microseconds, whichever it is
    return found or [_config((16, 32, 4, 1), 0)]


def _of_width(table: dict[int, list[_Blocks]], width: int) -> list[_Blocks]:
    return table[next(w for w in table if w >= width)]


def _config(blocks: _Blocks, tma: int) -> Config:
    block_m, block_n, warps, stages = blocks
    return Config.of(warps, stages, BLOCK_M=block_m, BLOCK_N=block_n, TMA=tma)


def _shared_memory(blocks: _Blocks, width: int, size: int) -> int:
    """Bytes of q, and of each stage's k and v, and a few more for barriers."""
    block_m, block_n, _, stages = blocks
    return width * size * (block_m + 2 * block_n * stages) + 2048
