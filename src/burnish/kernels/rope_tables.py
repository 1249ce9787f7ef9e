"""The tables of rotary position embedding, in one launch.

A program has BLOCK_S positions as rows, and of each half the table's width: each angle is computed once, and its cosine
and its sine are stored twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from burnish.kernels.launch import Config, launch, launch_dependents, target_of, wait_for_inputs

MAX_WIDTH = 1024
"""Of wider tables one row alone would be more than four angles for each thread of a program."""


@triton.jit
def cos_sin(angle):
    """Cosine and sine of a float32 angle of up to 2^24, each with an error below 1e-7.

    Reduced in float64 to within pi / 4 of a multiple of pi / 2: that is exact to 1e-9, in 5 instructions for both. Up
    to there the series' next terms are below 2e-9. With Triton's own two, some kernels need a stack (32 bytes a thread)
    for large angles, and the interpreter has numpy's, so that their error would be seen on a GPU only.
    """
    wide = angle.to(tl.float64)
    quarters = tl.floor(wide * 0.6366197723675814 + 0.5)
    rest = (wide - quarters * 1.5707963267948966).to(tl.float32)
    square = rest * rest
    sin = square * (8.3333333e-3 + square * (-1.9841270e-4 + square * 2.7557319e-6))
    sin = rest + rest * square * (-0.16666667 + sin)
    cos = square * (-1.3888889e-3 + square * (2.4801587e-5 - square * 2.7557319e-7))
    cos = 1.0 + square * (-0.5 + square * (4.1666667e-2 + cos))
    quadrant = quarters.to(tl.int32)
    is_odd = quadrant % 2 != 0
    cos, sin = tl.where(is_odd, sin, cos), tl.where(is_odd, cos, sin)
    return tl.where((quadrant + 1) & 2 != 0, -cos, cos), tl.where(quadrant & 2 != 0, -sin, sin)


@triton.jit(do_not_specialize=["rows", "positions"])
def _tables_kernel(
    position_ids, inv_freq, cos, sin, rows, positions, id_batch, id_step, frequency_step, scaling,
    HALF: tl.constexpr, BLOCK_S: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    launch_dependents(PDL)
    row = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)[:, None]
    column = tl.arange(0, triton.next_power_of_2(HALF))[None, :]
    valid, inside = row < rows, column < HALF
    place = (row // positions).to(tl.int64) * id_batch + (row % positions).to(tl.int64) * id_step
    wait_for_inputs(PDL)  # the frequencies too: a model may compute them in each call
    position = tl.load(position_ids + place, valid, other=0).to(tl.float32)
    frequency = tl.load(inv_freq + column * frequency_step, inside, other=0.0).to(tl.float32)
    c, s = cos_sin(position * frequency)
    c, s = (c * scaling).to(cos.dtype.element_ty), (s * scaling).to(sin.dtype.element_ty)
    first, mask = row.to(tl.int64) * (2 * HALF) + column, valid & inside
    tl.store(cos + first, c, mask)
    tl.store(cos + first + HALF, c, mask)
    tl.store(sin + first, s, mask)
    tl.store(sin + first + HALF, s, mask)


def rope_tables(
    position_ids: Tensor, inv_freq: Tensor, dtype: torch.dtype, scaling: float = 1.0, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin of `position * inv_freq`, twice side by side, times `scaling`.

    Shapes: position_ids (S,) or (B, S), inv_freq (D / 2,), of any strides, D at most MAX_WIDTH; the results (S, D) or
    (B, S, D), contiguous. Dtypes: integers, float16, bfloat16 and float32 for the inputs, the last three for `dtype`.
    """
    config = config or rope_tables_configs(position_ids, inv_freq)[0]
    rows, positions, half = position_ids.numel(), position_ids.shape[-1], inv_freq.shape[0]
    cos, sin = (torch.empty(*position_ids.shape, 2 * half, dtype=dtype, device=inv_freq.device) for _ in range(2))
    id_strides = position_ids.stride() if position_ids.dim() == 2 else (0, *position_ids.stride())
    launch(
        _tables_kernel, (triton.cdiv(rows, config["BLOCK_S"]),), position_ids, inv_freq, cos, sin, rows, positions,
        *id_strides, *inv_freq.stride(), scaling, config=config, like=inv_freq, HALF=half,
    )  # fmt: skip
    return cos, sin


def rope_tables_configs(position_ids: Tensor, inv_freq: Tensor) -> list[Config]:
    """How to make the tables, the most promising first."""
    rows, half = position_ids.numel(), triton.next_power_of_2(inv_freq.shape[0])
    # With few angles what counts is that they are spread over the device, a thread for each.
    few = rows * half < 32 * 32 * target_of(inv_freq).num_sms
    configs = []
    for angles in (32, 128) if few else (128, 512):
        BLOCK_S = min(max(1, angles // half), triton.next_power_of_2(rows))
        configs.append(Config.of(num_warps=max(1, min(4, BLOCK_S * half // 32)), BLOCK_S=BLOCK_S))
    return list(dict.fromkeys(configs))
