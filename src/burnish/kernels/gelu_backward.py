"""The backward pass of GELU behind a product: its result once more, its gradient, and that added up over all rows."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from burnish.kernels.activations import in_half
from burnish.kernels.gate_backward import activate_with_slope
from burnish.kernels.launch import (
    Config,
    cdiv,
    launch,
    launch_dependents,
    next_power_of_2,
    target_of,
    wait_for_inputs,
)
from burnish.kernels.norms_backward import add_parts


@triton.jit(do_not_specialize=["rows"])
def gelu_backward_kernel(
    grad_ptr,  # (rows, N): read, then what belongs to x
    x_ptr,  # (rows, N)
    hidden_ptr,  # (rows, N); not written without KEEP
    parts_ptr,  # (programs along rows, N) of float32
    rows,
    N,
    ACTIVATION: tl.constexpr,
    KEEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PER_SM: tl.constexpr,
    PDL: tl.constexpr,
):
    """COLUMNS columns of every so many ROWS rows, whose gradients are added up in registers."""
    launch_dependents(PDL)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    wait_for_inputs(PDL)
    for first in range(tl.program_id(1) * ROWS, rows, tl.num_programs(1) * ROWS):
        row = first + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * N + column[None, :]
        mask = (row < rows)[:, None] & (column < N)[None, :]
        x = tl.load(x_ptr + at, mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask, other=0.0).to(tl.float32)
        hidden, slope = activate_with_slope(x, ACTIVATION)
        grad *= slope
        total += grad
        tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask)
        if KEEP:
            tl.store(hidden_ptr + at, hidden.to(hidden_ptr.dtype.element_ty), mask)
    tl.store(parts_ptr + tl.program_id(1) * N + column, tl.sum(total, axis=0), column < N)


def gelu_backward_configs(columns: int) -> list[Config]:
    """Configs of `gelu_backward_`, the most promising first."""
    # Two loads of 16 bytes of each input in flight in every thread, or four.
    shapes = [(8, 256, 4), (16, 128, 4), (8, 512, 4)]
    longest = max(32, next_power_of_2(columns))
    configs = [Config.of(warps, ROWS=rows, COLUMNS=min(n, longest), PER_SM=4) for rows, n, warps in shapes]
    return list(dict.fromkeys(configs))


def gelu_backward_(
    grad: Tensor, x: Tensor, activation: str, keep_hidden: bool, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """`(act(x), sums over all rows)` of the gradient of x (..., N), which takes the place of `grad`, that of act(x).

    Both are contiguous and of one dtype: float16, bfloat16 or float32; `activation` is gelu or gelu_tanh. Computed in
    float32 and rounded once, the sums (N,), float32, not at all; without `keep_hidden` the first result is empty. Sums
    are added up in a fixed order.
    """
    N = x.shape[-1]
    rows = x.numel() // N
    config = config or gelu_backward_configs(N)[0]
    hidden = x.new_empty(x.shape if keep_hidden else 0)
    across = cdiv(N, config["COLUMNS"])
    programs = min(cdiv(rows, config["ROWS"]), max(1, target_of(x).num_sms * config["PER_SM"] // across))
    parts, total = (torch.empty(shape, dtype=torch.float32, device=x.device) for shape in ((programs, N), (N,)))
    constants: dict[str, Any] = {"ACTIVATION": in_half(activation, x.dtype), "KEEP": keep_hidden}
    args = (grad, x, hidden, parts, rows, N)
    launch(gelu_backward_kernel, (across, programs), *args, config=config, like=x, **constants)
    add_parts(parts, total)
    return hidden, total
