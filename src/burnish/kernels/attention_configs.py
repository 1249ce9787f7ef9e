"""Which blocks the attention kernel may use for given sizes, the most promising first.

The tables hold what compiles without spilling registers for sm_80 and sm_90, with causality and with the masks that the
table is for (bfloat16; for sm_100 ptxas puts up to 16 bytes of six of them on the stack).
"""

from __future__ import annotations

import torch
from torch import Tensor

from burnish.kernels.launch import Config, Target, next_power_of_2, target_of

_Blocks = tuple[int, ...]  # BLOCK_M queries, BLOCK_N keys, warps, stages, and of a head of 512 columns the PARTS

_SHARED_MEMORY = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}  # KiB of a block; else 99

# All by the width of a head. Where the queries make few blocks, multiprocessors stand idle: SHORT has smaller ones.
_SHORT: dict[int, list[_Blocks]] = {
    64: [(16, 128, 4, 2), (16, 64, 4, 2), (32, 64, 4, 3), (64, 64, 4, 3)],
    128: [(16, 64, 4, 2), (32, 64, 4, 2), (64, 64, 4, 2)],
    256: [(16, 32, 4, 2), (32, 32, 4, 2)],
    512: [(32, 32, 4, 2, 2), (16, 32, 4, 2, 2)],
}
_LONG: dict[int, list[_Blocks]] = {
    32: [(64, 128, 4, 3), (128, 64, 4, 3), (64, 64, 4, 3), (128, 128, 8, 3)],
    64: [(64, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 3)],
    128: [(128, 64, 8, 3), (64, 64, 4, 2)],
    256: [(32, 32, 4, 2), (64, 32, 8, 2)],
    512: [(64, 32, 8, 2, 2), (32, 32, 4, 2, 2), (16, 32, 4, 2, 2)],
}
# With descriptors for k and v no registers hold addresses: 204 where pointers take 254 and spill (128 x 64, width 64,
# 4 warps). Where there are few blocks, more stages ask for all keys of a few hundred at once.
_SHORT_DESCRIBED: dict[int, list[_Blocks]] = {
    64: [(64, 128, 4, 3), (32, 128, 4, 2), (64, 64, 4, 4), (32, 64, 4, 4)],
    128: [(64, 64, 4, 3), (128, 64, 8, 3), (32, 64, 4, 3)],
    256: [(64, 32, 4, 2), (128, 64, 8, 2)],
    512: [(64, 32, 4, 3, 2), (64, 32, 4, 2, 2)],
}
_DESCRIBED: dict[int, list[_Blocks]] = {
    32: [(64, 128, 4, 3), (128, 64, 4, 3), (128, 128, 8, 3), (64, 64, 4, 3), (128, 64, 8, 3)],
    64: [(128, 64, 4, 3), (64, 64, 4, 3), (64, 128, 4, 2), (128, 128, 8, 3), (128, 64, 8, 3)],
    128: [(128, 128, 8, 3), (128, 64, 8, 3), (64, 64, 4, 3)],
    256: [(128, 64, 8, 2), (64, 32, 4, 2)],
    512: [(64, 32, 4, 3, 2), (64, 32, 4, 2, 2)],
}
# A bias with an entry for each pair takes registers and shared memory for a tile; dropout takes registers as well.
_SHORT_BIASED: dict[int, list[_Blocks]] = {
    64: [(16, 64, 4, 2), (32, 64, 4, 2), (64, 64, 4, 2)],
    128: [(16, 64, 4, 2), (32, 64, 4, 2), (64, 32, 4, 2)],
    256: [(16, 32, 4, 2), (32, 32, 4, 2)],
    512: [(32, 32, 8, 2, 2), (16, 32, 4, 2, 2), (64, 32, 8, 2, 2)],
}
_BIASED: dict[int, list[_Blocks]] = {
    64: [(64, 64, 4, 2), (128, 64, 8, 2)],
    128: [(128, 32, 8, 2), (64, 32, 4, 2)],
    256: [(32, 32, 4, 2), (64, 32, 8, 2)],
    512: [(64, 32, 8, 2, 2), (32, 32, 8, 2, 2), (16, 32, 4, 2, 2)],
}
_BIASED_DESCRIBED: dict[int, list[_Blocks]] = {
    64: [(64, 64, 4, 3), (128, 64, 8, 2), (64, 128, 4, 2), (128, 128, 8, 2), (64, 64, 4, 2)],
    128: [(128, 64, 8, 2), (64, 64, 4, 2)],
    256: [(64, 64, 8, 2), (64, 32, 4, 2)],
    512: [(64, 32, 4, 3, 2), (64, 32, 4, 2, 2)],
}
_FLOAT32: dict[int, list[_Blocks]] = {
    64: [(32, 32, 8, 1), (64, 32, 8, 1), (16, 32, 4, 1)],
    128: [(32, 32, 8, 1), (16, 32, 4, 2)],
    256: [(32, 32, 8, 1)],
}
# 8 bytes of the others are on the stack where the logsumexp is stored, or weights are dropped.
_FLOAT32_IN_TRAINING: dict[int, list[_Blocks]] = {
    64: [(16, 32, 4, 1)],
    128: [(16, 32, 4, 2)],
    256: [(32, 32, 8, 1)],
}


def configs_for(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    training: bool = False,
    dropout: bool = False,
) -> list[Config]:
    """How `attention_forward` may be run on these inputs, the most promising first."""
    target = target_of(q)
    return _configs(
        q.shape[0] * q.shape[1],
        q.shape[2],
        k.shape[2],
        padded(q.shape[3]),
        padded(v.shape[3]),
        q.dtype,
        None if bias is None or is_by_key(bias) else bias.dtype,
        target.tma and is_describable(k) and is_describable(v),
        target,
        training,
        dropout,
    )


def padded(width: int) -> int:
    return max(16, next_power_of_2(width))


def is_by_key(bias: Tensor | None) -> bool:
    """Whether all queries share one row of the bias (there may be none)."""
    return bias is None or bias.dim() < 2 or bias.shape[-2] == 1 or bias.stride(-2) == 0


def is_describable(t: Tensor) -> bool:
    """Whether the tensor memory accelerator can read it: 16-byte steps, and no dimension that stands still."""
    steps = [stride * t.element_size() for stride in t.stride()[:3]]
    return t.stride(3) == 1 and t.data_ptr() % 16 == 0 and all(step > 0 and step % 16 == 0 for step in steps)


def _configs(
    heads: int,
    lq: int,
    lk: int,
    d: int,
    dv: int,
    dtype: torch.dtype,
    bias: torch.dtype | None,
    tma: bool,
    target: Target,
    training: bool,
    dropout: bool,
) -> list[Config]:
    """Configs for `heads` heads in all of lq queries and lk keys; d and dv are a head's padded dimensions.

    `bias` is the dtype of a bias with an entry for each pair. With `tma` k and v may be read by descriptors: TMA=1.
    """
    few = heads * -(-lq // 64) < 2 * target.num_sms
    short = few or lq <= 16
    if bias is None and not dropout:
        pointers, descriptors = (_SHORT, _SHORT_DESCRIBED) if short else (_LONG, _DESCRIBED)
    else:
        pointers, descriptors = (_SHORT_BIASED if short else _BIASED), _BIASED_DESCRIBED
    if dtype == torch.float32:
        pointers, tma = _FLOAT32_IN_TRAINING if training or dropout else _FLOAT32, False
    width = max(d, dv)
    pointed = _of_width(pointers, width)
    if bias == torch.bool and short and width <= 64:
        pointed = [(16, 128, 4, 2), *pointed]  # 8 bytes spill where a bias is added
    described = _of_width(descriptors, width) if tma and lq > 16 else []
    by_descriptor, by_pointer = [(b, 1) for b in described], [(b, 0) for b in pointed]
    blocks = by_pointer + by_descriptor if short and lq <= 128 and width < 512 else by_descriptor + by_pointer
    limit = _SHARED_MEMORY.get(target.capability, 99) * 1024
    bias_size = bias.itemsize if bias is not None else 0
    # Blocks that are larger than there are queries and keys do nothing for them.
    found = [
        _config(b, tma, dv)
        for b, tma in blocks
        if b[0] < 2 * max(lq, 16)
        and b[1] < 2 * max(lk, 64)
        and _shared_memory(b, d, dv, dtype.itemsize, bias_size) <= limit
    ]
    if max(lq, lk) <= 64:
        found = found[:1]  # a few microseconds, whichever it is
    return list(dict.fromkeys(found)) or [_config((16, 32, 4, 1, 2), 0, dv)]


def _of_width(table: dict[int, list[_Blocks]], width: int) -> list[_Blocks]:
    return table[next(w for w in table if w >= width)]


def _parts(blocks: _Blocks, dv: int) -> int:
    return blocks[4] if len(blocks) > 4 and dv > 256 else 1


def _config(blocks: _Blocks, tma: int, dv: int) -> Config:
    parts = _parts(blocks, dv)
    sizes = {"BLOCK_M": blocks[0], "BLOCK_N": blocks[1], "TMA": tma} | ({"PARTS": parts} if parts > 1 else {})
    return Config.of(blocks[2], blocks[3], **sizes)


def _shared_memory(blocks: _Blocks, d: int, dv: int, size: int, bias_size: int) -> int:
    """Bytes of q, of each stage's k and v and of the bias where there is one, and a few more for barriers."""
    block_m, block_n, _, stages = blocks[:4]
    block_dv = dv // _parts(blocks, dv)
    return size * (block_m * d + block_n * stages * (d + block_dv)) + block_m * block_n * stages * bias_size + 2048
