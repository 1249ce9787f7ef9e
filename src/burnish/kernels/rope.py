"""Rotary position embedding of one tensor, or of a query and a key in one launch; of one tensor also in place.

A program has BLOCK_S positions of BLOCK_H heads as the rows of one tile, so the tables' lines come from memory once for
all its heads (the repeats are hits in L1), and every load of the tile is in flight at once.
Source: Su et al., "RoFormer", arXiv:2104.09864.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from burnish.kernels.launch import Config, launch, launch_dependents, target_of, wait_for_inputs

MAX_HEAD_DIM = 1024
"""Of wider heads one row alone would not fit a warp's registers."""


@triton.jit
def _everything_is_loaded(IN_PLACE: tl.constexpr):
    """Before the first store of a program that writes where it read. Its rows are its own, but in a tile of fewer
    entries than threads several threads load the same ones, and a slow one is not to see what a fast one stored."""
    if IN_PLACE:
        tl.debug_barrier()


@triton.jit
def _rotate_tile(
    x, out, cos, sin, batch, head_block, position_block, heads, positions,
    x_batch, x_head, x_position, x_step, out_batch, out_head, out_position, out_step,
    table_batch, table_position, table_step, D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr,
    IN_PLACE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """BLOCK_S x BLOCK_H rows of D entries: the first R rotated, the rest copied. If in place, out is x."""
    HALF: tl.constexpr = R // 2
    row = tl.arange(0, BLOCK_S * BLOCK_H)[:, None]
    head = (head_block * BLOCK_H + row % BLOCK_H).to(tl.int64)
    position = (position_block * BLOCK_S + row // BLOCK_H).to(tl.int64)
    batch = batch.to(tl.int64)
    valid = (head < heads) & (position < positions)
    x += batch * x_batch + head * x_head + position * x_position
    out += batch * out_batch + head * out_head + position * out_position
    table = batch * table_batch + position * table_position
    if INTERLEAVED:
        column = tl.arange(0, triton.next_power_of_2(R))[None, :]
        mask = valid & (column < R)
        values = tl.load(x + column * x_step, mask, other=0.0).to(tl.float32)
        c = tl.load(cos + table + column * table_step, mask, other=0.0).to(tl.float32)
        s = tl.load(sin + table + column * table_step, mask, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(values, [BLOCK_S * BLOCK_H, triton.next_power_of_2(R) // 2, 2]))
        rotated = tl.reshape(tl.join(-second, first), [BLOCK_S * BLOCK_H, triton.next_power_of_2(R)])
        _everything_is_loaded(IN_PLACE)
        tl.store(out + column * out_step, (values * c + rotated * s).to(out.dtype.element_ty), mask)
    else:
        column = tl.arange(0, triton.next_power_of_2(HALF))[None, :]
        mask = valid & (column < HALF)
        first = tl.load(x + column * x_step, mask, other=0.0).to(tl.float32)
        second = tl.load(x + (column + HALF) * x_step, mask, other=0.0).to(tl.float32)
        c1 = tl.load(cos + table + column * table_step, mask, other=0.0).to(tl.float32)
        s1 = tl.load(sin + table + column * table_step, mask, other=0.0).to(tl.float32)
        c2 = tl.load(cos + table + (column + HALF) * table_step, mask, other=0.0).to(tl.float32)
        s2 = tl.load(sin + table + (column + HALF) * table_step, mask, other=0.0).to(tl.float32)
        _everything_is_loaded(IN_PLACE)
        tl.store(out + column * out_step, (first * c1 - second * s1).to(out.dtype.element_ty), mask)
        tl.store(out + (column + HALF) * out_step, (second * c2 + first * s2).to(out.dtype.element_ty), mask)
    if R < D and not IN_PLACE:
        column = R + tl.arange(0, triton.next_power_of_2(D - R))[None, :]
        mask = valid & (column < D)
        tl.store(out + column * out_step, tl.load(x + column * x_step, mask), mask)


@triton.jit(do_not_specialize=["positions", "position_blocks"])
def _rope_kernel(
    q, k, q_out, k_out, cos, sin, positions, position_blocks, q_heads, k_heads,
    q_batch, q_head, q_position, q_step, q_out_batch, q_out_head, q_out_position, q_out_step,
    k_batch, k_head, k_position, k_step, k_out_batch, k_out_head, k_out_position, k_out_step,
    table_batch, table_position, table_step, D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr,
    IN_PLACE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    launch_dependents(PDL)
    wait_for_inputs(PDL)
    q_blocks = tl.cdiv(q_heads, BLOCK_H)
    head_blocks = q_blocks
    if k is not None:
        head_blocks += tl.cdiv(k_heads, BLOCK_H)
    # Neighbours share positions: what a table's line and a position's heads (next to each other in memory where q, k
    # and v come from one product) cost is paid once.
    program = tl.program_id(0)
    head_block, program = program % head_blocks, program // head_blocks
    position_block, batch = program % position_blocks, program // position_blocks
    if head_block < q_blocks:
        _rotate_tile(
            q, q_out, cos, sin, batch, head_block, position_block, q_heads, positions,
            q_batch, q_head, q_position, q_step, q_out_batch, q_out_head, q_out_position, q_out_step,
            table_batch, table_position, table_step, D, R, INTERLEAVED, IN_PLACE, BLOCK_S, BLOCK_H,
        )  # fmt: skip
    if k is not None:  # noqa: SIM102 (the compiler decides the one, the program the other)
        if head_block >= q_blocks:
            _rotate_tile(
                k, k_out, cos, sin, batch, head_block - q_blocks, position_block, k_heads, positions,
                k_batch, k_head, k_position, k_step, k_out_batch, k_out_head, k_out_position, k_out_step,
                table_batch, table_position, table_step, D, R, INTERLEAVED, IN_PLACE, BLOCK_S, BLOCK_H,
            )  # fmt: skip


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, config: Config | None = None) -> Tensor:
    """`x * cos + rotate(x) * sin` on the first R of the last dimension; the rest passes unchanged.

    Shapes: x (B, H, S, D) of any strides, D at most MAX_HEAD_DIM; cos and sin (S, R) or (1 or B, S, R), R even and at
    least 2. Dtypes: float16, bfloat16, float32, the tables' their own. The result is laid out as torch.empty_like(x).
    """
    return _rope(x, None, cos, sin, interleaved, config)[0]


def rope_pair(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """`rope` of q (B, H, S, D) and k (B, G, S, D) by the same tables, in one launch."""
    rotated_q, rotated_k = _rope(q, k, cos, sin, interleaved, config)
    assert rotated_k is not None
    return rotated_q, rotated_k


def rope_in_place(x: Tensor, cos: Tensor, sin: Tensor, config: Config | None = None) -> None:
    """`rope` of halves, written where x is.

    Shapes and dtypes: as of `rope`; no two entries of x share memory.
    """
    _rope(x, None, cos, sin, False, config, in_place=True)


def _rope(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    config: Config | None,
    in_place: bool = False,
) -> tuple[Tensor, Tensor | None]:
    B, heads, S, D = q.shape
    k_heads = 0 if k is None else k.shape[1]
    config = config or rope_configs(q, k, cos.shape[-1])[0]
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    table_strides = (0 if cos.dim() == 2 or cos.shape[0] == 1 else cos.stride(0), *cos.stride()[-2:])
    q_out = q if in_place else torch.empty_like(q)
    k_out = None if k is None else torch.empty_like(k)
    k_strides = (0,) * 8 if k is None or k_out is None else (*k.stride(), *k_out.stride())
    BLOCK_S, BLOCK_H = config["BLOCK_S"], config["BLOCK_H"]
    position_blocks = triton.cdiv(S, BLOCK_S)
    head_blocks = triton.cdiv(heads, BLOCK_H) + triton.cdiv(k_heads, BLOCK_H)
    launch(
        _rope_kernel, (B * position_blocks * head_blocks,), q, k, q_out, k_out, cos, sin, S, position_blocks,
        heads, k_heads, *q.stride(), *q_out.stride(), *k_strides, *table_strides,
        config=config, like=q, D=D, R=cos.shape[-1], INTERLEAVED=interleaved, IN_PLACE=in_place,
    )  # fmt: skip
    return q_out, k_out


def rope_configs(q: Tensor, k: Tensor | None, R: int) -> list[Config]:
    """How to rotate q, and k with it where given, the most promising first."""
    B, heads, S, D = q.shape
    k_heads = 0 if k is None else k.shape[1]
    heads_each = math.gcd(heads, k_heads) & -math.gcd(heads, k_heads)  # the largest power of two that divides both
    # Each thread has this many 16-byte loads of either half, and at most twice as many of what is not rotated.
    half_bytes = max(triton.next_power_of_2(R), triton.next_power_of_2(D - R)) // 2 * q.dtype.itemsize
    configs = []
    for num_warps, loads in ((4, 1), (2, 1), (1, 1), (4, 2)):
        tile = max(1, num_warps * 32 * 16 * loads // half_bytes)
        BLOCK_H = min(heads_each, tile)
        BLOCK_S = min(tile // BLOCK_H, triton.next_power_of_2(S))
        configs.append(Config.of(num_warps=num_warps, BLOCK_S=BLOCK_S, BLOCK_H=BLOCK_H))
    # With few rows what counts is that they are spread over the device.
    spread = B * S * (heads + k_heads) < 32 * target_of(q).num_sms
    return list(dict.fromkeys(configs[i] for i in ((2, 0) if spread else (0, 3, 1, 2))))
