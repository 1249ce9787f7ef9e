"""The activations that Ops know by name, on float32 blocks inside a kernel."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """`1 / (1 + exp(-x))`; exp overflows to infinity for x < -88, which gives the 0 that it should."""
    return 1.0 / (1.0 + tl.exp(-x))


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
def activate(x, ACTIVATION: tl.constexpr):
    """`x` (float32) through the activation: none, relu, gelu (erf), gelu_tanh, silu or tanh. NaN stays NaN."""
    if ACTIVATION == "relu":
        x = tl.where(x < 0, 0.0, x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(u)) is sigmoid(2 * u); the constant is 2 * sqrt(2 / pi).
        x = x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "silu":
        x = x * sigmoid(x)
    elif ACTIVATION == "tanh":
        x = tanh(x)
    return x
