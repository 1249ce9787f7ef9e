"""`act(x @ weight.T + bias) + residual` on Hopper by warps with roles: one fills shared memory, the others multiply.

Written in Gluon, Triton's lower language, for what Triton itself has not: the first tiles of weight are on their way
into shared memory *before* the wait for the kernel ahead, for which only x has to wait; and nothing but data stands
between two steps over K. BERT-base's products at 128 and 384 rows, float16, H200, us: 3.4 and 5.2 (2304x768; without
roles 4.1 and 5.2, in Triton 3.9 and 6.5), 4.1 and 6.9 (3072x768 with GELU; 4.8 and 7.6, 4.4 and 8.8).
With `FINISH` a third kind of warps finishes the tiles and writes them (see `burnish.kernels.matmul_wgmma_finish`), with
`PIECE` the last tiles are cut (see `burnish.kernels.matmul_wgmma_pieces`).
With `GATED` the weight has two halves of rows, gate and up, and the result is `act(gate) * up`. With `HEAD` the first
columns are heads of so many, and are rotated by their positions (see `burnish.kernels.rope`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra import cuda as tl_cuda

from burnish.kernels.activations import activate, in_half
from burnish.kernels.launch import Config, launch, target_of
from burnish.kernels.layout import rows_of
from burnish.kernels.matmul_configs import Product
from burnish.kernels.matmul_wgmma_configs import finishes, matmul_wgmma_configs, matmul_wgmma_rope_configs
from burnish.kernels.matmul_wgmma_fill import described, fill
from burnish.kernels.matmul_wgmma_finish import (
    biased,
    finish,
    finish_alone,
    finish_rows,
    hand_over,
    handing_over,
    live_size,
    place_of,
    teams_turns,
    write,
)
from burnish.kernels.matmul_wgmma_pieces import multiply_piece, whole_and_pieces
from burnish.kernels.rope_wgmma import halves_of_heads, rotated_heads, tables_of_rows

FINISH_REGISTERS = 104


@gluon.jit
def _multiply(
    stages, size, epilogue, rope, out_ptr, TEAM: gl.constexpr, TEAMS: gl.constexpr, ACTIVATION: gl.constexpr,
    GATED: gl.constexpr, HEAD: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, MORE_N: gl.constexpr,
    SPLIT_K: gl.constexpr, STAGES: gl.constexpr, FINISH: gl.constexpr, PIECE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The other warps: they multiply what is in the stages, and write tiles of the result. Of two teams each has every
    second tile: one multiplies while the other writes."""
    xs, weights, full, empty, turns = stages
    N, steps = size[1], size[2]
    BY_ROWS: gl.constexpr = size[3] is not None
    bias_ptr, stride_bias = epilogue[0], epilogue[1]
    OTHER_N: gl.constexpr = BLOCK_N if GATED else MORE_N
    COLUMNS: gl.constexpr = BLOCK_N + MORE_N
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_N, 16])
    if PDL:
        tl_cuda.gdc_wait()
    M, mine = live_size(size, BLOCK_M, COLUMNS, SPLIT_K)
    piece = 0
    if PIECE > 0:
        mine, piece = whole_and_pieces(M, N, BLOCK_M, BLOCK_N, PIECE)
    for turn in range(TEAM, mine, TEAMS):
        if FINISH == 0:
            m, n, split, _ = place_of(turn * steps, M, N, steps, BLOCK_M, COLUMNS, SPLIT_K, BY_ROWS)
        acc = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, MMA)
        if HEAD > 0:  # asked for before the steps over K: nothing else hides the time that they take to come
            tables = tables_of_rows(halves_of_heads(acc, HEAD, BLOCK_M, BLOCK_N)[0], m, M, rope, HEAD, BLOCK_M)
        if OTHER_N > 0:
            OTHER: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, OTHER_N, 16])
            other = gl.zeros((BLOCK_M, OTHER_N), gl.float32, OTHER)
        if TEAMS > 1:
            mbarrier.wait(turns[1].index(TEAM), (turn // 2 + TEAM - 1) & 1, pred=turn > 0)
        for i in range(turn * steps, (turn + 1) * steps):
            stage = i % STAGES
            mbarrier.wait(full.index(stage), i // STAGES & 1)
            x = xs.index(stage)
            acc = warpgroup_mma(x, weights[0].index(stage).permute((1, 0)), acc, is_async=True)
            if OTHER_N > 0:
                other = warpgroup_mma(x, weights[1].index(stage).permute((1, 0)), other, is_async=True)
                acc, other = warpgroup_mma_wait(2, deps=(acc, other))
            else:
                acc = warpgroup_mma_wait(1, deps=(acc,))
            # The step before this one is done: its stage may be filled again.
            mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), count=1, pred=i > turn * steps)
        if OTHER_N > 0:
            acc, other = warpgroup_mma_wait(0, deps=(acc, other))
        else:
            acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(((turn + 1) * steps - 1) % STAGES), count=1)
        if TEAMS > 1:
            mbarrier.arrive(turns[1].index(1 - TEAM), count=1)

        if FINISH > 0:
            if OTHER_N == 0:
                other = acc
            hand_over(acc, other, turns, bias_ptr, turn, OTHER_N)
            if turn == mine - 1:  # there is nothing left to multiply
                m, n, _, _ = place_of(turn * steps, M, N, steps, BLOCK_M, COLUMNS, SPLIT_K, BY_ROWS)
                finish_rows(
                    turns[0], 0, FINISH, m, n, M, N, epilogue, epilogue[6], out_ptr, ACTIVATION, GATED, BLOCK_M,
                    BLOCK_N, MORE_N, gl.num_warps(),
                )  # fmt: skip
        elif TEAMS > 1 and OTHER_N == 0:
            finish_alone(acc, turns[0].index(TEAM), m, n, M, N, epilogue, out_ptr, ACTIVATION, gl.num_warps())
        else:
            columns = n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, MMA))
            acc = activate(biased(acc, bias_ptr, stride_bias, columns, N), ACTIVATION)
            if GATED:
                acc *= biased(other, bias_ptr, stride_bias, N + columns, 2 * N)
            if HEAD > 0:
                acc = rotated_heads(acc, tables, n, rope[5], HEAD, BLOCK_M, BLOCK_N)
            to_ptr = out_ptr
            if BY_ROWS:
                if SPLIT_K > 1:  # parts are as far apart as all rows, not as those that are wanted
                    to_ptr += split.to(gl.int64) * size[0] * N
                split = 0
            write(acc, m, n, split, M, N, epilogue, to_ptr, BLOCK_M, BLOCK_N, gl.num_warps())
            if MORE_N > 0:
                columns = n + BLOCK_N + gl.arange(0, MORE_N, gl.SliceLayout(0, OTHER))
                other = activate(biased(other, bias_ptr, stride_bias, columns, N), ACTIVATION)
                if HEAD > 0:
                    other = rotated_heads(other, tables, n + BLOCK_N, rope[5], HEAD, BLOCK_M, MORE_N)
                write(other, m, n + BLOCK_N, split, M, N, epilogue, to_ptr, BLOCK_M, MORE_N, gl.num_warps())
    if PIECE > 0 and (piece > 0) & (mine % TEAMS == TEAM):
        multiply_piece(
            stages, mine, M, N, steps, epilogue, out_ptr, TEAM, ACTIVATION, BLOCK_M, BLOCK_N, PIECE, STAGES, BY_ROWS
        )  # fmt: skip


@gluon.jit(do_not_specialize=["M", "residual_inner", "positions"], do_not_specialize_on_alignment=["live_ptr"])
def matmul_wgmma_kernel(
    x_desc,  # (M, K)
    weight_desc,  # (N, K), or (2 * N, K) if GATED
    other_desc,  # the same, in blocks for the rest of a tile's columns, or for up; or None
    piece_desc,  # the same, in blocks for pieces of tiles; or None
    bias_ptr,
    residual_ptr,
    cos_ptr,  # of HEAD columns and a line for each position; None without HEAD
    sin_ptr,
    out_ptr,  # (M, N), or (SPLIT_K, M, N): what each part of K adds
    M,
    N,
    K,
    stride_bias,
    residual_inner,
    stride_residual_outer,
    stride_residual_inner,
    stride_residual_n,
    positions,
    stride_table_batch,
    stride_table_position,
    rotated,  # columns
    live_ptr,  # how many rows are wanted, or None for all
    ACTIVATION: gl.constexpr,
    GATED: gl.constexpr,
    HEAD: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    MORE_N: gl.constexpr,  # columns of a tile beyond BLOCK_N
    BLOCK_K: gl.constexpr,
    SPLIT_K: gl.constexpr,
    STAGES: gl.constexpr,
    TEAMS: gl.constexpr,
    PER_SM: gl.constexpr,
    FIRST: gl.constexpr,  # whether the first STAGES steps are all of a program's first tile
    TEAM_REGISTERS: gl.constexpr,
    FILL_REGISTERS: gl.constexpr,
    PDL: gl.constexpr,
    FINISH: gl.constexpr = 0,  # rows of the last tile that the finishing team leaves to the other; 0: there is none
    PIECE: gl.constexpr = 0,  # columns of the pieces that the last tiles are cut into; 0: they are not
):
    xs = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BLOCK_M, BLOCK_K], x_desc.layout)
    weights = (gl.allocate_shared_memory(x_desc.dtype, [STAGES, BLOCK_N, BLOCK_K], weight_desc.layout), None)
    if other_desc is not None:
        OTHER: gl.constexpr = [STAGES, other_desc.block_shape[0], BLOCK_K]
        weights = (weights[0], gl.allocate_shared_memory(x_desc.dtype, OTHER, other_desc.layout))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = (empty, empty)
    if TEAMS > 1:  # not for one team: Triton gives the place of barriers that nobody waits for to other things
        turns = teams_turns(x_desc.dtype, TEAMS, BLOCK_M, BLOCK_N, BLOCK_N if GATED else MORE_N)
    gl.static_assert(PIECE == 0 or (FIRST and TEAMS > 1 and not GATED and MORE_N == 0 and SPLIT_K == 1 and HEAD == 0))
    if FINISH > 0:
        gl.static_assert(TEAMS == 1 and SPLIT_K == 1 and HEAD == 0)
        turns = handing_over(bias_ptr, x_desc.dtype, BLOCK_M, BLOCK_N, BLOCK_N if GATED else MORE_N)
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=1)

    steps = gl.cdiv(gl.cdiv(K, BLOCK_K), SPLIT_K)
    stages = (xs, weights, full, empty, turns)
    size = (M, N, steps, live_ptr)
    epilogue = (
        bias_ptr, stride_bias, residual_ptr, residual_inner, stride_residual_outer, stride_residual_inner,
        stride_residual_n,
    )  # fmt: skip
    rope = (cos_ptr, sin_ptr, positions, stride_table_batch, stride_table_position, rotated)
    descs = (weight_desc, other_desc)
    # Each partition with all its arguments: Gluon puts no tuples together, and keeps no string in a variable.
    if FINISH > 0:
        gl.warp_specialize(
            [
                (_multiply, (stages, size, epilogue, rope, out_ptr, 0, 1, ACTIVATION, GATED, HEAD, BLOCK_M, BLOCK_N,
                             MORE_N, SPLIT_K, STAGES, FINISH, PIECE, PDL)),
                (finish, (turns, size, epilogue, stride_residual_n, out_ptr, ACTIVATION, GATED, BLOCK_M, BLOCK_N,
                          MORE_N, FINISH, PDL)),
                (fill, (x_desc, descs, piece_desc, stages, size, GATED, BLOCK_N + MORE_N, SPLIT_K, STAGES, FIRST, PDL)),
            ],
            [4, 1],
            [TEAM_REGISTERS, FILL_REGISTERS],
        )  # fmt: skip
    elif TEAMS == 1:
        gl.warp_specialize(
            [
                (_multiply, (stages, size, epilogue, rope, out_ptr, 0, 1, ACTIVATION, GATED, HEAD, BLOCK_M, BLOCK_N,
                             MORE_N, SPLIT_K, STAGES, FINISH, PIECE, PDL)),
                (fill, (x_desc, descs, piece_desc, stages, size, GATED, BLOCK_N + MORE_N, SPLIT_K, STAGES, FIRST, PDL)),
            ],
            [1],
            [FILL_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_multiply, (stages, size, epilogue, rope, out_ptr, 0, 2, ACTIVATION, GATED, HEAD, BLOCK_M, BLOCK_N,
                             MORE_N, SPLIT_K, STAGES, FINISH, PIECE, PDL)),
                (_multiply, (stages, size, epilogue, rope, out_ptr, 1, 2, ACTIVATION, GATED, HEAD, BLOCK_M, BLOCK_N,
                             MORE_N, SPLIT_K, STAGES, FINISH, PIECE, PDL)),
                (fill, (x_desc, descs, piece_desc, stages, size, GATED, BLOCK_N + MORE_N, SPLIT_K, STAGES, FIRST, PDL)),
            ],
            [gl.num_warps(), 1],
            [TEAM_REGISTERS, FILL_REGISTERS],
        )  # fmt: skip


def matmul_wgmma(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    gated: bool = False,
    config: Config | None = None,
    live_rows: Tensor | None = None,
) -> Tensor:
    """`act(x @ weight.T + bias) + residual`, or `act(gate) * up` of the two halves of `x @ weight.T + bias` if gated.

    Shapes: x (..., K) with one stride for its rows, weight (N, K), or (2*N, K) if gated, bias its rows' number,
    residual and the contiguous result (..., N). Rows of x and weight are contiguous and start at multiples of 16 bytes.
    All of one dtype: float16 or bfloat16; sums are float32, the result is rounded once. Compute capability 9.0 only.
    Rows of the result from `live_rows` on, an int32 on the device, are left as they are.
    Source: CUTLASS, "Efficient GEMM in CUDA", on warp specialization and its ping-pong kernel.
    """
    columns = weight.shape[0] // 2 if gated else weight.shape[0]
    config = config or matmul_wgmma_configs(Product.of(x, weight, gated))[0]
    out = x.new_empty((*x.shape[:-1], columns))
    _launch(x, weight, out, config, bias, activation, residual, gated, live_rows=live_rows)
    return out


def matmul_wgmma_rope(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    head_dim: int,
    rotated: int,
    config: Config | None = None,
) -> Tensor:
    """`x @ weight.T + bias`, its first `rotated` columns heads that are rotated by their positions.

    Shapes: x (B, S, K), weight (N, K), the result (B, S, N), cos and sin (S, head_dim) or (1 or B, S, head_dim) with
    equal strides, the last one 1; head_dim divides a config's BLOCK_N and MORE_N. Otherwise as `matmul_wgmma`.
    Source: as of `burnish.kernels.rope`.
    """
    config = config or matmul_wgmma_rope_configs(Product.of(x, weight), head_dim)[0]
    out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    _launch(x, weight, out, config, bias, rope=Rope(cos, sin, head_dim, rotated))
    return out


def matmul_wgmma_parts(x: Tensor, weight: Tensor, config: Config, live_rows: Tensor | None = None) -> Tensor:
    """What each of SPLIT_K parts of K adds to `x @ weight.T`: (SPLIT_K, rows of x, N) of float32, otherwise as
    `matmul_wgmma`."""
    parts = x.new_empty((config["SPLIT_K"], x.numel() // x.shape[-1], weight.shape[0]), dtype=torch.float32)
    _launch(x, weight, parts, config, live_rows=live_rows)
    return parts


class Rope(NamedTuple):
    """How the heads of a product's first `rotated` columns are turned."""

    cos: Tensor
    sin: Tensor
    head_dim: int
    rotated: int


def _launch(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    config: Config,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    gated: bool = False,
    rope: Rope | None = None,
    live_rows: Tensor | None = None,
) -> None:
    block_m, block_n, more_n, block_k = (config[name] for name in ("BLOCK_M", "BLOCK_N", "MORE_N", "BLOCK_K"))
    rows, depth, columns = rows_of(x), x.shape[-1], out.shape[-1]
    residual_rows = out if residual is None else residual
    extra = rows_of(residual_rows)
    assert rows is not None
    assert extra is not None
    other, piece = block_n if gated else more_n, config.sizes.get("PIECE", 0)
    tables: tuple[Tensor | None, Tensor | None] = None, None
    turning = (1, 0, 0, 0)
    if rope is not None:
        cos = rope.cos
        tables = cos, rope.sin
        batch = 0 if cos.dim() == 2 or cos.shape[0] == 1 else cos.stride(0)
        turning = (cos.shape[-2], batch, cos.stride(-2), rope.rotated)
    memory = (weight, *weight.shape, weight.stride(0))
    arguments: tuple[Any, ...] = (
        described(x, rows.count, depth, rows.stride_inner, block_m, block_k),
        described(*memory, block_n, block_k),
        described(*memory, other, block_k) if other else None,
        described(*memory, piece, block_k) if piece else None,
        *(bias, residual, *tables, out, rows.count, columns, depth),
        1 if bias is None else bias.stride(0),
        *(extra.inner, extra.stride_outer, extra.stride_inner, residual_rows.stride(-1)),
        *turning,
        live_rows,
    )
    # All registers of a multiprocessor are dealt out: where a thread's sums are many, most to those that multiply.
    finishing = finishes(config)
    threads = 32 * (config["TEAMS"] * config.num_warps + 4 + 4 * finishing)
    registers = min(255, 65536 // (threads * config["PER_SM"]) // 8 * 8)
    many = block_m * (block_n + other) > 64 * 128
    constants = {
        "ACTIVATION": in_half(activation, x.dtype),
        "GATED": gated,
        "HEAD": 0 if rope is None else rope.head_dim,
        "FIRST": triton.cdiv(triton.cdiv(depth, block_k), config["SPLIT_K"]) >= config["STAGES"],
        "TEAM_REGISTERS": FINISH_REGISTERS if finishing else 232,
        "FILL_REGISTERS": registers if not many else 24 if threads == 256 or finishing else 40,
    }
    tiles = triton.cdiv(rows.count, block_m) * triton.cdiv(columns, block_n + more_n) * config["SPLIT_K"]
    programs = min(tiles, target_of(x).num_sms * config["PER_SM"])
    launch(matmul_wgmma_kernel, (programs,), *arguments, config=config, like=x, registers=registers, **constants)
