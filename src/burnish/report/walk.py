"""A captured graph, run node by node with somebody looking on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx
from torch.fx.node import map_arg

from burnish.graph.values import attribute_of

Visit = Callable[[fx.Node, Callable[..., Any], Any, Any], Any]
"""Runs a node, `function(*args, **kwargs)`, and returns what it gave."""


class Walk:
    """The calls of a graph in order; each value is let go after its last use, as the model lets go of it.

    Args:
        functions: what to call instead of a node's own target.
        weight: what stands for each weight of the graph; the weight itself unless given.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        functions: Mapping[fx.Node, Callable[..., Any]] | None = None,
        weight: Callable[[Tensor], Any] = lambda tensor: tensor,
    ) -> None:
        self.graph_module = graph_module
        self._functions = functions or {}
        self._weight = weight
        last = {source: node for node in graph_module.graph.nodes for source in node.all_input_nodes}
        self._done: dict[fx.Node, list[fx.Node]] = {}
        for source, node in last.items():
            self._done.setdefault(node, []).append(source)

    def __call__(
        self, leaves: Sequence[Any], visit: Visit, done: Callable[[fx.Node], None] = lambda node: None
    ) -> list[Any]:
        """The flat outputs for the flat inputs `leaves`. `done` is told of each node after its visit, when what it was
        the last to read is gone."""
        values: dict[fx.Node, Any] = {}
        supplied = iter(leaves)
        for node in self.graph_module.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(supplied)
            elif node.op == "get_attr":
                values[node] = self._weight(attribute_of(self.graph_module, str(node.target)))
            elif node.op == "output":
                return list(map_arg(node.args[0], values.__getitem__))
            else:
                args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = visit(node, self._functions.get(node, node.target), args, kwargs)
                del args, kwargs
            for source in self._done.get(node, ()):
                del values[source]
            done(node)
        raise AssertionError("a graph ends with its output")
