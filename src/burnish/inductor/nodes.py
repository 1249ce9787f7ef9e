"""New nodes in graphs for Inductor, which reads of each node what its result is like."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import map_arg


def call(target: Callable[..., Any], *args: Any) -> fx.Node:
    """A new node, at the graph's point of insertion, with what its result is like."""
    graph = next(a.graph for a in args if isinstance(a, fx.Node))
    node = graph.call_function(target, args)
    values = [value_of(a) for a in args]
    fake_mode = next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)
    if fake_mode is None:
        node.meta["val"] = target(*values)
    else:
        with fake_mode:
            node.meta["val"] = target(*values)
    return node


def value_of(arg: Any) -> Any:
    """What an argument of a node is like: of nodes, also those in lists, their results, and all else as it is."""
    return map_arg(arg, lambda node: node.meta["val"])


def needing(node: fx.Node, last: fx.Node) -> list[fx.Node] | None:
    """The nodes between the two, in order, that need the first; None where `last` does, or where one of them draws
    random numbers, writes to something or the like, and so has to stay where it is."""
    found: list[fx.Node] = []
    behind, user = {node}, node.next
    while user is not last:
        if not behind.isdisjoint(user.all_input_nodes):
            if user.op != "call_function" or user.is_impure():
                return None
            behind.add(user)
            found.append(user)
        user = user.next
    return None if not behind.isdisjoint(last.all_input_nodes) else found


def move_behind(node: fx.Node, moved: Sequence[fx.Node]) -> None:
    """Moves nodes, in their order, right behind the first."""
    for each in moved:
        node.append(each)
        node = each
