"""Queries, keys and values of up to 32 new tokens by `skinny`'s product, rotated, keys and values right into a cache.

For more rows than `gemv_mma_append` takes, or where that is not as fast: x passes through shared memory once for a tile
of 32 to 64 rows of the weight, not of 16. A tile has whole pairs, rows of which each eight are followed by their
partners, as a thread's sums lie in the tensor cores' layout.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from burnish.kernels.launch import Config, launch, launch_dependents, wait_for_inputs
from burnish.kernels.matmul import prefetch_weight, row_offsets
from burnish.kernels.matmul_configs import Product, fitting, shared_memory
from burnish.kernels.product_append import Appending, ask, columns_of, rotate_and_append
from burnish.kernels.skinny import AHEAD_BYTES, columns_at_once, multiply


@triton.jit(do_not_specialize=["most"])
def _skinny_append_kernel(
    x, weight, bias, q_out, k_cache, v_cache, cos, sin, lengths, M, positions, most, x_inner, x_outer_stride,
    x_inner_stride, x_step, K, weight_row, bias_step, k_batch, k_head, k_position, k_step, v_batch, v_head, v_position,
    v_step, table_batch, table_position, table_step, lengths_step, Q_HEADS: tl.constexpr, HEADS: tl.constexpr,
    D: tl.constexpr, INTERLEAVED: tl.constexpr, EVEN_K: tl.constexpr, AHEAD: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    launch_dependents(PDL)
    ROWS: tl.constexpr = (Q_HEADS + 2 * HEADS) * D
    PAIRS: tl.constexpr = BLOCK_N // 2
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    first_pair = tl.program_id(0) * PAIRS
    head, column, _ = columns_of(first_pair + n // 16 * 8 + n % 8, D, INTERLEAVED)
    row = head * D + column + n // 8 % 2 * (1 if INTERLEAVED else D // 2)
    steps = tl.cdiv(K, BLOCK_K)
    if PDL:
        prefetch_weight(weight, row, ROWS, weight_row, 0, min(steps, AHEAD), BLOCK_K)
    x_ptrs = x + row_offsets(m, x_inner, x_outer_stride, x_inner_stride)[:, None] + k.to(tl.int64)[None, :] * x_step
    # Rows past the last one are the last one again, and never stored: so whole blocks need no mask.
    weight_ptrs = weight + tl.minimum(row, ROWS - 1).to(tl.int64)[:, None] * weight_row + k[None, :]
    wait_for_inputs(PDL)

    head, _, columns = columns_of(first_pair + tl.arange(0, PAIRS), D, INTERLEAVED)
    asked = ask(
        lengths, cos, sin, bias, m, head, columns, M, positions, most, lengths_step, table_batch, table_position,
        table_step, bias_step, Q_HEADS, HEADS, D,
    )  # fmt: skip
    sums, _ = multiply(
        x_ptrs, weight_ptrs, None, (m < M)[:, None], k, K, x_step, 0, steps, 0, 0, 0, False, EVEN_K, False, BLOCK_M,
        BLOCK_N, BLOCK_K,
    )  # fmt: skip
    sums = tl.permute(tl.reshape(sums, [BLOCK_N // 16, 2, 8, BLOCK_M]), [3, 0, 2, 1])
    rotate_and_append(
        tl.reshape(sums, [BLOCK_M, PAIRS, 2]), asked, q_out, k_cache, v_cache, m, head, columns, M, most, k_batch,
        k_head, k_position, k_step, v_batch, v_head, v_position, v_step, cos is not None, bias is not None, Q_HEADS,
        HEADS, D,
    )  # fmt: skip


def skinny_append(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    interleaved: bool = False,
    config: Config | None = None,
) -> Tensor:
    """As `gemv_append`, of up to 32 rows of x (batch times positions) in float16 or bfloat16."""
    config = config or skinny_append_configs(x, weight)[0]
    given = Appending.of(x, weight, cos, sin, k_cache, v_cache, lengths, interleaved)
    block_n, block_k = config["BLOCK_N"], config["BLOCK_K"]
    launch(
        _skinny_append_kernel,
        (triton.cdiv(weight.shape[0], block_n),),
        *(x, weight, bias, *given.tensors, *given.sizes, x.stride(-1), x.shape[-1]),
        *(weight.stride(0), 1 if bias is None else bias.stride(0), *given.strides),
        config=config,
        like=x,
        EVEN_K=x.shape[-1] % block_k == 0,
        AHEAD=max(1, AHEAD_BYTES // (block_n * block_k * x.element_size())),
        **given.constants,
    )
    return given.q_out.transpose(1, 2)


def skinny_append_configs(x: Tensor, weight: Tensor) -> list[Config]:
    """Configs of `skinny_append`, the most promising first; BLOCK_N counts the weight's rows."""
    product = Product.of(x, weight)
    block_m = max(16, triton.next_power_of_2(product.rows))
    # (BLOCK_N, BLOCK_K, stages): what counts is the memory in flight, as in skinny.
    shapes = [(64, 256, 4), (64, 256, 5), (64, 128, 5), (32, 256, 4), (32, 256, 5), (32, 128, 5)]
    if shared_memory(product.target) < 128 << 10:  # consumer devices: none of these fits with 64 rows
        shapes.append((32, 64, 4))
    configs = []
    for block_n, k, stages in shapes:
        block_k = max(16, columns_at_once(k, product.depth))
        configs.append(Config.of(4, stages, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k))
    return fitting(configs, product)
