"""Collectives in captured graphs and in Ops: which groups they are of, and which of them inference has no use for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import fx

if TYPE_CHECKING:
    from burnish.op import Op

_NAMESPACES = ("burnish_parallel", "burnish", "_c10d_functional", "_c10d_functional_autograd")


def group_names(graph: fx.Graph) -> list[str]:
    """The groups whose collectives the graph calls, each once, in the order of their first call."""
    found: dict[str, None] = {}
    for node in graph.nodes:
        if getattr(node.target, "namespace", None) in _NAMESPACES:
            found |= dict.fromkeys(_groups_of(node))
    return list(found)


def _groups_of(node: fx.Node) -> list[str]:
    parameters = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given: dict[str, Any] = dict(zip(parameters, node.args, strict=False)) | node.kwargs
    group = given.get("group_name")
    return [getattr(group, "group_name", group)] if group else []


def has_copies(graph: fx.Graph) -> bool:
    """Whether something in the graph is there for the gradients alone."""
    return any(map(_is_copy, graph.nodes))


def drop_copies(graph_module: fx.GraphModule) -> None:
    """Leaves out, in place, what is there for the gradients alone."""
    for node in list(filter(_is_copy, graph_module.graph.nodes)):
        node.replace_all_uses_with(node.args[0])
        graph_module.graph.erase_node(node)
    graph_module.recompile()


def is_all_reduce(node: fx.Node) -> bool:
    """Whether it sums a tensor over the ranks."""
    return str(node.target) == "burnish_parallel.all_reduce.default"


def group_of_call(op: Op, args: Sequence[Any]) -> str:
    """The group with whose other ranks an Op exchanges something in this call, with every argument given; "" for
    none. All of them run such a call, or none does."""
    names = list(op.signature.parameters)
    group: str = args[names.index("group_name")] if "group_name" in names else ""
    return group


def _is_copy(node: fx.Node) -> bool:
    return str(node.target) == "burnish_parallel.copy_to_region.default"
