"""How warps of `matmul_wgmma` finish a tile of the result: each team its own, or one team those of another.

A team of its own for that hides the work from the products: those who multiply add the bias, round the sums, leave them
in shared memory and go on; the others then have as long as a tile's products take.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.extra import cuda as tl_cuda

from burnish.kernels.activations import activate
from burnish.kernels.matmul import tile_of

_descriptor = gl.shared_memory_descriptor
reinterpret = _descriptor.reinterpret if hasattr(_descriptor, "reinterpret") else _descriptor._reinterpret  # Triton 3.6

_GROUP_M = gl.constexpr(16)  # rows of tiles that are walked together, so that L2 keeps the operands
_FINISHERS = gl.constexpr(4)  # warps
SUMS = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
"""Of a tile's sums in shared memory: runs of 16 bytes, swizzled. Neither what is written by 8 rows nor what is read by
one meets in a bank."""


@gluon.jit
def place_of(
    i, M, N, steps, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, SPLIT_K: gl.constexpr,
    BY_ROWS: gl.constexpr = False, FIRST: gl.constexpr = False,
):  # fmt: skip
    """Of step `i` of this program: the tile's first row and column, its part of K, and the step over K as a whole.

    BY_ROWS: tiles follow each other along rows of tiles, so that how many rows there are decides no tile's place.
    FIRST: the step is one of the first tile, which is known without a division.
    """
    tile, step = gl.program_id(0), i
    if not FIRST:
        tile += i // steps * gl.num_programs(0)
        step = i % steps
    m, n = place_of_tile(tile // SPLIT_K, M, N, BLOCK_M, BLOCK_N, BY_ROWS)
    split = tile % SPLIT_K
    return m, n, split, split * steps + step


@gluon.jit
def place_of_tile(tile, M, N, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BY_ROWS: gl.constexpr):
    """The tile's first row and column."""
    if BY_ROWS:
        columns = gl.cdiv(N, BLOCK_N)
        row = tile // columns
        column = tile % columns
    else:
        row, column = tile_of(tile, gl.cdiv(M, BLOCK_M), gl.cdiv(N, BLOCK_N), _GROUP_M)
    return row * BLOCK_M, column * BLOCK_N


@gluon.jit
def live_size(size, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, SPLIT_K: gl.constexpr):
    """The rows that are wanted, and how many of this program's tiles have some. To be asked once the kernels before
    are done, one of which counts the rows."""
    M, N, live_ptr = size[0], size[1], size[3]
    if live_ptr is not None:
        M = gl.minimum(M, gl.load(live_ptr))
    return M, tiles_of(M, N, BLOCK_M, BLOCK_N, SPLIT_K)


@gluon.jit
def tiles_of(M, N, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, SPLIT_K: gl.constexpr):
    """How many tiles this program has, of all rows."""
    tiles = gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N) * SPLIT_K
    return gl.cdiv(tiles - gl.program_id(0), gl.num_programs(0))


@gluon.jit
def biased(acc, bias_ptr, stride_bias, n, N):
    """A tile's sums and the bias of columns `n`, if there is one."""
    if bias_ptr is not None:
        acc += gl.load(bias_ptr + n * stride_bias, mask=n < N, other=0.0).to(gl.float32)[None, :]
    return acc


@gluon.jit
def _with_residual(
    acc, first_m, first_n, M, N, epilogue, stride_n, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, ROW: gl.constexpr
):  # fmt: skip
    """A tile and its residual, if there is one. Rows are divided as ROW: int32 takes half the time."""
    residual_ptr, residual_inner, stride_outer, stride_inner = epilogue[2], epilogue[3], epilogue[4], epilogue[5]
    LAYOUT: gl.constexpr = acc.type.layout
    if residual_ptr is not None:
        n = first_n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT))
        m = first_m + gl.arange(0, BLOCK_M, gl.SliceLayout(1, LAYOUT)).to(ROW)
        rows = (m // residual_inner).to(gl.int64) * stride_outer + (m % residual_inner).to(gl.int64) * stride_inner
        residual = residual_ptr + rows[:, None] + (n.to(gl.int64) * stride_n)[None, :]
        acc += gl.load(residual, mask=(m < M)[:, None] & (n < N)[None, :], other=0.0).to(gl.float32)
    return acc


@gluon.jit
def write(
    acc, first_m, first_n, split, M, N, epilogue, out_ptr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """Adds the residual to a tile and writes it."""
    acc = _with_residual(acc, first_m, first_n, M, N, epilogue, epilogue[6], BLOCK_M, BLOCK_N, gl.int64)
    store(acc, first_m, first_n, split, M, N, out_ptr, BLOCK_M, BLOCK_N, WARPS)


@gluon.jit
def store(
    acc, first_m, first_n, split, M, N, out_ptr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, WARPS: gl.constexpr
):  # fmt: skip
    """Writes a tile, 16 bytes by each thread, side by side."""
    WIDE: gl.constexpr = 128 // out_ptr.dtype.element_ty.primitive_bitwidth
    ACROSS: gl.constexpr = min(32, BLOCK_N // WIDE)
    OUT: gl.constexpr = gl.BlockedLayout([1, WIDE], [32 // ACROSS, ACROSS], [WARPS, 1], [1, 0])
    result = gl.convert_layout(acc.to(out_ptr.dtype.element_ty), OUT)
    rows = split * M + first_m + gl.arange(0, BLOCK_M, gl.SliceLayout(1, OUT)).to(gl.int64)
    columns = first_n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, OUT))
    inside = (rows < (split + 1) * M)[:, None] & (columns < N)[None, :]
    gl.store(out_ptr + (rows * N)[:, None] + columns[None, :], result, mask=inside)


@gluon.jit
def handing_over(bias_ptr, DTYPE: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, OTHER_N: gl.constexpr):
    """What a team needs to leave its sums, of two products if OTHER_N, to the one that finishes them: shared memory for
    the sums and the bias, a barrier for when the sums are there and one for when the bias is, and no older sums."""
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    first = gl.allocate_shared_memory(DTYPE, [BLOCK_M, BLOCK_N], SUMS)
    sums = (first, first)  # Triton 3.6 returns no None: what there is not stands as something that there is
    if OTHER_N > 0:
        sums = (first, gl.allocate_shared_memory(DTYPE, [BLOCK_M, OTHER_N], SUMS))
    biases = sums
    if bias_ptr is not None:
        line = gl.allocate_shared_memory(gl.float32, [BLOCK_N], LINE)
        biases = (line, line)
        if OTHER_N > 0:
            biases = (line, gl.allocate_shared_memory(gl.float32, [OTHER_N], LINE))
    left = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(left.index(0), count=1)
    mbarrier.init(taken.index(0), count=1)
    return (sums, biases, left, taken)


@gluon.jit
def teams_turns(
    DTYPE: gl.constexpr, TEAMS: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, OTHER_N: gl.constexpr
):  # fmt: skip
    """For teams that multiply in turn: shared memory for the sums of each, unless they are of two products, and a
    barrier for each turn."""
    turns = gl.allocate_shared_memory(gl.int64, [TEAMS, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(TEAMS):
        mbarrier.init(turns.index(s), count=1)
    sums = turns
    if OTHER_N == 0:
        sums = gl.allocate_shared_memory(DTYPE, [TEAMS, BLOCK_M, BLOCK_N], SUMS)
    return (sums, turns)


@gluon.jit
def hand_over(acc, other, handover, bias_ptr, turn, OTHER_N: gl.constexpr):
    """Leaves a tile's sums with the bias to the team that finishes it, when that has put the bias there and is done
    with the tile before. They are rounded, as is what eager's activation gets."""
    sums, biases, left, taken = handover
    mbarrier.wait(taken.index(0), turn & 1)
    _leave(acc, sums[0], biases[0], bias_ptr)
    if OTHER_N > 0:
        _leave(other, sums[1], biases[1], bias_ptr)
    mbarrier.arrive(left.index(0), count=1)


@gluon.jit
def _leave(acc, sums, bias, bias_ptr):
    if bias_ptr is not None:
        acc += bias.load(gl.SliceLayout(0, acc.type.layout))[None, :]
    sums.store(acc.to(sums.dtype))


@gluon.jit
def finish_rows(
    sums, start, stop, first_m, first_n, M, N, epilogue, stride_n, out_ptr, ACTIVATION: gl.constexpr,
    GATED: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, MORE_N: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Rows from `start` up to `stop` of the sums that were left: their activation, the residual, and written."""
    ROWS: gl.constexpr = (4 if GATED or epilogue[2] is not None else 8) * WARPS  # at once: as registers allow
    for i in range(start // ROWS, stop // ROWS):
        m = first_m + i * ROWS
        acc = activate(take(sums[0], i, BLOCK_M, ROWS, WARPS), ACTIVATION)
        if GATED:
            acc *= take(sums[1], i, BLOCK_M, ROWS, WARPS)
        acc = _with_residual(acc, m, first_n, M, N, epilogue, stride_n, ROWS, BLOCK_N, gl.int32)
        store(acc, m, first_n, 0, M, N, out_ptr, ROWS, BLOCK_N, WARPS)
        if MORE_N > 0:
            more = activate(take(sums[1], i, BLOCK_M, ROWS, WARPS), ACTIVATION)
            more = _with_residual(more, m, first_n + BLOCK_N, M, N, epilogue, stride_n, ROWS, MORE_N, gl.int32)
            store(more, m, first_n + BLOCK_N, 0, M, N, out_ptr, ROWS, MORE_N, WARPS)


@gluon.jit
def finish_alone(
    acc, sums, first_m, first_n, M, N, epilogue, out_ptr, ACTIVATION: gl.constexpr, WARPS: gl.constexpr
):  # fmt: skip
    """Finishes a tile by way of shared memory, in a loop: code for all that is in registers would be some thousand
    instructions, which take longer to come from memory than to run."""
    MMA: gl.constexpr = acc.type.layout
    BLOCK_M: gl.constexpr = acc.shape[0]
    BLOCK_N: gl.constexpr = acc.shape[1]
    columns = first_n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, MMA))
    sums.store(biased(acc, epilogue[0], epilogue[1], columns, N).to(sums.dtype))
    finish_rows(
        (sums, sums), 0, BLOCK_M, first_m, first_n, M, N, epilogue, epilogue[6], out_ptr, ACTIVATION, False, BLOCK_M,
        BLOCK_N, 0, WARPS,
    )  # fmt: skip


@gluon.jit
def take(sums, i, BLOCK_M: gl.constexpr, ROWS: gl.constexpr, WARPS: gl.constexpr):
    """The `i`th ROWS of a tile's sums, which lie in one piece, as `store` has them: 16 bytes a thread."""
    COLUMNS: gl.constexpr = sums.shape[1]
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLUMNS, COLUMNS // 8], [WARPS, 1], [1, 0])
    rows = reinterpret(sums, sums.dtype, [BLOCK_M // ROWS, ROWS, COLUMNS], sums.layout)
    return rows.index(i).load(OUT).to(gl.float32)


@gluon.jit
def finish(
    handover, size, epilogue, stride_n, out_ptr, ACTIVATION: gl.constexpr, GATED: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, MORE_N: gl.constexpr, SHARE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Four warps: they finish the tiles whose sums are left to them; of the last one only the rows from `SHARE` on, as
    those who multiplied have nothing else to do. The residual's `stride_n` comes by itself: in a tuple it would not be
    known to be 1, and the loads would be narrow."""
    biases, left, taken = handover[1], handover[2], handover[3]
    N, steps = size[1], size[2]
    BY_ROWS: gl.constexpr = size[3] is not None
    if PDL:
        tl_cuda.gdc_wait()
    M, mine = live_size(size, BLOCK_M, BLOCK_N + MORE_N, 1)
    for turn in range(0, mine):
        m, n, _, _ = place_of(turn * steps, M, N, steps, BLOCK_M, BLOCK_N + MORE_N, 1, BY_ROWS)
        put_bias(biases[0], epilogue[0], epilogue[1], n, N, BLOCK_N)
        if GATED:
            put_bias(biases[1], epilogue[0], epilogue[1], N + n, 2 * N, BLOCK_N)
        elif MORE_N > 0:
            put_bias(biases[1], epilogue[0], epilogue[1], n + BLOCK_N, N, MORE_N)
        mbarrier.arrive(taken.index(0), count=1)
        start = 0
        if turn == mine - 1:
            start = SHARE
        mbarrier.wait(left.index(0), turn & 1)
        finish_rows(
            handover[0], start, BLOCK_M, m, n, M, N, epilogue, stride_n, out_ptr, ACTIVATION, GATED, BLOCK_M, BLOCK_N,
            MORE_N, _FINISHERS,
        )  # fmt: skip


@gluon.jit
def put_bias(bias, bias_ptr, stride_bias, first_n, N, COLUMNS: gl.constexpr):
    """Puts the bias of a tile's columns where `hand_over` takes it from, if there is one."""
    if bias_ptr is not None:
        n = first_n + gl.arange(0, COLUMNS, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
        bias.store(gl.load(bias_ptr + n * stride_bias, mask=n < N, other=0.0).to(gl.float32))
