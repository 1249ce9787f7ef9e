"""Inputs like the example inputs, with other values."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from burnish.scheduling.calls import ExampleInputs

_MASKED = -1e4  # what is added to a score that must not count is at most this


def fresh_inputs(like: ExampleInputs, seed: int) -> ExampleInputs:
    """Inputs of the same structure, shapes, dtypes and devices; the same seed gives the same ones on every device.

    Floating tensors have entries of the original, drawn anew and made smaller by up to a half: they stay in its range
    and keep its sign. Integers are drawn from the original's range, so that an id stays a valid id; where some are
    negative (labels with -100), from its values. Masks, positions, constants and everything else stay what they are.
    A tensor that is given twice is so again.
    """
    generator = torch.Generator().manual_seed(seed)
    made: dict[int, Tensor] = {}

    def fresh(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = _fresh(tensor.detach(), generator)
        return made[id(tensor)]

    args, kwargs = pytree.tree_map_only(Tensor, fresh, (like.args, dict(like.kwargs)))
    return ExampleInputs(args, kwargs)


def same_inputs_again(like: ExampleInputs) -> ExampleInputs:
    """A copy, for one call: what a call changes in place, the next one does not see."""
    copies: dict[int, Tensor] = {}

    def copied(tensor: Tensor) -> Tensor:
        return copies.setdefault(id(tensor), tensor.detach().clone())

    args, kwargs = pytree.tree_map_only(Tensor, copied, (like.args, dict(like.kwargs)))
    return ExampleInputs(args, kwargs)


def _fresh(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if not tensor.numel() or is_kept(tensor):
        return tensor.clone()
    values = tensor.cpu()
    if tensor.is_floating_point():
        drawn = _drawn(values, generator) * (1 - torch.rand(values.shape, generator=generator) / 2)
    elif int(values.min()) < 0:
        drawn = _drawn(values, generator)
    else:
        drawn = torch.randint(int(values.min()), int(values.max()) + 1, values.shape, generator=generator)
    return drawn.to(tensor.dtype).to(tensor.device)


def _drawn(values: Tensor, generator: torch.Generator) -> Tensor:
    """Entries of a tensor, each any number of times."""
    return values.flatten()[torch.randint(values.numel(), values.shape, generator=generator)]


def is_kept(tensor: Tensor) -> bool:
    """Whether a tensor is a mask, constant, positions, or of a dtype that is neither real nor an integer."""
    if tensor.dtype is torch.bool or tensor.is_complex() or tensor.is_quantized:
        return True
    low, high = tensor.min(), tensor.max()
    if low == high:
        return True
    if tensor.is_floating_point():
        zeros_and_ones = bool(((tensor == 0) | (tensor == 1)).all())
        return zeros_and_ones or not bool(tensor.isfinite().all()) or float(low) <= _MASKED
    if int(low) == 0 and int(high) == 1:
        return True
    return tensor.dim() > 0 and tensor.shape[-1] > 2 and bool((tensor.diff(dim=-1) >= 0).all())
