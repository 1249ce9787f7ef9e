"""A graph's nodes by operation, so that a search starts where it can succeed."""

from __future__ import annotations

from collections.abc import Hashable

from torch import fx

from burnish.graph.leaves import is_leaf_call
from burnish.graph.normalize import Call, canonical, operation_key


class GraphIndex:
    """A graph's nodes by operation, with positions; the calls are brought into their one spelling when first asked for.

    Valid until the graph changes. Building one is linear and cheap; share one among searches of an unchanged graph.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.position: dict[fx.Node, int] = {}
        self.by_key: dict[Hashable, list[fx.Node]] = {}
        self.modules: list[fx.Node] = []
        self.keys: dict[fx.Node, Hashable] = {}
        self._calls: dict[fx.Node, Call] = {}
        for i, node in enumerate(gm.graph.nodes):
            self.position[node] = i
            if node.op in ("placeholder", "get_attr", "output"):
                continue
            key = operation_key(node, gm)
            self.keys[node] = key
            self.by_key.setdefault(key, []).append(node)
            if node.op == "call_module":
                self.modules.append(node)

    def call(self, node: fx.Node) -> Call:
        if node not in self._calls:
            self._calls[node] = canonical(node, self.gm)
        return self._calls[node]

    def candidates(self, wanted: fx.Node, pattern: fx.GraphModule) -> list[fx.Node]:
        """The graph's nodes, in graph order, whose operation is that of the pattern's node `wanted`."""
        if is_leaf_call(wanted):
            return self.modules
        return self.by_key.get(operation_key(wanted, pattern), [])
