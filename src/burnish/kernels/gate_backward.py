"""The backward pass of `act(gate) * up`, with its result once more: one pass over memory gives both."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from burnish.kernels.activations import sigmoid
from burnish.kernels.launch import (
    Config,
    cdiv,
    first_config,
    launch,
    launch_dependents,
    next_power_of_2,
    wait_for_inputs,
)


@triton.jit
def activate_with_slope(x, ACTIVATION: tl.constexpr):
    """`act(x)` and its derivative, for silu, gelu (erf), gelu_half and gelu_tanh, in float32.

    All are `x * s(x)` with a sigmoid s, so that the slope is `s + x * s'`. `1 - s` is the sigmoid of the negative: as a
    difference it would be wrong by float32's rounding, which x makes larger. Counted, silu is about 20 instructions and
    gelu 40, where an H200's bandwidth leaves room for 85 to each bfloat16 element of the pass (12 bytes).
    """
    if ACTIVATION == "silu":
        share = sigmoid(x)
        slope = share * (1.0 + x * sigmoid(-x))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(u)) is sigmoid(2 * u), as in `activate`. The constants are 2 * sqrt(2 / pi), and that by
        # 3 * 0.044715.
        x_squared = x * x
        inner = 1.5957691216057308 * x * (1.0 + 0.044715 * x_squared)
        share = sigmoid(inner)
        slope = share + x * share * sigmoid(-inner) * (1.5957691216057308 + 0.214064448818 * x_squared)
    elif ACTIVATION == "gelu_half":
        # For results in half precision: the normal distribution's tail by Abramowitz and Stegun's 7.1.26, off by 1.5e-7
        # at most. It needs the exponential that the slope needs, and is 15 instructions with it. The square of a root
        # is a reciprocal in 2.
        bell = tl.math.exp2(-0.7213475204444817 * x * x)
        root = tl.math.rsqrt(1.0 + 0.2316418882663604 * tl.abs(x))
        t = root * root
        series = 0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)))
        tail = t * series * bell
        share = tl.where(x < 0, tail, 1.0 - tail)
        slope = share + x * (0.3989422804014327 * bell)
    else:
        share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        slope = share + x * (0.3989422804014327 * tl.math.exp2(-0.7213475204444817 * x * x))
    return x * share, slope


@triton.jit
def gate_backward_kernel(
    grad_ptr,  # (rows, columns)
    gate_up_ptr,  # (rows, 2 * columns)
    d_gate_up_ptr,  # (rows, 2 * columns)
    hidden_ptr,  # (rows, columns); not written without KEEP
    columns,
    ACTIVATION: tl.constexpr,
    KEEP: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Block `program_id(0)`, counted row by row."""
    launch_dependents(PDL)
    blocks = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = None if EVEN else column < columns
    narrow, wide = row * columns + column, row * (2 * columns) + column
    wait_for_inputs(PDL)
    gate = tl.load(gate_up_ptr + wide, mask).to(tl.float32)
    up = tl.load(gate_up_ptr + wide + columns, mask).to(tl.float32)
    grad = tl.load(grad_ptr + narrow, mask).to(tl.float32)
    active, slope = activate_with_slope(gate, ACTIVATION)
    dtype = d_gate_up_ptr.dtype.element_ty
    tl.store(d_gate_up_ptr + wide, (grad * up * slope).to(dtype), mask)
    tl.store(d_gate_up_ptr + wide + columns, (grad * active).to(dtype), mask)
    if KEEP:
        tl.store(hidden_ptr + narrow, (active * up).to(dtype), mask)


def gate_backward_configs(columns: int) -> list[Config]:
    """Configs of `gate_backward` for rows of `columns` gates, the most promising first."""
    # Loads of 16 bytes of a half type, one of each of the three inputs in flight in every thread, or two.
    shapes = [(1024, 4), (2048, 4), (2048, 8)]
    longest = max(32, next_power_of_2(columns))
    return list(dict.fromkeys(Config.of(num_warps=warps, BLOCK=min(block, longest)) for block, warps in shapes))


def gate_backward(
    grad_hidden: Tensor, gate_up: Tensor, activation: str, keep_hidden: bool = True, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """The gradient of gate_up (..., 2*I) and `act(gate) * up` (..., I; without `keep_hidden` empty), both contiguous.

    grad_hidden is (..., I). Dtypes: float16, bfloat16 or float32, the same; computed in float32 and rounded once.
    Inputs that are not contiguous are copied first. `activation` is silu, gelu or gelu_tanh.
    """
    columns = gate_up.shape[-1] // 2
    config = config or first_config(gate_backward_configs, columns)
    grad_hidden, gate_up = grad_hidden.contiguous(), gate_up.contiguous()
    d_gate_up = gate_up.new_empty(gate_up.shape)
    hidden = gate_up.new_empty(grad_hidden.shape if keep_hidden else 0)
    constants: dict[str, Any] = {
        "ACTIVATION": activation,
        "KEEP": keep_hidden,
        "EVEN": columns % config["BLOCK"] == 0,
    }
    programs = grad_hidden.numel() // columns * cdiv(columns, config["BLOCK"])
    args = (grad_hidden, gate_up, d_gate_up, hidden, columns)
    launch(gate_backward_kernel, (programs,), *args, config=config, like=gate_up, **constants)
    return d_gate_up, hidden
