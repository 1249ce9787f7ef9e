"""The position of one new token, `arange(1) + lengths`, is `lengths`: two kernels less."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from burnish import ops
from burnish.op import Op
from burnish.rewrites.rewrite import Outcome, arguments, insert, value

aten = torch.ops.aten
_RANGES = (aten.arange.default, aten.arange.start, aten.arange.start_step)


_POSITIONS: dict[Any, tuple[Op, int]] = {
    op.overload: (op, place) for op, place in ((ops.rope_tables, 0), (ops.embedding, 2))
}
"""Which argument of these Ops positions are."""


def read_position_from_length(graph_module: fx.GraphModule) -> Outcome:
    """rope_tables or embedding of a number on the device to which the range (0,) is added -> of that number's view."""
    count = 0
    for node in list(graph_module.graph.nodes):
        if node.target not in _POSITIONS:
            continue
        op, place = _POSITIONS[node.target]
        args = list(op.bind(*node.args, **node.kwargs))
        positions = args[place]
        args[place] = number = None if positions is None else _number(positions)

        def build(*args: Any, op: Op = op, place: int = place, positions: Any = positions) -> Any:
            shape = [1] * value(positions).dim()
            return op(*args[:place], aten.view.default(args[place], shape), *args[place + 1 :])

        if number is not None and insert(graph_module, [node], build, *args) is None:
            count += 1
    return Outcome(count)


def _number(positions: Any) -> fx.Node | None:
    """The number that these positions, one in all, have."""
    while positions.target is aten.unsqueeze.default:
        positions = positions.args[0]
    if positions.target is not aten.add.Tensor:
        return None
    wanted = value(positions)
    one, other, alpha = arguments(positions).values()
    for zero, number in ((one, other), (other, one)):
        found = value(number)
        if alpha == 1 and _is_zero(zero) and isinstance(found, Tensor) and found.dim() == 0:
            return number if (found.dtype, found.device) == (wanted.dtype, wanted.device) else None
    return None


def _is_zero(node: Any) -> bool:
    if not isinstance(node, fx.Node) or node.target not in _RANGES:
        return False
    size = value(node).shape[0]
    return isinstance(size, int) and size == 1 and arguments(node).get("start", 0) == 0
