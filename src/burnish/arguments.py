"""What an Op has to know of a call's arguments before it picks an Impl: who looks on, and what kind they are."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_PLAIN_VALUES = frozenset({type(None), bool, int, float, str})
_PLAIN_TYPES = _PLAIN_VALUES | {Tensor, torch.nn.Parameter}


def is_traced(args: tuple[Any, ...]) -> bool:
    """Whether someone wants to see one node instead of a result: fx, fake tensors, tensor subclasses, active modes."""
    return (
        not _PLAIN_TYPES.issuperset(map(type, args))
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
    )


def signature_of(args: tuple[Any, ...]) -> list[Any]:
    """All that a check and an Impl's reasons may go by but values: of a tensor also whether 16 bytes can be loaded at
    once."""
    found: list[Any] = []
    for arg in args:
        if type(arg) not in _PLAIN_VALUES and isinstance(arg, Tensor):
            found += arg.dtype, arg.device, arg.shape, arg.stride(), arg.data_ptr() & 15
        else:
            found.append(arg)
    return found


@functools.cache
def computes_next(keyset: int) -> bool:
    """Whether a call with this keyset, in autograd's place, computes next: on plain tensors, and no mode looks on."""
    below = torch._C.DispatchKeySet.from_raw_repr(keyset) & torch._C._after_autograd_keyset
    return below.highestPriorityTypeId() in (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)


def is_transformed() -> bool:
    """Whether the call is within vmap, jvp or their like."""
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0
