"""Collectives as functions of tensors: differentiable, and one node each in a captured graph.

Every rank of a group calls the same ones in the same order. They come in pairs, each of which is the other's backward,
as in Megatron-LM (Shoeybi et al. 2019, and for sequences Korthikanti et al. 2022): what all ranks hold alike has one
gradient, alike on all of them; where each rank holds a part of a sum, the gradients are summed.

| forward                          | backward       |
| -------------------------------- | -------------- |
| `all_reduce`                     | as it is       |
| `copy_to_region`                 | `all_reduce`   |
| `all_gather`                     | `own_slice`    |
| `own_slice`                      | `all_gather`   |
| `all_gather(sum_gradients=True)` | `reduce_scatter` |
| `reduce_scatter`                 | `all_gather(sum_gradients=True)` |

torch's own functional collectives differentiate a loss that is the sum of all ranks', and do so since torch 2.13 only;
they also leave a second node, which waits, for others to lose.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.fx.node import has_side_effect

from burnish.parallel.group import named, rank_and_size

NAMESPACE = "burnish_parallel"

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_c10d = torch.ops._c10d_functional


def all_reduce(x: Tensor, group_name: str) -> Tensor:
    """The sum over all ranks, on each of them; contiguous. Any shape and numeric dtype."""
    result: Tensor = _ops.all_reduce(x, group_name)
    return result


def all_reduce_in_place(x: Tensor, group_name: str) -> Tensor:
    """The same in the memory of `x`, unless gradients are wanted: for generated code, where nobody else reads it. Saves
    a copy of what a layer has computed."""
    if x.requires_grad or not x.is_contiguous():
        return all_reduce(x, group_name)
    dist.all_reduce(x, group=named(group_name))
    return x


def copy_to_region(x: Tensor, group_name: str) -> Tensor:
    """`x`, which all ranks hold alike, for each to compute its part with: the gradients of the parts are summed."""
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return x
    result: Tensor = _ops.copy_to_region(x, group_name)
    return result


def all_gather(x: Tensor, axis: int, group_name: str, sum_gradients: bool = False) -> Tensor:
    """The tensors of all ranks, one behind the other along `axis`; their shapes must be equal.

    Args:
        sum_gradients: each rank goes on with its own part of the work; by default all do the same with the result.
    """
    result: Tensor = _ops.all_gather(x, axis, group_name, sum_gradients)
    return result


def reduce_scatter(x: Tensor, axis: int, group_name: str) -> Tensor:
    """This rank's slice along `axis` of the sum over all ranks. ValueError where the size does not divide."""
    result: Tensor = _ops.reduce_scatter(x, axis, group_name)
    return result


def own_slice(x: Tensor, axis: int, group_name: str) -> Tensor:
    """This rank's slice along `axis` of what all ranks hold alike. ValueError where the size does not divide."""
    result: Tensor = _ops.own_slice(x, axis, group_name)
    return result


# --- what runs ------------------------------------------------------------------------------------


def _all_reduce(x: Tensor, group_name: str) -> Tensor:
    result: Tensor = _c10d.wait_tensor(_c10d.all_reduce(x.contiguous(), "sum", group_name))
    return result


def _copy_to_region(x: Tensor, group_name: str) -> Tensor:
    return x.clone()


def _all_gather(x: Tensor, axis: int, group_name: str, sum_gradients: bool) -> Tensor:
    _, ranks = rank_and_size(group_name)
    gathered: Tensor = _c10d.wait_tensor(_c10d.all_gather_into_tensor(_rows(x).contiguous(), ranks, group_name))
    if x.dim() and axis % x.dim() == 0:
        return gathered
    return torch.cat(gathered.chunk(ranks), dim=axis)


def _reduce_scatter(x: Tensor, axis: int, group_name: str) -> Tensor:
    _, ranks = rank_and_size(group_name)
    _part(x, axis, ranks)
    rows = torch.cat(x.chunk(ranks, dim=axis)) if axis % x.dim() else x.contiguous()
    result: Tensor = _c10d.wait_tensor(_c10d.reduce_scatter_tensor(rows, "sum", ranks, group_name))
    return result


def _own_slice(x: Tensor, axis: int, group_name: str) -> Tensor:
    rank, ranks = rank_and_size(group_name)
    size = _part(x, axis, ranks)
    return x.narrow(axis, rank * size, size).clone(memory_format=torch.contiguous_format)


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() else x[None]


def _part(x: Tensor, axis: int, ranks: int) -> Any:
    """A rank's share of the size along `axis`."""
    size = x.shape[axis]
    if isinstance(size, int) and size % ranks:
        raise ValueError(f"a size of {size} along axis {axis} does not divide among {ranks} ranks")
    return size // ranks


# --- their shapes ---------------------------------------------------------------------------------


def _same_shape(x: Tensor, group_name: str) -> Tensor:
    return x.new_empty(x.shape)


def _longer(x: Tensor, axis: int, group_name: str, sum_gradients: bool) -> Tensor:
    _, ranks = rank_and_size(group_name)
    return _resized(_rows(x), axis, _rows(x).shape[axis] * ranks)


def _shorter(x: Tensor, axis: int, group_name: str) -> Tensor:
    _, ranks = rank_and_size(group_name)
    return _resized(x, axis, _part(x, axis, ranks))


def _resized(x: Tensor, axis: int, size: Any) -> Tensor:
    shape = list(x.shape)
    shape[axis] = size
    return x.new_empty(shape)


# --- their gradients ------------------------------------------------------------------------------


def _backward_of_all_reduce(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return grad, None


def _backward_of_copy(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return all_reduce(grad, *ctx.others), None


def _backward_of_all_gather(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    axis, group_name, sum_gradients = ctx.others
    mine = reduce_scatter(grad, axis, group_name) if sum_gradients else own_slice(grad, axis, group_name)
    return mine, None, None, None


def _backward_of_reduce_scatter(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    axis, group_name = ctx.others
    return all_gather(grad, axis, group_name, sum_gradients=True), None, None


def _backward_of_own_slice(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return all_gather(grad, *ctx.others), None, None


def _keep_others(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.others = inputs[1:]


def _register(
    schema: str, eager: Callable[..., Tensor], fake: Callable[..., Tensor], backward: Callable[..., tuple[Any, ...]]
) -> None:
    _LIBRARY.define(schema)
    name = schema.partition("(")[0]
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, eager, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=_keep_others, lib=_LIBRARY)


for _schema, _eager, _fake, _backward in (
    ("all_reduce(Tensor x, str group_name) -> Tensor", _all_reduce, _same_shape, _backward_of_all_reduce),
    ("copy_to_region(Tensor x, str group_name) -> Tensor", _copy_to_region, _same_shape, _backward_of_copy),
    (
        "all_gather(Tensor x, int axis, str group_name, bool sum_gradients) -> Tensor",
        _all_gather,
        _longer,
        _backward_of_all_gather,
    ),
    (
        "reduce_scatter(Tensor x, int axis, str group_name) -> Tensor",
        _reduce_scatter,
        _shorter,
        _backward_of_reduce_scatter,
    ),
    ("own_slice(Tensor x, int axis, str group_name) -> Tensor", _own_slice, _shorter, _backward_of_own_slice),
):
    _register(_schema, _eager, _fake, _backward)

_ops = torch.ops.burnish_parallel
# The other ranks wait for these: nobody may leave one out, or do it once where it is asked for twice.
for _overload in (_ops.all_reduce.default, _ops.all_gather.default, _ops.reduce_scatter.default):
    has_side_effect(_overload)
