"""What the normalizing Ops share of their Triton Impls: reasons against them, and how to run them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from burnish.ops._common import HALF_TYPES
from burnish.ops._triton import triton_why_not

_MAX_COLUMNS = 16384  # as in burnish.kernels.norms, which needs triton


def triton_norm_why_not(x: Tensor, *vectors: Tensor | None) -> list[str]:
    """Reasons against the kernels for rows like x's, with these weights and biases."""
    reasons = triton_why_not(x)
    if x.shape[-1] > _MAX_COLUMNS:
        reasons.append(f"rows of {x.shape[-1]} entries do not fit a program's registers; {_MAX_COLUMNS} do")
    for dtype in sorted({v.dtype for v in vectors if v is not None} - {*HALF_TYPES, torch.float32}, key=str):
        reasons.append(f"weight or bias is {dtype}; the kernels take float16, bfloat16 and float32")
    return reasons


def triton_norm_configs(x: Tensor, added: bool) -> list[Any]:
    from burnish.kernels.launch import target_of
    from burnish.kernels.norms import norm_configs

    return norm_configs(x.numel() // x.shape[-1], x.shape[-1], x.dtype, added, target_of(x))


def triton_norm_backward_configs(x: Tensor, grad_sum: Tensor | None, crowded: bool = False) -> list[Any]:
    from burnish.kernels.launch import target_of
    from burnish.kernels.norms_backward import norm_backward_configs

    rows, N = x.numel() // x.shape[-1], x.shape[-1]
    return norm_backward_configs(rows, N, x.dtype, grad_sum is not None, target_of(x), crowded)
