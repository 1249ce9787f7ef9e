"""What speaks against any Triton kernel."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def triton_why_not(x: Tensor) -> list[str]:
    """Reasons against a Triton kernel on `x`: its device, its dtype, nothing to compute."""
    reasons = []
    if not x.is_cuda:
        reasons.append(f"the inputs are on {x.device.type}, not on a CUDA device")
    elif fault := _unsupported(x.device.index):
        reasons.append(fault)
    if x.dtype not in _DTYPES:
        reasons.append(f"the inputs are {x.dtype}; the kernels take float16, bfloat16 and float32")
    if x.numel() == 0:
        reasons.append("an input is empty")
    return reasons


def hopper_why_not(x: Tensor) -> list[str]:
    """Reasons against a Gluon kernel on `x`: those, and that it is written for Hopper."""
    reasons = triton_why_not(x)
    if x.is_cuda and torch.cuda.get_device_capability(x.device)[0] != 9:
        reasons.append(f"compute capability {torch.cuda.get_device_capability(x.device)} is not 9.0, Hopper's")
    return reasons


@functools.cache
def _unsupported(device: int) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= (8, 0) else f"compute capability {capability} is below 8.0"
