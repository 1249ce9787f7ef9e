"""Regions of a graph that `torch.export` made graphs of their own of, because they run with gradients off or under
another autocast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx, nn


def inline_region(
    gm: fx.GraphModule,
    node: fx.Node,
    inner: fx.Node,
    given: Sequence[Any],
    *,
    before: fx.Node | None = None,
    result: Callable[[Any, fx.Node], Any] | None = None,
) -> None:
    """Put a region's nodes into the graph in the place of the node that runs it, with the modules that they name.

    Args:
        gm: the graph with the node, which is erased.
        inner: the node that names the region, a graph module in `gm`.
        given: what the region's placeholders stand for.
        before: the node to put them before, by default `node`.
        result: makes of a value of the region and its use outside what replaces that use; by default the value.
    """
    region = gm.get_submodule(str(inner.target))
    assert isinstance(region, fx.GraphModule)
    copied: dict[fx.Node, Any] = dict(zip(region.graph.find_nodes(op="placeholder"), given, strict=True))
    with gm.graph.inserting_before(before or node):
        for named in region.graph.find_nodes(op="get_attr"):
            copied[named] = gm.graph.get_attr(_bring(region, str(named.target), gm))
            copied[named].meta |= named.meta
        outputs: Any = gm.graph.graph_copy(region.graph, copied)
    several = isinstance(outputs, tuple | list)
    for use in list(node.users) if several else [node]:
        value: Any = outputs[use.args[1]] if several else outputs
        use.replace_all_uses_with(result(value, use) if result else value)
        if use is not node:
            gm.graph.erase_node(use)
    gm.graph.erase_node(node)
    if not inner.users:
        gm.graph.erase_node(inner)
        gm.delete_submodule(str(inner.target))


def _bring(region: nn.Module, path: str, gm: nn.Module) -> str:
    """Give `gm` what the region has at a path, and return its name there."""
    value: Any = region
    for part in path.split("."):
        value = getattr(value, part)
    name = stem = path.replace(".", "_")
    number = 0
    while getattr(gm, name, value) is not value:
        number += 1
        name = f"{stem}_{number}"
    setattr(gm, name, value)
    return name
