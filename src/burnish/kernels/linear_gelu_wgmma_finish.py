"""How warps of `linear_gelu_wgmma` finish a tile: GELU, or backward its slope at x, whose rows are asked for ahead."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.extra import cuda as tl_cuda

from burnish.kernels.activations import activate
from burnish.kernels.gate_backward import activate_with_slope
from burnish.kernels.matmul_wgmma_finish import place_of, put_bias, store, take


@gluon.jit
def finish(
    handover, size, bias_ptr, stride_bias, x_ptr, out_ptr, hidden_ptr, parts_ptr, ACTIVATION: gl.constexpr,
    KEEP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, MORE_N: gl.constexpr, SHARE: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """FINISHERS warps: they finish the tiles whose sums are left to them, of the last one the rows from `SHARE` on."""
    sums, biases, left, taken = handover
    M, N, steps, mine = size[0], size[1] * 8, size[2], size[3]
    if PDL:
        tl_cuda.gdc_wait()
    for turn in range(0, mine):
        m, n, _, _ = place_of(turn * steps, M, N, steps, BLOCK_M, BLOCK_N + MORE_N, 1)
        put_bias(biases[0], bias_ptr, stride_bias, n, N, BLOCK_N)
        if MORE_N > 0:
            put_bias(biases[1], bias_ptr, stride_bias, n + BLOCK_N, N, MORE_N)
        mbarrier.arrive(taken.index(0), count=1)
        start = 0
        if turn == mine - 1:
            start = SHARE
        elif x_ptr is not None:  # the other team adds nothing to the sums of this tile's columns
            _put_nothing(parts_ptr, m, n, N, BLOCK_M, BLOCK_N)
            if MORE_N > 0:
                _put_nothing(parts_ptr, m, n + BLOCK_N, N, BLOCK_M, MORE_N)
        # What the first rows need of x is asked for before their sums are there.
        ahead = _ahead(x_ptr, m + start, m + BLOCK_M, n, M, N, BLOCK_N, gl.num_warps())
        if MORE_N > 0:
            more = _ahead(x_ptr, m + start, m + BLOCK_M, n + BLOCK_N, M, N, MORE_N, gl.num_warps())
        mbarrier.wait(left.index(0), turn & 1)
        _finish_rows(
            sums[0], ahead, start, BLOCK_M, m, n, M, N, x_ptr, out_ptr, hidden_ptr, parts_ptr, 0, ACTIVATION, KEEP,
            BLOCK_M, BLOCK_N, gl.num_warps(),
        )  # fmt: skip
        if MORE_N > 0:
            _finish_rows(
                sums[1], more, start, BLOCK_M, m, n + BLOCK_N, M, N, x_ptr, out_ptr, hidden_ptr, parts_ptr, 0,
                ACTIVATION, KEEP, BLOCK_M, MORE_N, gl.num_warps(),
            )  # fmt: skip


@gluon.jit
def finish_columns(
    sums, start, stop, first_m, first_n, M, N, x_ptr, out_ptr, hidden_ptr, parts_ptr, team: gl.constexpr,
    ACTIVATION: gl.constexpr, KEEP: gl.constexpr, BLOCK_M: gl.constexpr, COLUMNS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """`_finish_rows` where nothing was asked for yet."""
    ahead = _ahead(x_ptr, first_m + start, first_m + stop, first_n, M, N, COLUMNS, WARPS)
    _finish_rows(
        sums, ahead, start, stop, first_m, first_n, M, N, x_ptr, out_ptr, hidden_ptr, parts_ptr, team, ACTIVATION, KEEP,
        BLOCK_M, COLUMNS, WARPS,
    )  # fmt: skip


@gluon.jit
def _finish_rows(
    sums, ahead, start, stop, first_m, first_n, M, N, x_ptr, out_ptr, hidden_ptr, parts_ptr, team: gl.constexpr,
    ACTIVATION: gl.constexpr, KEEP: gl.constexpr, BLOCK_M: gl.constexpr, COLUMNS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Rows from `start` up to `stop` of the sums that were left, some at once: as they are and through the activation,
    or, where there is an x, times its slope there, with the activation of x and with sums of columns.

    `ahead` are the first rows of x, which were asked for before. A turn of the loop takes as many as there are, and
    asks for the next ones into the same registers: handed from one to the other, each would be waited for.
    """
    ROWS: gl.constexpr = _at_once(COLUMNS, WARPS)
    LAYOUT: gl.constexpr = _layout(COLUMNS, WARPS)
    total = gl.zeros((ROWS, COLUMNS), gl.float32, LAYOUT)
    first, second, third, fourth = ahead
    for i in range(start // ROWS, stop // ROWS, _turns(COLUMNS, WARPS)):
        total, first = _finish_some(
            sums, first, total, i, stop, first_m, first_n, M, N, x_ptr, out_ptr, hidden_ptr, ACTIVATION, KEEP, BLOCK_M,
            COLUMNS, WARPS,
        )  # fmt: skip
        total, second = _finish_some(
            sums, second, total, i + 1, stop, first_m, first_n, M, N, x_ptr, out_ptr, hidden_ptr, ACTIVATION, KEEP,
            BLOCK_M, COLUMNS, WARPS,
        )  # fmt: skip
        if _turns(COLUMNS, WARPS) == 4:
            total, third = _finish_some(
                sums, third, total, i + 2, stop, first_m, first_n, M, N, x_ptr, out_ptr, hidden_ptr, ACTIVATION, KEEP,
                BLOCK_M, COLUMNS, WARPS,
            )  # fmt: skip
            total, fourth = _finish_some(
                sums, fourth, total, i + 3, stop, first_m, first_n, M, N, x_ptr, out_ptr, hidden_ptr, ACTIVATION, KEEP,
                BLOCK_M, COLUMNS, WARPS,
            )  # fmt: skip
    if x_ptr is not None:
        _put_part(gl.sum(total, 0), parts_ptr, first_m, first_n, N, team, BLOCK_M, COLUMNS)


@gluon.jit
def _finish_some(
    sums, x, total, i, stop, first_m, first_n, M, N, x_ptr, out_ptr, hidden_ptr, ACTIVATION: gl.constexpr,
    KEEP: gl.constexpr, BLOCK_M: gl.constexpr, COLUMNS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """The `i`th rows. Returns the sums of columns with theirs, and the rows of x that come a turn later."""
    ROWS: gl.constexpr = _at_once(COLUMNS, WARPS)
    m = first_m + i * ROWS
    if x_ptr is None:
        value = take(sums, i, BLOCK_M, ROWS, WARPS)
        hidden = activate(value, ACTIVATION)
    else:
        wide = x.to(gl.float32)
        x = _rows(x_ptr, m + _turns(COLUMNS, WARPS) * ROWS, first_m + stop, first_n, M, N, COLUMNS, WARPS)
        hidden, slope = activate_with_slope(wide, ACTIVATION)
        value = take(sums, i, BLOCK_M, ROWS, WARPS) * slope
        total += value
    store(value, m, first_n, 0, M, N, out_ptr, ROWS, COLUMNS, WARPS)
    if KEEP:
        store(hidden, m, first_n, 0, M, N, hidden_ptr, ROWS, COLUMNS, WARPS)
    return total, x


@gluon.constexpr_function
def _layout(columns, warps):
    """That of `take` and `store`: 16 bytes a thread."""
    return gl.BlockedLayout([1, 8], [256 // columns, columns // 8], [warps, 1], [1, 0])


@gluon.constexpr_function
def _at_once(columns, warps):
    """How many rows: 8 entries a thread, or 16 of four warps, which have the registers and nobody who hides waits."""
    return 16 if warps == 4 else warps * (256 // columns)


@gluon.constexpr_function
def _turns(columns, warps):
    """How many of them, one after the other, have rows of x on their way. They divide what a team finishes."""
    return 4 if columns == 128 and warps == 8 else 2


@gluon.jit
def _ahead(x_ptr, m, stop, first_n, M, N, COLUMNS: gl.constexpr, WARPS: gl.constexpr):
    """The first rows of x: four times as many as are finished at once, or twice and nothing."""
    if x_ptr is None:
        first, second, third, fourth = m, m, m, m  # Triton 3.6 returns no None: what there is not stands as something
    else:
        ROWS: gl.constexpr = _at_once(COLUMNS, WARPS)
        first = _rows(x_ptr, m, stop, first_n, M, N, COLUMNS, WARPS)
        second = _rows(x_ptr, m + ROWS, stop, first_n, M, N, COLUMNS, WARPS)
        third, fourth = m, m
        if _turns(COLUMNS, WARPS) == 4:
            third = _rows(x_ptr, m + 2 * ROWS, stop, first_n, M, N, COLUMNS, WARPS)
            fourth = _rows(x_ptr, m + 3 * ROWS, stop, first_n, M, N, COLUMNS, WARPS)
    return first, second, third, fourth


@gluon.jit
def _rows(x_ptr, first_m, stop, first_n, M, N, COLUMNS: gl.constexpr, WARPS: gl.constexpr):
    """Rows of x from `first_m` on, those before `stop`."""
    LAYOUT: gl.constexpr = _layout(COLUMNS, WARPS)
    m = first_m + gl.arange(0, _at_once(COLUMNS, WARPS), gl.SliceLayout(1, LAYOUT))
    n = first_n + gl.arange(0, COLUMNS, gl.SliceLayout(0, LAYOUT))
    inside = ((m < M) & (m < stop))[:, None] & (n < N)[None, :]
    return gl.load(x_ptr + (m.to(gl.int64) * N)[:, None] + n[None, :], mask=inside, other=0.0)


@gluon.jit
def _put_part(total, parts_ptr, first_m, first_n, N, team: gl.constexpr, BLOCK_M: gl.constexpr, COLUMNS: gl.constexpr):
    """What a team found to add up of a tile's columns: two lines for each row of tiles, one for each team."""
    n = first_n + gl.arange(0, COLUMNS, total.type.layout)
    gl.store(parts_ptr + (first_m // BLOCK_M * 2 + team) * N + n, total, mask=n < N)


@gluon.jit
def _put_nothing(parts_ptr, first_m, first_n, N, BLOCK_M: gl.constexpr, COLUMNS: gl.constexpr):
    zeros = gl.zeros((COLUMNS,), gl.float32, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    _put_part(zeros, parts_ptr, first_m, first_n, N, 1, BLOCK_M, COLUMNS)
