"""`act(x @ weight.T + bias) + residual` for up to 64 rows of x: bound by reading the weight, on tensor cores.

The operands change sides: the rows of weight are the left one's, of which a tensor core takes 64 at a time, and the few
rows of x are the right one's columns. With `GATED` the weight has two halves of rows, gate and up, and the result is
`act(gate) * up`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from burnish.kernels.activations import in_half
from burnish.kernels.counters import counters
from burnish.kernels.launch import Config, launch, launch_dependents, wait_for_inputs
from burnish.kernels.layout import copyable, rows_of
from burnish.kernels.matmul import dot, finish, prefetch_weight, row_offsets
from burnish.kernels.matmul_configs import Product, fitting, programs_per_sm, shared_memory

AHEAD_BYTES = 128 << 10  # of weight that a program asks for before its wait; at two programs an SM, half of H200's L2


@triton.jit
def multiply(
    x_ptrs, weight_ptrs, weight_desc, x_mask, k, K, stride_x_k, first, last, row, up_row, to_up, GATED: tl.constexpr,
    EVEN_K: tl.constexpr, TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums (BLOCK_N, BLOCK_M) of rows of the weight times x, from block `first` of K, where the pointers begin, to
    `last`; if GATED also of those `to_up` further on. With TMA the rows begin at `row` and `up_row` of the weight."""
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(first, last):
        if EVEN_K:
            x = tl.load(x_ptrs, mask=x_mask, other=0.0)
        else:
            inside = (step * BLOCK_K + k < K)[None, :]
            x = tl.load(x_ptrs, mask=x_mask & inside, other=0.0)
        if TMA:
            weight = weight_desc.load([row, step * BLOCK_K])
        elif EVEN_K:
            weight = tl.load(weight_ptrs)
        else:
            weight = tl.load(weight_ptrs, mask=inside, other=0.0)
        acc = dot(weight, x.T, acc)
        if GATED:
            if TMA:
                weight = weight_desc.load([up_row, step * BLOCK_K])
            elif EVEN_K:
                weight = tl.load(weight_ptrs + to_up)
            else:
                weight = tl.load(weight_ptrs + to_up, mask=inside, other=0.0)
            up = dot(weight, x.T, up)
        x_ptrs += BLOCK_K * stride_x_k
        weight_ptrs += BLOCK_K
    return acc, up


@triton.jit(do_not_specialize=["M", "x_inner", "residual_inner"])
def skinny_kernel(
    x_ptr,
    weight_ptr,
    weight_desc,  # (N, K), or (2 * N, K) if GATED; None unless TMA
    bias_ptr,
    residual_ptr,
    out_ptr,
    partial_ptr,  # (tiles, SPLIT_K, 2 if GATED else 1, BLOCK_M, BLOCK_N) float32
    counter_ptr,  # (tiles,) int32, zero before and after
    M,
    N,
    K,
    x_inner,
    stride_x_outer,
    stride_x_inner,
    stride_x_k,
    stride_weight_n,
    to_up,  # from a gate's row to the same row of up
    stride_bias,
    residual_inner,
    stride_residual_outer,
    stride_residual_inner,
    stride_residual_n,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    EVEN_K: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_dependents(PDL)
    tile = tl.program_id(0)
    m = tl.arange(0, BLOCK_M)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)

    steps = tl.cdiv(K, BLOCK_K)
    split = tl.program_id(1)
    first = split * steps // SPLIT_K
    last = (split + 1) * steps // SPLIT_K
    if PDL:
        ahead = min(last, first + AHEAD)
        prefetch_weight(weight_ptr, n, N, stride_weight_n, first, ahead, BLOCK_K)
        if GATED:
            prefetch_weight(weight_ptr + to_up, n, N, stride_weight_n, first, ahead, BLOCK_K)

    x_ptrs = x_ptr + row_offsets(m, x_inner, stride_x_outer, stride_x_inner)[:, None]
    x_ptrs += (first * BLOCK_K + k).to(tl.int64)[None, :] * stride_x_k
    x_mask = (m < M)[:, None]
    # Rows past the last one are the last one again, and never stored: so whole blocks need no mask.
    weight_ptrs = weight_ptr + tl.minimum(n, N - 1).to(tl.int64)[:, None] * stride_weight_n
    weight_ptrs += (first * BLOCK_K + k)[None, :]
    wait_for_inputs(PDL)
    acc, up = multiply(
        x_ptrs, weight_ptrs, weight_desc, x_mask, k, K, stride_x_k, first, last, tile * BLOCK_N, N + tile * BLOCK_N,
        to_up, GATED, EVEN_K, TMA, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    finish(
        acc.T, up.T, m, n, tile, split, bias_ptr, residual_ptr, out_ptr, partial_ptr, counter_ptr, M, N, stride_bias,
        residual_inner, stride_residual_outer, stride_residual_inner, stride_residual_n, ACTIVATION, GATED, BLOCK_M,
        BLOCK_N, SPLIT_K,
    )  # fmt: skip


def skinny_configs(product: Product) -> list[Config]:
    """Configs of `skinny`, the most promising first."""
    block_m = max(16, triton.next_power_of_2(product.rows))
    # (BLOCK_N, BLOCK_K, TMA, warps, stages), BLOCK_N of each half if gated. What counts is the memory in flight: two
    # programs an SM, or one with deep blocks, whose loads are long runs of each row. H200, 16 rows, us: 28672x4096
    # gated 57.9 with the first, 61 to 62 with three stages; 4096x14336 30.2 with the first, 30.9 and more with others.
    if product.gated:
        shapes = [(64, 128, 1, 4, 4), (64, 128, 0, 4, 4), (64, 128, 0, 4, 3), (64, 64, 1, 4, 5)]
        shapes += [(32, 128, 0, 4, 4)] if block_m < 64 else []  # with more rows this and the next ones spill
        shapes += [(32, 256, 0, 4, 3), (64, 256, 1, 4, 3)] if block_m == 16 else []
    elif block_m < 64:
        shapes = [(32, 256, 1, 4, 6)] if block_m == 16 else []
        shapes += [(64, 256, 0, 4, 4), (64, 128, 0, 4, 5), (64, 128, 1, 4, 5), (32, 256, 0, 4, 4)]
        shapes += [(128, 128, 0, 8, 3), (32, 128, 0, 4, 5)]
    else:  # x is read as often as there are tiles, so they are larger
        shapes = [(128, 128, 1, 8, 4), (128, 128, 0, 8, 4), (64, 128, 1, 4, 4), (64, 128, 0, 4, 4), (64, 256, 0, 4, 3)]
        shapes += [(32, 128, 0, 4, 5)]
    if shared_memory(product.target) < 128 << 10:  # consumer devices: none of these fits with 64 rows
        shapes.append((32, 64, 0, 4, 4))
    configs = []
    for block_n, k, tma, warps, stages in shapes:
        if tma and not product.target.tma:
            continue
        block_k = max(64 if tma else 16, columns_at_once(k, product.depth))
        blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "SPLIT_K": 1, "TMA": tma}
        whole = Config.of(num_warps=warps, num_stages=stages, **blocks)
        for split in _splits(product, whole):
            configs.append(Config.of(num_warps=warps, num_stages=stages, **{**blocks, "SPLIT_K": split}))
    return fitting(configs, product)[:10]


def columns_at_once(wanted: int, depth: int) -> int:
    """Of so many columns, as many as a block may have: masks of wider ones take so many registers that they spill."""
    columns = min(wanted, triton.next_power_of_2(depth))
    return min(columns, 64) if depth % columns else columns


def _splits(product: Product, config: Config) -> list[int]:
    """In how many parts to sum over K: 1 where each SM has a tile, else as many as run at once, or one for each SM."""
    tiles = triton.cdiv(product.columns, config["BLOCK_N"])
    if tiles >= product.target.num_sms:
        return [1]
    most = triton.cdiv(product.depth, config["BLOCK_K"]) // 3  # a shorter part does nothing but fill its pipeline
    slots = [product.target.num_sms * programs for programs in range(programs_per_sm(config, product), 0, -1)]
    best = (max(s for s in (1, 2, 3, 4, 8) if s == 1 or s <= min(most, slot // tiles)) for slot in slots)
    return list(dict.fromkeys(best))


def skinny(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    gated: bool = False,
    config: Config | None = None,
) -> Tensor:
    """`act(x @ weight.T + bias) + residual`, or `act(gate) * up` of the two halves of `x @ weight.T + bias` if gated.

    Shapes: x (..., K) of at most BLOCK_M rows, weight (N, K), or (2*N, K) if gated, contiguous along K, bias its rows'
    number, residual and the contiguous result (..., N). All of one dtype: float16 or bfloat16; sums are float32, and
    the result is rounded once. The order of summation depends on the config alone. A config's tensor memory access is
    left out where the weight's rows do not start at multiples of 16 bytes.
    """
    columns = weight.shape[0] // 2 if gated else weight.shape[0]
    product = Product.of(x, weight, gated)
    config = config or skinny_configs(product)[0]
    if config["TMA"] and not copyable(weight, *weight.stride()):
        config = Config.of(config.num_warps, config.num_stages, **{**dict(config.blocks), "TMA": 0})
    out = x.new_empty((*x.shape[:-1], columns))
    rows, residual_rows = rows_of(x), out if residual is None else residual
    extra = rows_of(residual_rows)
    assert rows is not None
    assert extra is not None
    block_m, block_n, block_k, split = (config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLIT_K"))
    tiles = triton.cdiv(columns, block_n)
    partial, counter = None, None
    if split > 1:
        size = tiles * split * block_m * block_n * product.halves
        partial, counter = x.new_empty(size, dtype=torch.float32), counters(x, tiles)
    box = None
    if config["TMA"]:
        box = TensorDescriptor(weight, list(weight.shape), list(weight.stride()), [block_n, block_k])
    arguments: tuple[Any, ...] = (
        *(x, weight, box, bias, residual, out, partial, counter),
        *(rows.count, columns, x.shape[-1]),
        *(rows.inner, rows.stride_outer, rows.stride_inner, x.stride(-1)),
        *(weight.stride(0), columns * weight.stride(0), 1 if bias is None else bias.stride(0)),
        *(extra.inner, extra.stride_outer, extra.stride_inner, residual_rows.stride(-1)),
    )
    constants: dict[str, Any] = {
        "ACTIVATION": in_half(activation, x.dtype),
        "GATED": gated,
        "EVEN_K": x.shape[-1] % block_k == 0,
        "AHEAD": max(1, AHEAD_BYTES // (product.halves * block_n * block_k * x.element_size())),
    }
    launch(skinny_kernel, (tiles, split), *arguments, config=config, like=x, **constants)
    return out
