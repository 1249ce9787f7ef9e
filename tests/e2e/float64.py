"""The end-to-end oracle: the user's own model, as it is written, with every floating number in float64."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from burnish.numerics import assert_close
from burnish.runtime.module import OptimizedModule


class _Float64(TorchDispatchMode):
    """Casts that a model writes down ("compute this in float32") go to float64 too. A view may have to copy: on CUDA
    attention lays its result out otherwise in float64 than in half precision."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.view.default:
            func = torch.ops.aten.reshape.default
        args, kwargs = pytree.tree_map_only(torch.dtype, _widened, (args, kwargs or {}))
        return func(*args, **kwargs)


def _widened(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype.is_floating_point else dtype


def in_float64(value: Any) -> Any:
    """`value` (a nesting of tensors) with its floating tensors in float64."""
    return pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, value)


def outputs_in_float64(
    model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> list[Any]:
    """The flat outputs of `model` (untouched: a copy runs), computed in float64 from end to end.

    Independent of Burnish's capture, whose mistakes it is to find.
    """
    exact = copy.deepcopy(model).double()
    with torch.no_grad(), _Float64():
        return pytree.tree_leaves(exact(*in_float64(tuple(args)), **in_float64(dict(kwargs or {}))))


def assert_same_outputs(fast: OptimizedModule, model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """`fast` computes what `model` does, in outputs of the same structure, and the original did not have to step in."""
    with torch.no_grad():
        eager, result = model(**inputs), fast(**inputs)
    assert type(result) is type(eager)
    assert pytree.tree_structure(result) == pytree.tree_structure(eager)
    assert fast.schedule.served[-1].kept_original is None
    assert_close(pytree.tree_leaves(result), pytree.tree_leaves(eager), outputs_in_float64(model, (), inputs))


def gradients_in_float64(model: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The gradients of `loss(outputs)` by parameter name, computed in float64 from end to end."""
    exact = copy.deepcopy(model).double()
    with _Float64():
        loss(exact(**in_float64(dict(kwargs)))).backward()
    return gradients(exact)


def loss(outputs: Any) -> Tensor:
    """A scalar to which every floating output contributes, each entry with another weight."""
    total = torch.zeros((), dtype=torch.float64)
    for output in pytree.tree_leaves(outputs):
        if isinstance(output, Tensor) and output.is_floating_point():
            weights = torch.linspace(0.5, 1.5, output.numel(), dtype=torch.float64).view_as(output)
            total = total + (output * weights.to(output.dtype)).sum().double()
    return total


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients that `model`'s parameters hold, by name."""
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
