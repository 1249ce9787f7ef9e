"""The last tiles of a product on Hopper in pieces.

Tiles rarely fill whole waves of the multiprocessors, and the last wave takes as long as the others however few of them
work. So what is left after whole waves is cut into pieces of fewer columns, where one wave holds all of them: 408 tiles
on 132 multiprocessors are three waves and 48 quarters of a tile.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from burnish.kernels.matmul_wgmma_finish import finish_alone, place_of_tile, reinterpret


@gluon.jit
def whole_and_pieces(M, N, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, PIECE: gl.constexpr):
    """How many whole tiles this program has, and after them how many pieces, one or none."""
    programs = gl.num_programs(0)
    tiles = gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N)
    waves = tiles // programs
    pieces = (tiles - waves * programs) * (BLOCK_N // PIECE)
    whole = gl.cdiv(tiles - gl.program_id(0), programs)
    piece = 0
    if (waves > 0) & (pieces <= programs):
        whole = waves
        piece = gl.minimum(gl.maximum(pieces - gl.program_id(0), 0), 1)
    return whole, piece


@gluon.jit
def place_of_piece(
    whole, M, N, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, PIECE: gl.constexpr, BY_ROWS: gl.constexpr
):  # fmt: skip
    """The first row and column of this program's piece, which comes after so many whole tiles."""
    CUT: gl.constexpr = BLOCK_N // PIECE
    tile = whole * gl.num_programs(0) + gl.program_id(0) // CUT
    m, n = place_of_tile(tile, M, N, BLOCK_M, BLOCK_N, BY_ROWS)
    return m, n + gl.program_id(0) % CUT * PIECE


@gluon.jit
def multiply_piece(
    stages, whole, M, N, steps, epilogue, out_ptr, TEAM: gl.constexpr, ACTIVATION: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, PIECE: gl.constexpr, STAGES: gl.constexpr, BY_ROWS: gl.constexpr,
):  # fmt: skip
    """One team: it multiplies the program's piece, after so many whole tiles, and writes it."""
    xs, weights, full, empty, turns = stages
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, PIECE, 16])
    acc = gl.zeros((BLOCK_M, PIECE), gl.float32, MMA)
    mbarrier.wait(turns[1].index(TEAM), (whole // 2 + TEAM - 1) & 1)
    for i in range(whole * steps, (whole + 1) * steps):
        stage = i % STAGES
        mbarrier.wait(full.index(stage), i // STAGES & 1)
        weight = weights[0].index(stage).slice(0, PIECE, 0)
        acc = warpgroup_mma(xs.index(stage), weight.permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), count=1, pred=i > whole * steps)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    m, n = place_of_piece(whole, M, N, BLOCK_M, BLOCK_N, PIECE, BY_ROWS)
    SUMS: gl.constexpr = gl.SwizzledSharedLayout(8, 64 // PIECE, PIECE // 8, [1, 0])
    sums = reinterpret(turns[0].index(TEAM), out_ptr.dtype.element_ty, [BLOCK_N // PIECE, BLOCK_M, PIECE], SUMS)
    finish_alone(acc, sums.index(0), m, n, M, N, epilogue, out_ptr, ACTIVATION, gl.num_warps())
