"""New keys and values into a cache of fixed size, in one launch; with the rotation of queries and keys on the way.

A program moves BLOCK_S positions of BLOCK_H heads, of q, k or v, as the rows of one tile. How many positions are filled
is read on the device, so that one captured graph serves every length; it decides only where rows go and which are
dropped, so no load waits for it. For one token all of it is one round trip to memory and a store.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from burnish.kernels.launch import Config, launch, launch_dependents, target_of, wait_for_inputs


@triton.jit
def _move_rows(
    x, out, cos, sin, head, position, to, there, fits, x_head, x_position, x_step, out_head, out_position, out_step,
    table_position, table_step, D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of D entries, the first R of them rotated, from `position` of x to position `to` of out, if it fits."""
    WIDTH: tl.constexpr = triton.next_power_of_2(D)
    column = tl.arange(0, WIDTH)[None, :]
    inside, rotated = there & (column < D), there & (column < R)
    rows = x + head * x_head + position * x_position
    values = tl.load(rows + column * x_step, inside, other=0.0)
    if R > 0:
        line = position * table_position + column * table_step
        c = tl.load(cos + line, rotated, other=1.0).to(tl.float32)  # what is not rotated passes unchanged
        s = tl.load(sin + line, rotated, other=0.0).to(tl.float32)
        if INTERLEAVED:
            values = values.to(tl.float32)
            first, second = tl.split(tl.reshape(values, [ROWS, WIDTH // 2, 2]))
            partner = tl.reshape(tl.join(-second, first), [ROWS, WIDTH])
            partner = tl.where(rotated, partner, 0.0)  # infinity times 0 is NaN
        else:
            # Another half's entry is in another thread; that the same line is read again costs a hit in L1.
            is_first = column < R // 2
            partner = tl.where(is_first, column + R // 2, column - R // 2)
            partner = tl.load(rows + partner * x_step, rotated, other=0.0).to(tl.float32)
            values, partner = values.to(tl.float32), tl.where(is_first, -partner, partner)
        values = values * c + partner * s
    out += head * out_head + to * out_position
    tl.store(out + column * out_step, values.to(out.dtype.element_ty), inside & fits)


@triton.jit(do_not_specialize=["positions", "position_blocks", "most"])
def _append_kernel(
    q, k, v, q_out, k_cache, v_cache, cos, sin, lengths, positions, position_blocks, most,
    q_batch, q_head, q_position, q_step, q_out_batch, q_out_head, q_out_position, q_out_step,
    k_batch, k_head, k_position, k_step, k_cache_batch, k_cache_head, k_cache_position, k_cache_step,
    v_batch, v_head, v_position, v_step, v_cache_batch, v_cache_head, v_cache_position, v_cache_step,
    table_batch, table_position, table_step, lengths_step, Q_HEADS: tl.constexpr, HEADS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    launch_dependents(PDL)
    Q_BLOCKS: tl.constexpr = (Q_HEADS + BLOCK_H - 1) // BLOCK_H
    BLOCKS: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    ROWS: tl.constexpr = BLOCK_S * BLOCK_H
    # Neighbours share positions, whose heads are next to each other in memory where q, k and v come from one product.
    program = tl.program_id(0)
    block, program = program % (Q_BLOCKS + 2 * BLOCKS), program // (Q_BLOCKS + 2 * BLOCKS)
    position_block, batch = program % position_blocks, (program // position_blocks).to(tl.int64)
    row = tl.arange(0, ROWS)[:, None]
    head_in_block = (row % BLOCK_H).to(tl.int64)
    position = (position_block * BLOCK_S + row // BLOCK_H).to(tl.int64)
    there = position < positions
    cos += batch * table_batch
    sin += batch * table_batch
    wait_for_inputs(PDL)
    if Q_HEADS > 0:  # noqa: SIM102 (the compiler decides the one, the program the other)
        if block < Q_BLOCKS:
            head = block * BLOCK_H + head_in_block
            _move_rows(
                q + batch * q_batch, q_out + batch * q_out_batch, cos, sin, head, position, position,
                there & (head < Q_HEADS), True, q_head, q_position, q_step, q_out_head, q_out_position, q_out_step,
                table_position, table_step, D, R, INTERLEAVED, ROWS,
            )  # fmt: skip
    if block >= Q_BLOCKS:
        to = position + tl.load(lengths + batch * lengths_step)
        fits = to < most
        head = (block - Q_BLOCKS) % BLOCKS * BLOCK_H + head_in_block
        there &= head < HEADS
        if block < Q_BLOCKS + BLOCKS:
            _move_rows(
                k + batch * k_batch, k_cache + batch * k_cache_batch, cos, sin, head, position, to, there, fits,
                k_head, k_position, k_step, k_cache_head, k_cache_position, k_cache_step, table_position, table_step,
                D, R, INTERLEAVED, ROWS,
            )  # fmt: skip
        else:
            _move_rows(
                v + batch * v_batch, v_cache + batch * v_cache_batch, cos, sin, head, position, to, there, fits,
                v_head, v_position, v_step, v_cache_head, v_cache_position, v_cache_step, table_position, table_step,
                DV, 0, INTERLEAVED, ROWS,
            )  # fmt: skip


def append(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor, config: Config | None = None
) -> None:
    """Writes k and v to the caches' positions from `lengths` on; what would lie past their end is dropped.

    Shapes: k (B, Hkv, S, D), v (B, Hkv, S, Dv), the caches (B, Hkv, Lmax, D or Dv), of any strides; no two entries of a
    cache share memory. lengths one int32 or int64 number, or (B,), at least 0. Dtypes: float16, bfloat16, float32, one.
    """
    _append(None, k, v, k, k, k_cache, v_cache, lengths, False, config, R=0)


def rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    interleaved: bool = False,
    config: Config | None = None,
) -> Tensor:
    """`append` of k, rotated as by `burnish.kernels.rope.rope`, and of v; returns q rotated, laid out as
    torch.empty_like(q). Without tables nothing is rotated, and q is copied.

    Shapes: q (B, H, S, D), cos and sin (S, R) or (1 or B, S, R), R even and at least 2. Dtypes: the tables' their own.
    """
    cos, sin, R = (k, k, 0) if cos is None or sin is None else (cos, sin, cos.shape[-1])
    q_out = _append(q, k, v, cos, sin, k_cache, v_cache, lengths, interleaved, config, R)
    assert q_out is not None
    return q_out


def _append(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    interleaved: bool,
    config: Config | None,
    R: int,
) -> Tensor | None:
    B, heads, S, D = k.shape
    config = config or append_configs(q, k, v)[0]
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    table_strides = (0 if cos.dim() == 2 or cos.shape[0] == 1 else cos.stride(0), *cos.stride()[-2:])
    q_out = None if q is None else torch.empty_like(q)
    q_strides = (0,) * 8 if q is None or q_out is None else (*q.stride(), *q_out.stride())
    q_heads, BLOCK_H = 0 if q is None else q.shape[1], config["BLOCK_H"]
    position_blocks = triton.cdiv(S, config["BLOCK_S"])
    head_blocks = triton.cdiv(q_heads, BLOCK_H) + 2 * triton.cdiv(heads, BLOCK_H)
    launch(
        _append_kernel, (B * position_blocks * head_blocks,), q, k, v, q_out, k_cache, v_cache, cos, sin, lengths, S,
        position_blocks, k_cache.shape[2], *q_strides, *k.stride(), *k_cache.stride(), *v.stride(), *v_cache.stride(),
        *table_strides, 0 if lengths.numel() == 1 else lengths.stride(0), config=config, like=k, Q_HEADS=q_heads,
        HEADS=heads, D=D, DV=v.shape[3], R=R, INTERLEAVED=interleaved,
    )  # fmt: skip
    return q_out


def append_configs(q: Tensor | None, k: Tensor, v: Tensor) -> list[Config]:
    """How to append k and v, and to rotate q with them where given, the most promising first."""
    B, heads, S, _ = k.shape
    q_heads = 0 if q is None else q.shape[1]
    heads_each = math.gcd(heads, q_heads) & -math.gcd(heads, q_heads)  # the largest power of two that divides both
    row_bytes = triton.next_power_of_2(max(k.shape[3], v.shape[3])) * k.dtype.itemsize
    # With few rows what counts is that they are spread over the device, with many the loads in flight. H200, 32 and 8
    # heads of 128: one token takes 1.1 us either way; 64 rows of one 1.4 by one warp and 1.5 by four, where one load
    # for each thread takes 2.3; 2048 tokens 30 by one warp and 14 by four.
    few = B * S * (q_heads + 2 * heads) < 32 * target_of(k).num_sms
    configs = []
    for num_warps, loads in ((1, 2), (4, 2)) if few else ((4, 2), (4, 4)):  # of 16 bytes for each thread
        tile = max(1, num_warps * 32 * 16 * loads // row_bytes)
        BLOCK_H = min(heads_each, tile)
        BLOCK_S = min(tile // BLOCK_H, triton.next_power_of_2(S))
        configs.append(Config.of(num_warps=num_warps, BLOCK_S=BLOCK_S, BLOCK_H=BLOCK_H))
    return list(dict.fromkeys(configs))
