"""`norm(x @ weight.T + bias + residual)` on Hopper in one kernel: programs that share rows exchange their statistics.

The tiles of a row of tiles belong to as many programs as follow each other, a gang. Each sums its tile, adds bias and
residual, which wait in shared memory, and leaves its rows' mean and sum of squared distances for the others, in words
that say by themselves that they are there. With all of them each normalizes the tile that it still holds in registers:
the sums are not written and read again, and no second kernel has to start. A gang waits only for its own members.
Programs start in order, so no more than one gang of a kernel is ever incomplete, and those that are complete come to an
end: nobody waits for ever.
Source of the statistics of parts: Chan, Golub, LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing
Sample Variances", 1979.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra import cuda as tl_cuda

from burnish.kernels.counters import counters
from burnish.kernels.launch import Config, launch, target_of
from burnish.kernels.layout import rows_of
from burnish.kernels.matmul_configs import Product
from burnish.kernels.matmul_wgmma_fill import ask_for_weight, ask_for_x, asked_ahead, async_load, described
from burnish.kernels.matmul_wgmma_finish import live_size, place_of, store

_SIGN = gl.constexpr(-(1 << 63))


@gluon.jit
def leave(counter):
    """By one thread of each warp: it is done with what this counter is for, its own place from here on. What the
    counter was, in that thread."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 t, w; .reg .b64 a; mov.u32 t, %tid.x; shr.u32 w, t, 5; and.b32 t, t, 31; "
        "setp.eq.u32 p, t, 0; mad.wide.u32 a, w, 4, $1; @p atom.relaxed.gpu.global.add.u32 $0, [a], 1; }",
        "=r,l", [counter], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def last_to_leave(counter, before, count):
    """Whether a warp, which was told what its counter was `before`, is the last of `count`; it sets it to 0 again."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred p, q; .reg .b32 t, w; .reg .b64 a; mov.u32 t, %tid.x; shr.u32 w, t, 5; and.b32 t, t, 31; "
        "setp.eq.u32 q, t, 0; mad.wide.u32 a, w, 4, $1; shfl.sync.idx.b32 t, $2, 0, 31, 0xffffffff; "
        "add.u32 t, t, 1; setp.eq.u32 p, t, $3; selp.b32 $0, 1, 0, p; and.pred p, p, q; "
        "@p st.relaxed.gpu.global.u32 [a], 0; }",
        "=&r,l,r,r", [counter, before, count], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _word(mean, squares):
    """Both in 64 bits, which are written and read as one. The sign, of no use to squares, says that they are there."""
    high = squares.to(gl.int32, bitcast=True).to(gl.int64) << 32
    low = mean.to(gl.int32, bitcast=True).to(gl.int64) & 0xFFFFFFFF
    return high | low | _SIGN


@gluon.jit
def _all_together(
    words, N, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, COLUMNS: gl.constexpr, RMS: gl.constexpr,
    WHOLE: gl.constexpr,
):  # fmt: skip
    """Rows' means and sums of squared distances, from those of each tile, and how many tiles' are not there yet."""
    for c in gl.static_range(COLUMNS):
        word = gl.load(words + c * BLOCK_M, volatile=True)
        theirs = ((word >> 32).to(gl.int32) & 0x7FFFFFFF).to(gl.float32, bitcast=True)
        apart = word.to(gl.int32).to(gl.float32, bitcast=True)
        if c == 0:
            missing = gl.where(word < 0, 0, 1)
            mean, squares = apart, theirs
        else:
            missing += gl.where(word < 0, 0, 1)
            squares += theirs
            if not RMS:
                share = 1.0 / (c + 1)
                if not WHOLE:
                    share = gl.minimum(N - c * BLOCK_N, BLOCK_N).to(gl.float32) / gl.minimum(N, c * BLOCK_N + BLOCK_N)
                apart -= mean
                mean += share * apart
                squares += c * BLOCK_N * share * apart * apart
    return mean, squares, missing


@gluon.jit
def _fill(
    x_desc, weight_desc, residual_desc, stages, handed, size, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    FIRST: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """One warp, as `matmul_wgmma`'s. Each tile's residual is asked for behind the last of its steps."""
    xs, weights, full, empty = stages
    residual, came, taken = handed
    M, N, steps = size[0], size[1], size[2]
    descs, buffers = (weight_desc, None), (weights, None)
    asked = asked_ahead(x_desc, M, N, steps, BLOCK_N, 1, STAGES, FIRST)
    for i in gl.static_range(STAGES):
        ask_for_weight(x_desc, descs, buffers, full, i, asked, M, N, steps, False, BLOCK_N, 1, STAGES, True, FIRST)
    if PDL:
        tl_cuda.gdc_launch_dependents()
        tl_cuda.gdc_wait()
    for i in gl.static_range(STAGES):
        ask_for_x(x_desc, xs, full, i, asked, M, N, steps, BLOCK_N, 1, STAGES, True, FIRST)
    M, mine = live_size(size, x_desc.block_shape[0], BLOCK_N, 1)
    total = mine * steps
    for turn in range(mine):
        for step in range(gl.maximum(turn * steps, STAGES), (turn + 1) * steps):
            mbarrier.wait(empty.index(step % STAGES), (step // STAGES - 1) & 1)
            ask_for_weight(
                x_desc, descs, buffers, full, step, total, M, N, steps, False, BLOCK_N, 1, STAGES, True, False
            )
            ask_for_x(x_desc, xs, full, step, total, M, N, steps, BLOCK_N, 1, STAGES, True, False)
        m, n, _, _ = place_of(turn * steps, M, N, steps, x_desc.block_shape[0], BLOCK_N, 1, True)
        mbarrier.wait(taken.index(0), (turn - 1) & 1, pred=turn > 0)
        mbarrier.expect(came.index(0), residual_desc.block_type.nbytes)
        async_load(residual_desc, [m, n], came.index(0), residual)
    for i in gl.static_range(STAGES):
        mbarrier.wait(full.index(i), 0, pred=(i >= total) & (i < asked))


@gluon.jit
def _multiply(
    stages, handed, size, eps, vectors, results, counters_ptr, words_ptr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, COLUMNS: gl.constexpr, RMS: gl.constexpr, WHOLE: gl.constexpr, STAGES: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """The other warps: they multiply, exchange and normalize."""
    xs, weights, full, empty = stages
    residual, came, taken = handed
    N, steps = size[1], size[2]
    bias_ptr, stride_bias, weight_ptr, stride_weight, shift_ptr, stride_shift = vectors
    out_ptr, total_ptr = results
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_N, 16])
    LINE: gl.constexpr = gl.SliceLayout(0, MMA)
    rows = gl.arange(0, BLOCK_M, gl.SliceLayout(1, MMA))
    member = gl.program_id(0) % COLUMNS
    n = member * BLOCK_N
    column = n + gl.arange(0, BLOCK_N, LINE)
    inside = (column < N) | WHOLE
    if bias_ptr is not None:
        bias = gl.load(bias_ptr + column * stride_bias, mask=inside, other=0.0)
    if PDL:
        tl_cuda.gdc_wait()
    M, mine = live_size(size, BLOCK_M, BLOCK_N, 1)
    for turn in range(mine):
        acc = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, MMA)
        for i in range(turn * steps, (turn + 1) * steps):
            stage = i % STAGES
            mbarrier.wait(full.index(stage), i // STAGES & 1)
            acc = warpgroup_mma(xs.index(stage), weights.index(stage).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            # The step before this one is done: its stage may be filled again.
            mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), count=1, pred=i > turn * steps)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(((turn + 1) * steps - 1) % STAGES), count=1)

        if bias_ptr is not None:
            acc += bias.to(gl.float32)[None, :]
        mbarrier.wait(came.index(0), turn & 1)
        acc += residual.load(MMA).to(gl.float32)
        mbarrier.arrive(taken.index(0), count=1)
        acc = acc.to(out_ptr.dtype.element_ty).to(gl.float32)  # columns and rows beyond the last are 0
        m, _, _, _ = place_of(turn * steps, M, N, steps, BLOCK_M, BLOCK_N, 1, True)
        words = words_ptr + m * COLUMNS + rows  # of this row of tiles: a line for each of them
        mean = gl.zeros((BLOCK_M,), gl.float32, gl.SliceLayout(1, MMA))
        centred = acc
        if not RMS:
            if WHOLE:
                mean = gl.sum(acc, 1) * (1.0 / BLOCK_N)
                centred = acc - mean[:, None]
            else:
                mean = gl.sum(acc, 1) / gl.minimum(N - n, BLOCK_N).to(gl.float32)
                centred = gl.where(inside[None, :], acc - mean[:, None], 0.0)
        squares = gl.sum(centred * centred, 1)
        gl.store(words + member * BLOCK_M, _word(mean, squares), mask=rows < BLOCK_M)
        # On its way, in or out, while others are waited for.
        if total_ptr is not None:
            store(acc, m, n, 0, M, N, total_ptr, BLOCK_M, BLOCK_N, gl.num_warps())
        if weight_ptr is not None:
            weight = gl.load(weight_ptr + column * stride_weight, mask=inside, other=0.0)
        if shift_ptr is not None:
            shift = gl.load(shift_ptr + column * stride_shift, mask=inside, other=0.0)
        mean, squares, missing = _all_together(words, N, BLOCK_M, BLOCK_N, COLUMNS, RMS, WHOLE)
        while gl.max(missing, 0) > 0:
            mean, squares, missing = _all_together(words, N, BLOCK_M, BLOCK_N, COLUMNS, RMS, WHOLE)
        counter = counters_ptr + m // BLOCK_M * gl.num_warps()
        before = leave(counter)
        acc = (acc - mean[:, None]) * gl.rsqrt(squares / N + eps)[:, None]
        if weight_ptr is not None:
            acc *= weight.to(gl.float32)[None, :]
        if shift_ptr is not None:
            acc += shift.to(gl.float32)[None, :]
        store(acc, m, n, 0, M, N, out_ptr, BLOCK_M, BLOCK_N, gl.num_warps())
        last = last_to_leave(counter, before, COLUMNS)
        for c in gl.static_range(COLUMNS):
            nothing = gl.zeros((BLOCK_M,), gl.int64, gl.SliceLayout(1, MMA))
            gl.store(words + c * BLOCK_M, nothing, mask=(rows < BLOCK_M) & (last != 0))


@gluon.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["live_ptr"])
def linear_norm_wgmma_kernel(
    x_desc,  # (M, K)
    weight_desc,  # (N, K)
    residual_desc,  # (M, N)
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    out_ptr,  # (M, N)
    total_ptr,  # the same, or None
    counters_ptr,  # (blocks of rows, warps) of int32, all 0 before and after
    words_ptr,  # (blocks of rows, tiles in each, BLOCK_M) of int64, all 0 before and after
    M,
    N,
    K,
    stride_bias,
    stride_norm_weight,
    stride_norm_bias,
    eps,
    live_ptr,  # how many rows are wanted, or None for all
    RMS: gl.constexpr,
    COLUMNS: gl.constexpr,  # tiles in a row of them
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    WHOLE: gl.constexpr,  # whether no tile hangs over the last column
    FIRST: gl.constexpr,  # whether the first STAGES steps are all of a program's first tile
    FILL_REGISTERS: gl.constexpr,
    PDL: gl.constexpr,
):
    xs = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BLOCK_M, BLOCK_K], x_desc.layout)
    weights = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BLOCK_N, BLOCK_K], weight_desc.layout)
    residual = gl.allocate_shared_memory(x_desc.dtype, [BLOCK_M, BLOCK_N], residual_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    came = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(came.index(0), count=1)
    mbarrier.init(taken.index(0), count=1)
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=1)

    stages = (xs, weights, full, empty)
    handed = (residual, came, taken)
    size = (M, N, gl.cdiv(K, BLOCK_K), live_ptr)
    vectors = (bias_ptr, stride_bias, norm_weight_ptr, stride_norm_weight, norm_bias_ptr, stride_norm_bias)
    results = (out_ptr, total_ptr)
    gl.warp_specialize(
        [
            (_multiply, (stages, handed, size, eps, vectors, results, counters_ptr, words_ptr, BLOCK_M, BLOCK_N,
                         COLUMNS, RMS, WHOLE, STAGES, PDL)),
            (_fill, (x_desc, weight_desc, residual_desc, stages, handed, size, BLOCK_N, STAGES, FIRST, PDL)),
        ],
        [1],
        [FILL_REGISTERS],
    )  # fmt: skip


def linear_norm_wgmma(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    rms: bool,
    keep_sum: bool,
    config: Config | None = None,
    live_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`norm(x @ weight.T + bias + residual)` and the sum that it normalizes, rounded to x's dtype.

    Without `keep_sum` the sum is not written, and the second result is empty.

    Shapes: x (..., K), weight (N, K), bias, norm_weight and norm_bias (N,) or None, residual and the contiguous results
    (..., N). x and residual have one stride for their rows; theirs and weight's are contiguous and start at multiples
    of 16 bytes. N is no more than a tile for each multiprocessor.
    Dtypes: float16 or bfloat16, the norm's weights may differ. Products and sums are float32. Compute capability 9.0.
    Rows of the results from `live_rows` on, an int32 on the device, are left as they are.
    """
    config = config or linear_norm_wgmma_configs(Product.of(x, weight))[0]
    block_m, block_n, block_k = (config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    (N, K), rows, extra = weight.shape, rows_of(x), rows_of(residual)
    assert rows is not None
    assert extra is not None
    out = x.new_empty(residual.shape)
    total = torch.empty_like(out) if keep_sum else None
    blocks, columns = triton.cdiv(rows.count, block_m), triton.cdiv(N, block_n)
    steps = (1 if vector is None else vector.stride(0) for vector in (bias, norm_weight, norm_bias))
    zeros = counters(x, blocks * (config.num_warps + columns * block_m * 2))
    threads = 32 * (config.num_warps + 4)
    registers = min(255, 65536 // threads // 8 * 8)
    first = triton.cdiv(K, block_k) >= config["STAGES"]
    launch(
        linear_norm_wgmma_kernel,
        (min(blocks, max(1, target_of(x).num_sms // columns)) * columns,),  # whole gangs, all of which run at once
        described(x, rows.count, K, rows.stride_inner, block_m, block_k),
        described(weight, N, K, weight.stride(0), block_n, block_k),
        described(residual, rows.count, N, extra.stride_inner, block_m, block_n),
        *(bias, norm_weight, norm_bias, out, total),
        *(zeros[: blocks * config.num_warps], zeros[blocks * config.num_warps :].view(torch.int64)),
        *(rows.count, N, K, *steps, eps, live_rows),
        config=config,
        like=x,
        registers=registers,
        RMS=rms,
        COLUMNS=columns,
        WHOLE=N % block_n == 0,
        FIRST=first,
        FILL_REGISTERS=56 if not first else 24 if threads == 256 else 40,  # without divisions it needs few
    )
    return out, out.new_empty(0) if total is None else total


def linear_norm_wgmma_configs(product: Product) -> list[Config]:
    """Configs of `linear_norm_wgmma`, the most promising first; none where no gang has room on the device.

    With eight warps only where a tile's steps over K fill the stages: the warp that fills them needs divisions
    otherwise, and so more registers than eight warps leave.
    """
    shapes = [(64, 64, 128, 4, 4), (64, 64, 64, 8, 4), (128, 128, 64, 4, 8), (128, 128, 64, 5, 8)]
    if product.rows > 1024:
        shapes.reverse()
    return [
        Config.of(warps, 1, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, STAGES=stages)
        for m, n, k, stages, warps in shapes
        if triton.cdiv(product.columns, n) <= product.target.num_sms
        and (warps == 4 or product.depth > (stages - 1) * k)
    ]
