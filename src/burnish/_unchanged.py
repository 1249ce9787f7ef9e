"""Calls of a model that leave no trace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def nothing_changed(model: nn.Module) -> Iterator[None]:
    """Within the `with`, calls of the model draw no random numbers that others miss, and in training mode what its
    layers (BatchNorm) count is counted in vain."""
    tensors = [*model.parameters(), *model.buffers()]
    counted = [buffer for buffer in model.buffers() if not buffer.is_meta] if model.training else []
    before = [(buffer, buffer.clone()) for buffer in counted]
    try:
        with torch.random.fork_rng({tensor.device.index for tensor in tensors if tensor.is_cuda}):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
