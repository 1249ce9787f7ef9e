"""Collectives before and behind a module, as its hooks: what a hand-made division is synchronized by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from burnish.parallel.collectives import all_gather, all_reduce, copy_to_region, own_slice, reduce_scatter
from burnish.parallel.group import Mesh, group_of
from burnish.parallel.layers import (
    SEQUENCE,
    ColumnParallel,
    RowParallel,
    VocabParallel,
    axes_of,
    become_row_parallel,
    is_linear,
)
from burnish.parallel.shard import shard_of

SYNCS = {
    ("fwd_pre", "all_gather"): SEQUENCE,
    ("fwd_pre", "own_slice"): SEQUENCE,
    ("fwd_post", "all_reduce"): None,
    ("fwd_post", "all_gather"): -1,
    ("fwd_post", "reduce_scatter"): SEQUENCE,
    ("bwd_post", "all_reduce"): None,
}
"""What `sync` can do, each with the axis that it is done along unless another is given."""


@dataclass(frozen=True)
class Sync:
    """One collective on the first tensor that goes into a module, or comes out of it; a hook.

    Attributes:
        when: "fwd_pre" (the input), "fwd_post" (the result) or "bwd_post" (the gradient of the input).
        op: which collective.
        axis: along which; None for those that have none.
    """

    when: str
    op: str
    axis: int | None
    group_name: str

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
        if self.when == "fwd_post":
            return self._on_result(rest[-1])
        (kwargs,) = rest
        if args:
            return (self._on(args[0]), *args[1:]), kwargs
        name = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
        return args, {**kwargs, name: self._on(kwargs[name])}

    def _on_result(self, result: Any) -> Any:
        return self._on(result) if isinstance(result, Tensor) else (self._on(result[0]), *result[1:])

    def _on(self, x: Tensor) -> Tensor:
        if self.when == "bwd_post":
            return copy_to_region(x, self.group_name)
        if self.op == "all_reduce":
            return all_reduce(x, self.group_name)
        assert self.axis is not None
        if self.op == "all_gather":  # what is gathered before a module, each rank works on a part of its own with
            return all_gather(x, self.axis, self.group_name, sum_gradients=self.when == "fwd_pre")
        return (reduce_scatter if self.op == "reduce_scatter" else own_slice)(x, self.axis, self.group_name)


def sync(module: nn.Module, when: str, op: str, mesh: Mesh = None, *, axis: int | None = None) -> None:
    """Has a collective done before or behind `module`, in place.

    | when       | op               | for                                                                     |
    | ---------- | ---------------- | ----------------------------------------------------------------------- |
    | `fwd_post` | `all_reduce`     | a layer whose weight is divided along its inputs: the sum of the parts  |
    | `fwd_post` | `all_gather`     | one that is divided along its outputs: they are put together again      |
    | `fwd_post` | `reduce_scatter` | the sum of the parts, each rank its slice of the sequence               |
    | `fwd_pre`  | `all_gather`     | an input of which each rank has a slice of the sequence                 |
    | `fwd_pre`  | `own_slice`      | an input that is whole, of which each rank goes on with a slice         |
    | `bwd_post` | `all_reduce`     | a layer that is divided along its outputs: its input's gradient, summed |

    The bias of a linear layer that is divided along its inputs is added once, behind the sum.

    Args:
        axis: of `all_gather`, the last by default behind a module and the sequence, 1, before it; of `reduce_scatter`
            and `own_slice` the sequence.

    Raises:
        ValueError: another `when` or `op`, an axis for what has none, or the same once more.
    """
    if (when, op) not in SYNCS:
        raise ValueError(f"sync: there is no {op!r} at {when!r}; there are: {', '.join(map(' '.join, SYNCS))}")
    if axis is not None and SYNCS[when, op] is None:
        raise ValueError(f"sync: axis={axis}: {op} at {when} has none")
    made = Sync(when, op, SYNCS[when, op] if axis is None else axis, group_of(mesh).group_name)
    if any(known.when == when and known.op == op for known in syncs_of(module)):
        raise ValueError(f"sync: {op} at {when} is there already")
    if when == "fwd_post" and op != "all_gather" and _is_cut_along_inputs(module) and made.axis in (None, SEQUENCE):
        become_row_parallel(module, made.group_name)
        module.scatters = op == "reduce_scatter"  # type: ignore[assignment]
    elif when == "fwd_post":
        module.register_forward_hook(made)
    else:
        module.register_forward_pre_hook(made, with_kwargs=True)


def syncs_of(module: nn.Module) -> list[Sync]:
    """What was put before and behind a module."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    found = [hook for hook in hooks if isinstance(hook, Sync)]
    if isinstance(module, RowParallel):
        op, axis = ("reduce_scatter", SEQUENCE) if module.scatters else ("all_reduce", None)
        found.append(Sync("fwd_post", op, axis, module.group_name))
    return found


def group_names_of(model: nn.Module) -> Iterator[str]:
    """The groups among which modules of the model are divided, or synchronized."""
    for parameter in model.parameters():
        if (shard := shard_of(parameter)) is not None:
            yield shard.group_name
    for module in model.modules():
        if isinstance(module, (ColumnParallel, RowParallel, VocabParallel)):
            yield module.group_name
        yield from (known.group_name for known in syncs_of(module))


def missing_syncs(model: nn.Module, *, training: bool = True) -> Iterator[str]:
    """What a hand-made division lacks, one line each: sums behind layers that are divided along their inputs, and (for
    `training`) of the gradients before those that are divided along their outputs, on the layer or around it."""
    for path, module in model.named_modules():
        if not is_linear(module):
            continue
        shard = shard_of(module.weight)
        if shard is None:
            continue
        outputs, _ = axes_of(module)
        if shard.axis != outputs:
            if not _has_around(model, path, "fwd_post", "all_reduce", "reduce_scatter"):
                yield f"{path}: its weight is divided along its inputs; sync('fwd_post', 'all_reduce') sums the parts"
        elif training and not (
            _has_around(model, path, "bwd_post", "all_reduce") or _has_around(model, path, "fwd_pre", "all_gather")
        ):
            yield f"{path}: its weight is divided along its outputs; sync('bwd_post', 'all_reduce') sums its gradients"


def _has_around(model: nn.Module, path: str, when: str, *ops: str) -> bool:
    names = path.split(".")
    around = [model.get_submodule(".".join(names[:count])) for count in range(len(names) + 1)]
    return any(sync.when == when and sync.op in ops for module in around for sync in syncs_of(module))


def _is_cut_along_inputs(module: nn.Module) -> bool:
    if not is_linear(module):
        return False
    shard = shard_of(module.weight)  # type: ignore[arg-type]
    return shard is not None and shard.axis == axes_of(module)[1]
