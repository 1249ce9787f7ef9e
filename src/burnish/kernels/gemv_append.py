"""Queries, keys and values of a few new tokens by one product, rotated, keys and values right into a cache: one launch.

The product is `gemv`'s, in which both partners of a rotation stand where that has rows of gate and up.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from burnish.kernels.gemv import gemv_configs, multiply
from burnish.kernels.launch import Config, launch, launch_dependents, wait_for_inputs
from burnish.kernels.matmul import row_offsets
from burnish.kernels.matmul_configs import Product
from burnish.kernels.product_append import Appending, ask, columns_of, rotate_and_append


@triton.jit(do_not_specialize=["most"])
def _gemv_append_kernel(
    x, weight, bias, q_out, k_cache, v_cache, cos, sin, lengths, M, positions, most, x_inner, x_outer_stride,
    x_inner_stride, x_step, K, weight_row, bias_step, k_batch, k_head, k_position, k_step, v_batch, v_head, v_position,
    v_step, table_batch, table_position, table_step, lengths_step, Q_HEADS: tl.constexpr, HEADS: tl.constexpr,
    D: tl.constexpr, INTERLEAVED: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    launch_dependents(PDL)
    TO_PARTNER: tl.constexpr = 1 if INTERLEAVED else D // 2
    # Nothing rotates values, but they are shared out by pairs as well.
    m, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    head, column, columns = columns_of(tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), D, INTERLEAVED)

    # As in gemv: (rows of x, rows of weight, K), and the weight's first block before the wait.
    row = head * D + column
    weight_ptrs = weight + (row.to(tl.int64) * weight_row)[None, :, None] + k[None, None, :]
    x_ptrs = x + row_offsets(m, x_inner, x_outer_stride, x_inner_stride)[:, None, None]
    x_ptrs += k.to(tl.int64)[None, None, :] * x_step
    weight_mask, x_mask = (head < Q_HEADS + 2 * HEADS)[None, :, None], (m < M)[:, None, None]
    mask = weight_mask if EVEN_K else weight_mask & (k < K)[None, None, :]
    first_block = tl.load(weight_ptrs, mask=mask, other=0.0)
    partners_block = tl.load(weight_ptrs + TO_PARTNER * weight_row, mask=mask, other=0.0)
    wait_for_inputs(PDL)

    asked = ask(
        lengths, cos, sin, bias, m, head, columns, M, positions, most, lengths_step, table_batch, table_position,
        table_step, bias_step, Q_HEADS, HEADS, D,
    )  # fmt: skip
    firsts, partners, _ = multiply(
        weight_ptrs, x_ptrs, first_block, partners_block, TO_PARTNER * weight_row, weight_mask, x_mask, k, K, x_step,
        None, 1, True, False, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    sums = tl.sum(tl.join(firsts, partners), axis=2)
    rotate_and_append(
        sums, asked, q_out, k_cache, v_cache, m, head, columns, M, most, k_batch, k_head, k_position, k_step, v_batch,
        v_head, v_position, v_step, cos is not None, bias is not None, Q_HEADS, HEADS, D,
    )  # fmt: skip


def gemv_append(
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
    """Rows q, k and v of `x @ weight.T + bias`: q rotated is returned, k rotated and v go into the caches from position
    `lengths` on; what would lie past their end is dropped. Without tables nothing is rotated.

    Shapes: x (B, S, K) of at most BLOCK_M rows; weight ((Hq + 2 * Hkv) * D, K), D even, contiguous along K; bias its
    rows' number; cos and sin (S, D) or (1 or B, S, D); the caches (B, Hkv, Lmax, D), of any strides; lengths one int32
    or int64 number, or (B,). q is (B, Hq, S, D), stored as (B, S, Hq, D).
    Dtypes: float16, bfloat16 or float32, one but for the tables, which have their own; sums are float32, and what is
    written is rounded once.
    """
    config = config or gemv_append_configs(x, weight)[0]
    given = Appending.of(x, weight, cos, sin, k_cache, v_cache, lengths, interleaved)
    launch(
        _gemv_append_kernel,
        (triton.cdiv(given.pairs, config["BLOCK_N"]),),
        *(x, weight, bias, *given.tensors, *given.sizes, x.stride(-1), x.shape[-1]),
        *(weight.stride(0), 1 if bias is None else bias.stride(0), *given.strides),
        config=config,
        like=x,
        EVEN_K=x.shape[-1] % config["BLOCK_K"] == 0,
        **given.constants,
    )
    return given.q_out.transpose(1, 2)


def gemv_append_configs(x: Tensor, weight: Tensor) -> list[Config]:
    """Configs of `gemv_append`, the most promising first; BLOCK_N counts pairs of the weight's rows."""
    return gemv_configs(Product.of(x, weight, gated=True))
