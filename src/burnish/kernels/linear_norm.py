"""A product, a residual addition and a normalization: two kernels, made for few rows.

With few rows a product has too few tiles for the device, so its sum over K is split among programs. Their parts need
not be added in a pass of their own (nor by the last program to arrive, with the others idle): the kernel that
normalizes reads them instead of the product, with bias and residual.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from burnish.kernels.launch import Config, launch, launch_dependents, target_of, wait_for_inputs
from burnish.kernels.matmul import dot, prefetch_weight
from burnish.kernels.matmul_configs import Product, fitting
from burnish.kernels.norms import load_vector, norm_configs, normalize


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["live"])
def _parts_kernel(
    x, weight, parts, M, N, K, x_row, weight_row, live, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Part `program_id(2)` of `x @ weight.T` as float32; parts is (SPLIT_K, M, N)."""
    launch_dependents(PDL)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    split = tl.program_id(2)
    steps = tl.cdiv(K, BLOCK_K)
    # Rows past the last are the last again, and never stored.
    x_block = x + tl.minimum(m, M - 1).to(tl.int64)[:, None] * x_row + k[None, :]
    weight_block = weight + n.to(tl.int64)[None, :] * weight_row + k[:, None]
    first, last = split * steps // SPLIT_K, (split + 1) * steps // SPLIT_K
    if PDL:
        prefetch_weight(weight, n, N, weight_row, first, last, BLOCK_K)
    wait_for_inputs(PDL)
    if live is not None:
        wanted = tl.load(live)
        if tl.program_id(1) * BLOCK_M >= wanted:
            return
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(first, last):
        left = K if EVEN_K else K - step * BLOCK_K
        weight_mask = k[:, None] < left if EVEN_N else (n[None, :] < N) & (k[:, None] < left)
        if EVEN_K:
            x_tile = tl.load(x_block + step * BLOCK_K)
        else:
            x_tile = tl.load(x_block + step * BLOCK_K, mask=k[None, :] < left, other=0.0)
        if EVEN_K and EVEN_N:
            weight_tile = tl.load(weight_block + step * BLOCK_K)
        else:
            weight_tile = tl.load(weight_block + step * BLOCK_K, mask=weight_mask, other=0.0)
        acc = dot(x_tile, weight_tile, acc)
    to = (split * M + m).to(tl.int64)[:, None] * N + n[None, :]
    tl.store(parts + to, acc, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["live"])
def _norm_of_parts_kernel(
    parts, bias, residual, weight, shift, out, total, M, residual_row, bias_step, weight_step, shift_step, eps, live,
    N: tl.constexpr, BLOCK_N: tl.constexpr, RMS: tl.constexpr, SPLIT_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row: the parts, the bias and the residual summed, rounded as `out` is and normalized. `total` may be None."""
    launch_dependents(PDL)
    added, scale, offset = None, None, None
    if bias is not None:
        added = load_vector(bias, bias_step, N, BLOCK_N)
    if weight is not None:
        scale = load_vector(weight, weight_step, N, BLOCK_N)
    if shift is not None:
        offset = load_vector(shift, shift_step, N, BLOCK_N)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_N)[None, :]
    mask = column < N
    wait_for_inputs(PDL)
    if live is not None:
        wanted = tl.load(live)
        if row >= wanted:
            return
    values = tl.load(residual + row * residual_row + column, mask, other=0.0).to(tl.float32)
    product = tl.zeros((1, BLOCK_N), tl.float32)
    for part in tl.static_range(SPLIT_K):
        product += tl.load(parts + (part * M + row) * N + column, mask, other=0.0)
    if bias is not None:
        product += added.to(tl.float32)
    values = (values + product).to(out.dtype.element_ty)
    if total is not None:
        tl.store(total + row * N + column, values, mask)
    normed = normalize(values.to(tl.float32), mask, eps, N, RMS)
    if weight is not None:
        normed = normed * scale.to(tl.float32)
    if shift is not None:
        normed = normed + offset.to(tl.float32)
    tl.store(out + row * N + column, normed.to(out.dtype.element_ty), mask)


def linear_add_norm(
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
    (..., N). x and residual have one stride for their rows; theirs and weight's are contiguous.
    Dtypes: float16 or bfloat16, the norm's weights may differ. Products and sums are float32.
    Rows of the results from `live_rows` on, an int32 on the device, are left as they are.
    """
    (N, K), rows = weight.shape, x.numel() // x.shape[-1]
    config = config or linear_norm_configs(Product.of(x, weight))[0]
    block_m, block_n, block_k, split = (config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLIT_K"))
    parts = x.new_empty((split, rows, N), dtype=torch.float32)
    evenness = {"EVEN_K": K % block_k == 0, "EVEN_N": N % block_n == 0}
    launch(
        _parts_kernel, (triton.cdiv(N, block_n), triton.cdiv(rows, block_m), split), x, weight, parts, rows, N, K,
        x.reshape(rows, -1).stride(0), weight.stride(0), live_rows, config=config, like=x, **evenness,
    )  # fmt: skip
    return norm_of_parts(parts, bias, residual, norm_weight, norm_bias, eps, rms, keep_sum, live_rows)


def norm_of_parts(
    parts: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    rms: bool,
    keep_sum: bool,
    live_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`norm(parts.sum(0) + bias + residual)` and the sum that it normalizes, as `linear_add_norm` has them.

    Shapes: parts (SPLIT_K, rows, N) of float32, the others as of `linear_add_norm`.
    """
    split, rows, N = parts.shape
    out = residual.new_empty(residual.shape)
    total = torch.empty_like(out) if keep_sum else None
    steps = (1 if vector is None else vector.stride(0) for vector in (bias, norm_weight, norm_bias))
    warps = norm_configs(rows, N, residual.dtype, True, target_of(residual))[0].num_warps
    launch(
        _norm_of_parts_kernel, (rows,), parts, bias, residual, norm_weight, norm_bias, out, total, rows,
        residual.reshape(rows, -1).stride(0), *steps, eps, live_rows, config=Config.of(num_warps=max(warps, 4)),
        like=residual, N=N, BLOCK_N=triton.next_power_of_2(N), RMS=rms, SPLIT_K=split,
    )  # fmt: skip
    return out, out.new_empty(0) if total is None else total


def linear_norm_configs(product: Product) -> list[Config]:
    """Configs of `linear_add_norm`, the most promising first."""
    if product.rows <= 32:
        m = 16 if product.rows <= 16 else 32
        shapes = [(m, 64, 128, 4, 5), (m, 32, 128, 4, 5)]
    else:
        shapes = [(64, 64, 128, 4, 4), (64, 64, 64, 4, 4), (64, 32, 128, 4, 4), (128, 64, 64, 8, 4)]
        # Traffic from the L2 cache bounds these products: larger tiles have less, and are split more.
        shapes += [(128, 128, 64, 8, 4)] if product.rows > 128 else []
    configs = []
    for m, n, k, warps, stages in shapes:
        tiles = triton.cdiv(product.rows, m) * triton.cdiv(product.columns, n)
        steps = triton.cdiv(product.depth, k)
        fill = product.target.num_sms / tiles
        all_at_once = max(1, int(fill))  # a program for nearly each multiprocessor
        splits = {all_at_once, max(1, all_at_once // 2)} if m * n > 8192 else {1, 2, 3, 4, 6, 8, min(all_at_once, 8)}
        for split in sorted(splits):
            if split <= steps and fill / 2.5 <= split <= max(1.0, 1.6 * fill):
                blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "SPLIT_K": split}
                configs.append(Config.of(num_warps=warps, num_stages=stages, **blocks))
    return fitting(configs, product) or [
        Config.of(num_warps=4, num_stages=3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, SPLIT_K=1)
    ]
