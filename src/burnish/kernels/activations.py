"""The activations that Ops know by name, on float32 blocks inside a kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """`1 / (1 + exp(-x))` in 5 instructions, where `exp` and a division take 13; exp2 overflows to infinity for
    x < -88, which gives the 0 that it should."""
    root = tl.math.rsqrt(1.0 + tl.math.exp2(-1.4426950408889634 * x))
    return root * root


@triton.jit
def tanh(x):
    """tanh through exp, the same on every backend and in the interpreter, which has no libdevice."""
    x_squared = x * x
    e = tl.exp(-2.0 * tl.abs(x))
    magnitude = (1.0 - e) / (1.0 + e)
    # 1 - e cancels near zero. Up to 0.1 the series' next term is below 6e-8 of the result: float32's rounding.
    series = x * (1.0 + x_squared * (-0.3333333333 + 0.1333333333 * x_squared))
    return tl.where(tl.abs(x) < 0.1, series, tl.where(x < 0, -magnitude, magnitude))


@triton.jit
def erf_gelu(x):
    """`x * (1 + erf(x / sqrt(2))) / 2` for results in half precision, in 10 instructions where erf alone has 25.

    As `max(x, 0) - |x| * tail(|x|)`, where log2 of the normal distribution's tail is a polynomial: the minimax of
    degree 6 on [0, 7], with a relative error below 5e-5 up to 4 (float16 rounds by 5e-4) and below 1e-3 up to 6.5.
    """
    size = tl.minimum(tl.abs(x), 7.0)
    log = -0.051381639345 + size * (0.0072335605262 + size * (-0.00061272920729 + size * 2.2828220759e-05))
    log = -1.0 + size * (-1.1504871110812 + size * (-0.46087266846196 + size * log))
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) - size * tl.math.exp2(log)


def in_half(activation: str, dtype: torch.dtype) -> str:
    """The name of the activation in a kernel whose results have this dtype."""
    return "gelu_half" if activation == "gelu" and dtype != torch.float32 else activation


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """`x` (float32) through the activation: none, relu, gelu (erf), gelu_half, gelu_tanh, silu or tanh. NaN stays."""
    if ACTIVATION == "relu":
        x = tl.where(x < 0, 0.0, x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_half":
        x = erf_gelu(x)
    elif ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(u)) is sigmoid(2 * u); the constant is 2 * sqrt(2 / pi).
        x = x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "silu":
        x = x * sigmoid(x)
    elif ACTIVATION == "tanh":
        x = tanh(x)
    return x
