"""The activations that Ops know by name, out of place and in place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu", "tanh")
GATES = ("silu", "gelu", "gelu_tanh")


def check_activation(activation: str, allowed: tuple[str, ...] = ACTIVATIONS) -> None:
    if activation not in allowed:
        raise ValueError(f"activation is {activation!r}; it must be one of {', '.join(allowed)}")


def activate(x: Tensor, activation: str) -> Tensor:
    """`x` through the activation; `x` itself for "none". "gelu" is exact (erf), "gelu_tanh" its approximation."""
    if activation == "relu":
        return F.relu(x)
    if activation == "gelu":
        return F.gelu(x)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if activation == "silu":
        return F.silu(x)
    if activation == "tanh":
        return torch.tanh(x)
    return x


def activate_(x: Tensor, activation: str) -> Tensor:
    """The same in place: a fresh output of some megabytes costs the CPU more in page faults than in arithmetic."""
    if activation == "relu":
        return x.relu_()
    if activation == "gelu":
        return torch.ops.aten.gelu_(x)
    if activation == "gelu_tanh":
        return torch.ops.aten.gelu_(x, approximate="tanh")
    if activation == "silu":
        return F.silu(x, inplace=True)
    if activation == "tanh":
        return x.tanh_()
    return x
