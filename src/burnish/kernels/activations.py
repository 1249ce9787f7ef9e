"""The activations that Ops know by name, on float32 blocks inside a kernel."""

from __future__ import annotations

import torch
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
def erf_gelu(x):
    """`x * (1 + erf(x / sqrt(2))) / 2` with 14 operations where erf alone has 30.

    The normal distribution's tail by formula 7.1.26 of Abramowitz and Stegun, whose error of 1.5e-7 is far below the
    rounding of half types; the tail is multiplied, not subtracted, so that large negative x keep their digits.
    """
    magnitude = tl.abs(x) * 0.7071067811865476
    t = 1.0 / (1.0 + 0.3275911 * magnitude)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    tail = 0.5 * series * tl.exp(-magnitude * magnitude)
    return x * tl.where(x < 0, tail, 1.0 - tail)


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
