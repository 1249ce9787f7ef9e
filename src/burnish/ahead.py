"""Which kernels a new batch or sequence size will want: those of the sizes that the tuner knows, from a table or from
earlier processes. They are compiled while the first size is served."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from burnish.choose import Seen
from burnish.prepare import Prepared
from burnish.tuning import Tuner, key_of

_MOST_SIZES = 16  # of each signature, the nearest ones


def launches_ahead(prepared: Prepared, seen: Seen, tuner: Tuner) -> list[Any]:
    """The launches to be compiled, none where the tuner chose no kernel of this package's."""
    if not any(tuner.choices[key].config for key in seen.arguments if key in tuner.choices):
        return []
    from burnish.kernels.warm_up import launches_of

    return launches_of(_calls(prepared, seen, tuner))


def compile_ahead(launches: Sequence[Any]) -> None:
    """Begins, and does not wait: a new size waits for what it wants of them."""
    if launches:
        from burnish.kernels.warm_up import compile_meanwhile

        compile_meanwhile(launches)


def _calls(prepared: Prepared, seen: Seen, tuner: Tuner) -> Iterator[Callable[[], Any]]:
    """One at a time, because each has inputs of its own."""
    nodes = {node.name: node for node in prepared.program.graph_module.graph.nodes}
    slots = {seen.keys[slot.name]: slot for slot in prepared.executable.slots if slot.name not in prepared.rejected}
    for key, slot in slots.items():
        node, args = nodes[slot.origin], seen.arguments[key][0]
        values = [_value(arg) for arg in slot.op.bind(*node.args, **node.kwargs)]
        for sizes in tuner.known_sizes(key)[:_MOST_SIZES]:
            others = _resized(args, values, sizes)
            if others is not None and key_of(slot.op, others).family == key.family:
                function, choice = tuner.choose(slot.op, others, budget_us=0, in_place=slot.in_place)
                if choice.config is not None:
                    yield partial(function, *others)


def _value(arg: Any) -> Any:
    return arg.meta.get("val") if isinstance(arg, fx.Node) else arg


def _resized(args: Sequence[Any], values: Sequence[Any], sizes: Sequence[int]) -> list[Any] | None:
    """The arguments with these sizes and any content; None where a size that the model fixes would differ."""
    remaining, others = list(sizes), []
    for arg, value in zip(args, values, strict=True):
        if not isinstance(arg, Tensor):
            others.append(arg)
            continue
        shape, remaining = remaining[: arg.dim()], remaining[arg.dim() :]
        free = [isinstance(size, torch.SymInt) for size in value.shape] if isinstance(value, Tensor) else []
        if len(shape) != arg.dim() or len(free) != arg.dim():
            return None
        if any(not f and new != old for f, new, old in zip(free, shape, arg.shape, strict=True)):
            return None
        others.append(arg if tuple(shape) == arg.shape else _like(arg, shape))
    return others


def _like(arg: Tensor, shape: Sequence[int]) -> Tensor:
    """An empty tensor of that shape whose elements lie as those of `arg` do: a view of a merged product stays one."""
    strides = []
    for stride in arg.stride():
        inner = [i for i in range(arg.dim()) if 0 < arg.stride(i) < stride]
        strides.append(
            stride * math.prod(shape[i] for i in inner) // math.prod(arg.shape[i] for i in inner) if stride else 0
        )
    return torch.empty_strided(shape, strides, dtype=arg.dtype, device=arg.device)
