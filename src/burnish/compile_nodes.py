"""New nodes in graphs for Inductor, which reads of each node what its result is like."""

from __future__ import annotations

from collections.abc import Callable
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
