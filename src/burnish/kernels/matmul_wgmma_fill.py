"""How shared memory is filled for products on Hopper: by one warp, with tiles of x and weight, as stages are free."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra import cuda as tl_cuda

from burnish.kernels.matmul_wgmma_finish import live_size, place_of, tiles_of
from burnish.kernels.matmul_wgmma_pieces import place_of_piece, whole_and_pieces

async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # as Triton 3.6 calls it
HALF_TYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


def described(x: Tensor, rows: int, columns: int, stride: int, *block: int) -> TensorDescriptor:
    """A matrix of so many rows, which begin `stride` entries apart, as blocks of it are copied to shared memory."""
    layout = gl.NVMMASharedLayout.get_default_for(list(block), HALF_TYPES[x.dtype])
    return TensorDescriptor(x, [rows, columns], [stride, 1], list(block), layout)


@gluon.jit
def asked_ahead(
    x_desc, M, N, steps, COLUMNS: gl.constexpr, SPLIT_K: gl.constexpr, STAGES: gl.constexpr, FIRST: gl.constexpr
):  # fmt: skip
    """How many steps may be asked for before it is known how many rows are wanted. With FIRST, where the first STAGES
    steps are all of a program's first tile, that takes no division, and what is asked for comes sooner."""
    if FIRST:
        return STAGES
    else:
        return tiles_of(M, N, x_desc.block_shape[0], COLUMNS, SPLIT_K) * steps


@gluon.jit
def ask_for_weight(
    x_desc, descs, buffers, full, i, total, M, N, steps,
    GATED: gl.constexpr, COLUMNS: gl.constexpr, SPLIT_K: gl.constexpr, STAGES: gl.constexpr, BY_ROWS: gl.constexpr,
    FIRST: gl.constexpr,
):  # fmt: skip
    """Step `i`'s tiles of weight, into their stage; its barrier waits for x, too."""
    _, n, _, step = place_of(i, M, N, steps, x_desc.block_shape[0], COLUMNS, SPLIT_K, BY_ROWS, FIRST)
    barrier, wanted = full.index(i % STAGES), i < total
    nbytes: gl.constexpr = x_desc.block_type.nbytes + descs[0].block_type.nbytes
    k = step * x_desc.block_shape[1]
    if descs[1] is None:
        mbarrier.expect(barrier, nbytes, wanted)
    else:
        mbarrier.expect(barrier, nbytes + descs[1].block_type.nbytes, wanted)
        other = N + n if GATED else n + descs[0].block_shape[0]
        async_load(descs[1], [other, k], barrier, buffers[1].index(i % STAGES), wanted)
    async_load(descs[0], [n, k], barrier, buffers[0].index(i % STAGES), wanted)


@gluon.jit
def ask_for_x(
    desc, buffers, full, i, total, M, N, steps, COLUMNS: gl.constexpr, SPLIT_K: gl.constexpr, STAGES: gl.constexpr,
    BY_ROWS: gl.constexpr, FIRST: gl.constexpr,
):  # fmt: skip
    """Step `i`'s tile of x, into its stage."""
    m, _, _, step = place_of(i, M, N, steps, desc.block_shape[0], COLUMNS, SPLIT_K, BY_ROWS, FIRST)
    place = [m, step * desc.block_shape[1]]
    async_load(desc, place, full.index(i % STAGES), buffers.index(i % STAGES), i < total)


@gluon.jit
def _ask_for_piece(
    x_desc, weight_desc, xs, weights, stages, whole, M, N, steps,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, BY_ROWS: gl.constexpr,
):  # fmt: skip
    """All steps of this program's piece, after so many whole tiles."""
    full, empty = stages[2], stages[3]
    PIECE: gl.constexpr = weight_desc.block_shape[0]
    m, n = place_of_piece(whole, M, N, x_desc.block_shape[0], BLOCK_N, PIECE, BY_ROWS)
    for i in range(whole * steps, (whole + 1) * steps):
        stage, k = i % STAGES, i % steps * x_desc.block_shape[1]
        mbarrier.wait(empty.index(stage), (i // STAGES - 1) & 1)
        mbarrier.expect(full.index(stage), x_desc.block_type.nbytes + weight_desc.block_type.nbytes)
        async_load(weight_desc, [n, k], full.index(stage), weights.index(stage).slice(0, PIECE, 0))
        async_load(x_desc, [m, k], full.index(stage), xs.index(stage))


@gluon.jit
def fill(
    x_desc, weight_descs, piece_desc, stages, size, GATED: gl.constexpr, COLUMNS: gl.constexpr, SPLIT_K: gl.constexpr,
    STAGES: gl.constexpr, FIRST: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """One warp: the stages are filled with weight at once, and with x when the kernel ahead is done.

    Only then it can be known how many rows are wanted: a kernel that waits for the one ahead of it knows that all
    before are done, but until then even the second one before may still run. So the weight that is asked for before is
    that of all rows, which those rows' number does not place; its stages get their x, too, and nobody leaves before
    they have come, as copies into the memory of a program that has ended would end in another's.
    """
    xs, weights, full, empty, _ = stages
    M, N, steps, live_ptr = size
    BY_ROWS: gl.constexpr = live_ptr is not None
    asked = asked_ahead(x_desc, M, N, steps, COLUMNS, SPLIT_K, STAGES, FIRST)
    for i in gl.static_range(STAGES):
        ask_for_weight(
            x_desc, weight_descs, weights, full, i, asked, M, N, steps, GATED, COLUMNS, SPLIT_K, STAGES, BY_ROWS, FIRST
        )  # fmt: skip
    if PDL:
        tl_cuda.gdc_launch_dependents()
        tl_cuda.gdc_wait()
    for i in gl.static_range(STAGES):
        ask_for_x(x_desc, xs, full, i, asked, M, N, steps, COLUMNS, SPLIT_K, STAGES, BY_ROWS, FIRST)
    # After them: the number takes as long to come as x.
    M, mine = live_size(size, x_desc.block_shape[0], COLUMNS, SPLIT_K)
    piece = 0
    if piece_desc is not None:
        mine, piece = whole_and_pieces(M, N, x_desc.block_shape[0], COLUMNS, piece_desc.block_shape[0])
    total = mine * steps
    for i in range(STAGES, total):
        mbarrier.wait(empty.index(i % STAGES), (i // STAGES - 1) & 1)
        ask_for_weight(
            x_desc, weight_descs, weights, full, i, total, M, N, steps, GATED, COLUMNS, SPLIT_K, STAGES, BY_ROWS, False
        )  # fmt: skip
        ask_for_x(x_desc, xs, full, i, total, M, N, steps, COLUMNS, SPLIT_K, STAGES, BY_ROWS, False)
    if piece_desc is not None and piece > 0:
        _ask_for_piece(x_desc, piece_desc, xs, weights[0], stages, mine, M, N, steps, COLUMNS, STAGES, BY_ROWS)
    if BY_ROWS:
        for i in gl.static_range(STAGES):
            mbarrier.wait(full.index(i), 0, pred=(i >= total) & (i < asked))
