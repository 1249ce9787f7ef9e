"""What several Ops share: dtypes, byte counts, input checks and reasons."""

from __future__ import annotations

import torch
from torch import Tensor

HALF_TYPES = (torch.float16, torch.bfloat16)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def nbytes(*tensors: Tensor | None) -> int:
    """Bytes of all elements; the dimensions may be symbolic. An expanded tensor counts in full."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def check_floating(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{name} has dtype {tensor.dtype}; it must be a floating-point tensor")


def check_vector(name: str, tensor: Tensor | None, size: int, of: str) -> None:
    """A one-dimensional floating tensor of `size` entries, or None; `of` says in words what has that size."""
    if tensor is None:
        return
    check_floating(name, tensor)
    if tensor.dim() != 1 or tensor.shape[0] != size:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be ({size},): {of}")


def check_same_dtype(name: str, tensor: Tensor | None, like_name: str, like: Tensor) -> None:
    if tensor is not None and tensor.dtype != like.dtype:
        raise TypeError(f"{name} has dtype {tensor.dtype} where {like_name} has {like.dtype}; convert one of them")


def not_on_cpu(tensor: Tensor) -> list[str]:
    return [] if tensor.device.type == "cpu" else [f"the inputs are on {tensor.device.type}, not on cpu"]


def not_same_dtype(name: str, tensor: Tensor | None, like_name: str, like: Tensor) -> list[str]:
    if tensor is None or tensor.dtype == like.dtype:
        return []
    return [f"{name} is {tensor.dtype} where {like_name} is {like.dtype}"]


def is_traced(x: Tensor) -> bool:
    """Whether a graph is being recorded (torch.compile, torch.export) rather than a result computed."""
    return type(x) not in (Tensor, torch.nn.Parameter) or torch._C._len_torch_dispatch_stack() > 0
