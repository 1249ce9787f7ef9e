"""`torch.no_grad()` within a model, spelled out: a detach of what leaves it.

So a rewrite over its border moves nothing out of it or into it, and what is computed on both sides is computed once.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from burnish.graph.regions import inline_region

aten = torch.ops.aten


def stop_gradients(graph_module: fx.GraphModule) -> None:
    """In a graph that switches gradients off and on, in place. Nothing is done where they are off to begin with."""
    enabled = torch.is_grad_enabled()
    if not enabled:
        return
    switches: list[fx.Node] = []
    within: set[fx.Node] = set()
    for node in graph_module.graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            switches.append(node)
            enabled = bool(node.args[0])
        elif node.target is operator.getitem:  # wherever it stands
            within |= {node} if node.args[0] in within else set()
        elif node.op == "call_function" and not enabled:
            within.add(node)
    for node in within:
        outside = [user for user in node.users if user not in within]
        stopped = _detached(node) if outside else node
        for user in outside:
            user.replace_input_with(node, stopped)
    for node in switches:
        graph_module.graph.erase_node(node)
    graph_module.recompile()


def inline_regions_without_gradients(graph_module: fx.GraphModule) -> None:
    """What `torch.export` made graphs of their own of, because they run with gradients off or on, in place."""
    for node in graph_module.graph.find_nodes(
        op="call_function", target=torch.ops.higher_order.wrap_with_set_grad_enabled
    ):
        enabled, inner, *given = node.args
        assert isinstance(inner, fx.Node)
        inline_regions_without_gradients(graph_module.get_submodule(str(inner.target)))  # type: ignore[arg-type]
        inline_region(graph_module, node, inner, given, result=None if enabled else _stopped)
    graph_module.recompile()


def _stopped(value: Any, use: fx.Node) -> Any:
    return _detached(value, use.meta.get("val")) if isinstance(value, fx.Node) else value


def _detached(node: fx.Node, value: Any = None) -> fx.Node:
    """The node, or a detach of it, where it may need gradients: by its `val`, or one like it."""
    value = node.meta.get("val", value)
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
        return node
    with node.graph.inserting_after(node):
        stopped = node.graph.call_function(aten.detach.default, (node,))
    stopped.meta |= node.meta
    return stopped
