"""Copies of a module tree that share every tensor with it."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from types import MethodType

from torch import Tensor, nn
from torch.utils import _pytree as pytree

_CONTAINERS = (dict, OrderedDict, list, set)


def structural_clone(model: nn.Module) -> nn.Module:
    """A copy of the module tree (containers, hooks, settings) whose parameters and buffers are the model's own tensors.

    Modules, tied parameters and hooks that are shared in `model` are shared alike in the copy.

    Raises ValueError where something in the model cannot be copied.
    """
    shared = {id(tensor): tensor for tensor in _tensors(model)}
    try:
        return copy.deepcopy(model, shared)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"model: a {type(model).__name__} that cannot be copied: {reason}") from error


def shallow_copy(module: nn.Module) -> nn.Module:
    """`module` with the same children and tensors, in tables of its own."""
    copied: nn.Module = object.__new__(type(module))
    for name, value in vars(module).items():
        copied.__dict__[name] = copy.copy(value) if type(value) in _CONTAINERS else bound_to(copied, value, module)
    return copied


def bound_to(new: nn.Module, value: object, old: nn.Module) -> object:
    """`value`, or where it is a method of `old` (a forward that recomputes) the same method of `new`."""
    if isinstance(value, MethodType) and value.__self__ is old:
        return MethodType(value.__func__, new)
    return value


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, and what modules hold as plain attributes (the weight that weight norm computes)."""
    for module in model.modules():
        for value in pytree.tree_leaves(vars(module)):
            if isinstance(value, Tensor):
                yield value
