"""Products in front of GELU in training, on Hopper by warps with roles: forward what GELU is given is kept, backward
GELU and its slope are worked out again, and the gradient is added up for the bias.

As `burnish.kernels.matmul_wgmma` with a team that finishes tiles, which here has more to do: it reads x, which it asks
for some rows ahead, and writes two results. Nothing is added by atomics: each tile leaves the sums of its columns,
which a small kernel adds up in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra import cuda as tl_cuda

from burnish.kernels.activations import in_half
from burnish.kernels.launch import Config, cdiv, launch, target_of
from burnish.kernels.layout import rows_of
from burnish.kernels.linear_gelu_wgmma_finish import finish, finish_columns
from burnish.kernels.matmul_wgmma_fill import async_load, described
from burnish.kernels.matmul_wgmma_finish import hand_over, handing_over, place_of
from burnish.kernels.norms_backward import add_parts


@gluon.jit
def _fill(
    x_desc, descs, stages, size, COLUMNS: gl.constexpr, STAGES: gl.constexpr, TURNED: gl.constexpr, PDL: gl.constexpr
):
    """One warp: it keeps the stages filled. In training weights are cast right before: they are waited for, too."""
    xs, weights, full, empty = stages
    M, N, steps, mine = size[0], size[1] * 8, size[2], size[3]
    first, other = descs
    if PDL:
        tl_cuda.gdc_wait()
    nbytes: gl.constexpr = x_desc.block_type.nbytes + first.block_type.nbytes
    for i in range(0, mine * steps):
        stage = i % STAGES
        m, n, _, step = place_of(i, M, N, steps, x_desc.block_shape[0], COLUMNS, 1)
        k = step * x_desc.block_shape[1]
        barrier = full.index(stage)
        mbarrier.wait(empty.index(stage), (i // STAGES + 1) & 1, pred=i >= STAGES)
        if other is None:
            mbarrier.expect(barrier, nbytes)
        else:
            mbarrier.expect(barrier, nbytes + other.block_type.nbytes)
        async_load(x_desc, [m, k], barrier, xs.index(stage))
        if TURNED:
            async_load(first, [k, n], barrier, weights[0].index(stage))
            if other is not None:
                async_load(other, [k, n + first.block_shape[1]], barrier, weights[1].index(stage))
        else:
            async_load(first, [n, k], barrier, weights[0].index(stage))
            if other is not None:
                async_load(other, [n + first.block_shape[0], k], barrier, weights[1].index(stage))
    if PDL:
        tl_cuda.gdc_launch_dependents()


@gluon.jit
def _operand(tile, TURNED: gl.constexpr):
    """A tile of weight as (K, N)."""
    return tile if TURNED else tile.permute((1, 0))


@gluon.jit
def _multiply(
    stages, handover, size, bias_ptr, x_ptr, out_ptr, hidden_ptr, parts_ptr, ACTIVATION: gl.constexpr,
    KEEP: gl.constexpr, TURNED: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, MORE_N: gl.constexpr,
    STAGES: gl.constexpr, SHARE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Eight warps: they multiply what is in the stages and leave the sums to the team that finishes the tiles; of the
    last tile they finish some rows themselves."""
    xs, weights, full, empty = stages
    M, N, steps, mine = size[0], size[1] * 8, size[2], size[3]
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_N, 16])
    if PDL:
        tl_cuda.gdc_wait()
    for turn in range(0, mine):
        acc = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, MMA)
        if MORE_N > 0:
            OTHER: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, MORE_N, 16])
            other = gl.zeros((BLOCK_M, MORE_N), gl.float32, OTHER)
        for i in range(turn * steps, (turn + 1) * steps):
            stage = i % STAGES
            mbarrier.wait(full.index(stage), i // STAGES & 1)
            x = xs.index(stage)
            acc = warpgroup_mma(x, _operand(weights[0].index(stage), TURNED), acc, is_async=True)
            if MORE_N > 0:
                other = warpgroup_mma(x, _operand(weights[1].index(stage), TURNED), other, is_async=True)
                acc, other = warpgroup_mma_wait(2, deps=(acc, other))
            else:
                acc = warpgroup_mma_wait(1, deps=(acc,))
            # The step before this one is done: its stage may be filled again.
            mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), count=1, pred=i > turn * steps)
        if MORE_N > 0:
            acc, other = warpgroup_mma_wait(0, deps=(acc, other))
        else:
            acc = warpgroup_mma_wait(0, deps=(acc,))
            other = acc
        mbarrier.arrive(empty.index(((turn + 1) * steps - 1) % STAGES), count=1)
        hand_over(acc, other, handover, bias_ptr, turn, MORE_N)
        if turn == mine - 1:  # there is nothing left to multiply
            m, n, _, _ = place_of(turn * steps, M, N, steps, BLOCK_M, BLOCK_N + MORE_N, 1)
            finish_columns(
                handover[0][0], 0, SHARE, m, n, M, N, x_ptr, out_ptr, hidden_ptr, parts_ptr, 1, ACTIVATION, KEEP,
                BLOCK_M, BLOCK_N, gl.num_warps(),
            )  # fmt: skip
            if MORE_N > 0:
                finish_columns(
                    handover[0][1], 0, SHARE, m, n + BLOCK_N, M, N, x_ptr, out_ptr, hidden_ptr, parts_ptr, 1,
                    ACTIVATION, KEEP, BLOCK_M, MORE_N, gl.num_warps(),
                )  # fmt: skip


@gluon.jit(do_not_specialize=["M", "K"])
def linear_gelu_wgmma_kernel(
    x_desc,  # (M, K): what is multiplied
    weight_desc,  # (N, K), or (K, N) if TURNED
    other_desc,  # the same, in blocks for the rest of a tile's columns; or None
    bias_ptr,
    x_ptr,  # (M, N): backward, what GELU was given; None forward
    out_ptr,  # (M, N): what GELU is given; backward its gradient
    hidden_ptr,  # (M, N): what GELU gives; not written without KEEP
    parts_ptr,  # (2 * tiles along M, N) of float32: what to add up of the gradient's columns; None forward
    M,
    eighth,  # of N: Triton is to know that rows of 16 bytes times an odd number are multiples of 16 bytes
    K,
    stride_bias,
    ACTIVATION: gl.constexpr,
    KEEP: gl.constexpr,
    TURNED: gl.constexpr,
    FINISH_REGISTERS: gl.constexpr,
    FILL_REGISTERS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    MORE_N: gl.constexpr,  # columns of a tile beyond BLOCK_N
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    SHARE: gl.constexpr,  # rows of the last tile that those who multiply finish
    FINISHERS: gl.constexpr,  # warps
    PDL: gl.constexpr,
):
    xs = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BLOCK_M, BLOCK_K], x_desc.layout)
    FIRST: gl.constexpr = [STAGES, weight_desc.block_shape[0], weight_desc.block_shape[1]]
    weights = (gl.allocate_shared_memory(x_desc.dtype, FIRST, weight_desc.layout), None)
    if other_desc is not None:
        OTHER: gl.constexpr = [STAGES, other_desc.block_shape[0], other_desc.block_shape[1]]
        weights = (weights[0], gl.allocate_shared_memory(x_desc.dtype, OTHER, other_desc.layout))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    handover = handing_over(bias_ptr, x_desc.dtype, BLOCK_M, BLOCK_N, MORE_N)
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=1)

    tiles = gl.cdiv(M, BLOCK_M) * gl.cdiv(eighth * 8, BLOCK_N + MORE_N)
    steps = gl.cdiv(K, BLOCK_K)
    mine = gl.cdiv(tiles - gl.program_id(0), gl.num_programs(0))
    stages = (xs, weights, full, empty)
    size = (M, eighth, steps, mine)
    descs = (weight_desc, other_desc)
    gl.warp_specialize(
        [
            (_multiply, (stages, handover, size, bias_ptr, x_ptr, out_ptr, hidden_ptr, parts_ptr, ACTIVATION, KEEP,
                         TURNED, BLOCK_M, BLOCK_N, MORE_N, STAGES, SHARE, PDL)),
            (finish, (handover, size, bias_ptr, stride_bias, x_ptr, out_ptr, hidden_ptr, parts_ptr, ACTIVATION, KEEP,
                      BLOCK_M, BLOCK_N, MORE_N, SHARE, PDL)),
            (_fill, (x_desc, descs, stages, size, BLOCK_N + MORE_N, STAGES, TURNED, PDL)),
        ],
        [FINISHERS, 1],
        [FINISH_REGISTERS, FILL_REGISTERS],
    )  # fmt: skip


def linear_gelu_wgmma_configs(entries: int, backward: bool) -> list[Config]:
    """Configs of both products with a weight of so many entries, the most promising first."""
    # (BLOCK_M, BLOCK_N, MORE_N, STAGES, SHARE, FINISHERS). What is left of shared memory beside the stages are a tile's
    # sums. 128x256 spills, and so does 256x128 backward with eight warps that finish.
    shapes = [(128, 128, 64, 4, 64, 8 if backward else 4), (256, 128, 0, 3, 192, 4)]
    configs = [
        Config.of(8, 1, BLOCK_M=m, BLOCK_N=n, MORE_N=more, BLOCK_K=64, STAGES=stages, SHARE=share, FINISHERS=finishers)
        for m, n, more, stages, share, finishers in shapes
    ]
    return configs[: 1 if entries < 1 << 16 else None]  # so small, whichever it is


def linear_with_preactivation(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """`(act(pre), pre)` of `pre = x @ weight.T + bias`, which is rounded before the activation, as eager does.

    Shapes: x (..., K) with one stride for its rows, weight (N, K), bias (N,), both results (..., N), contiguous. Rows
    of x and weight are contiguous and start at multiples of 16 bytes, N is a multiple of 8. All of one dtype: float16
    or bfloat16; sums are float32. `activation` is gelu or gelu_tanh. Compute capability 9.0 only.
    """
    pre, hidden = (x.new_empty((*x.shape[:-1], weight.shape[0])) for _ in range(2))
    _launch(x, weight, bias, None, pre, hidden, None, activation, config)
    return hidden, pre


def linear_gelu_backward(
    grad: Tensor, weight: Tensor, x: Tensor, activation: str, keep_hidden: bool, config: Config | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`(dx, hidden, dx_sum)` of `hidden = act(x)` and its gradient `grad @ weight`.

    Shapes: grad (..., K) with one stride for its rows, weight (K, N), x (..., N), contiguous, dx and hidden (..., N),
    contiguous, hidden (0,) without `keep_hidden`; dx_sum (N,), float32: that of dx, before it is rounded, over all
    rows. Rows of grad and weight are contiguous and start at multiples of 16 bytes, N is a multiple of 8. Otherwise as
    `linear_with_preactivation`. The same inputs give the same bits.
    """
    config = config or linear_gelu_wgmma_configs(weight.numel(), backward=True)[0]
    dx = x.new_empty(x.shape)
    hidden = x.new_empty(x.shape if keep_hidden else 0)
    rows, columns = x.numel() // x.shape[-1], x.shape[-1]
    parts, total = (
        torch.empty(shape, dtype=torch.float32, device=x.device)
        for shape in ((2 * cdiv(rows, config["BLOCK_M"]), columns), (columns,))
    )
    _launch(grad, weight, None, x, dx, hidden, parts, activation, config, keep_hidden)
    add_parts(parts, total)
    return dx, hidden, total


def _launch(
    given: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor | None,
    out: Tensor,
    hidden: Tensor,
    parts: Tensor | None,
    activation: str,
    config: Config | None,
    keep: bool = True,
) -> None:
    depth, columns = given.shape[-1], out.shape[-1]
    config = config or linear_gelu_wgmma_configs(weight.numel(), backward=x is not None)[0]
    block_m, block_n, more_n, block_k = (config[name] for name in ("BLOCK_M", "BLOCK_N", "MORE_N", "BLOCK_K"))
    turned = x is not None
    memory = (weight, *weight.shape, weight.stride(0))
    blocks = [(block_k, n) if turned else (n, block_k) for n in (block_n, more_n)]
    rows = given.numel() // depth
    stride = rows_of(given).stride_inner
    arguments: tuple[Any, ...] = (
        described(given, rows, depth, stride, block_m, block_k),
        described(*memory, *blocks[0]),
        described(*memory, *blocks[1]) if more_n else None,
        *(bias, x, out, hidden, parts, rows, columns // 8, depth),
        1 if bias is None else bias.stride(0),
    )
    # All registers are dealt out; what the others leave is for those who multiply.
    registers = 65536 // (32 * (8 + config["FINISHERS"] + 4)) // 8 * 8
    constants = {
        "ACTIVATION": in_half(activation, given.dtype),
        "KEEP": keep,
        "TURNED": turned,
        "FINISH_REGISTERS": 96 if config["FINISHERS"] == 8 else 152 if turned else 104,
        "FILL_REGISTERS": 24,
    }
    tiles = cdiv(rows, block_m) * cdiv(columns, block_n + more_n)
    programs = min(tiles, target_of(given).num_sms)
    launch(
        linear_gelu_wgmma_kernel, (programs,), *arguments, config=config, like=given, registers=registers, **constants
    )
