"""Keys, values and masks as the attention kernel takes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from burnish.kernels.attention_configs import is_by_key


def described(t: Tensor, rows: int, columns: int) -> Any:
    """k or v as a descriptor for the tensor memory accelerator, which copies blocks and pads them with zeros."""
    return TensorDescriptor(t, list(t.shape), list(t.stride()), [1, 1, rows, columns])


def prepared_bias(bias: Tensor | None, q: Tensor, full: tuple[int, ...]) -> tuple[str, Tensor, tuple[int, ...]]:
    """How the kernel is to use the bias, the bias (any tensor where there is none), and its strides in four dims."""
    if bias is None:
        return "", q, (0, 0, 0, 0)
    kind = "allowed" if bias.dtype == torch.bool else "added"
    if is_by_key(bias):
        kind += " by key"
    return kind, as_bytes(bias), bias.expand(full).stride()


def as_bytes(mask: Tensor) -> Tensor:
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask
