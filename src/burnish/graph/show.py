"""A graph for people: as a table of its nodes and modules, and (`draw`) as a picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate

from burnish._text import plain
from burnish.graph.draw import draw

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["GraphReport", "NodeRow", "describe_value", "draw", "graph_report"]


@dataclass(frozen=True)
class NodeRow:
    """One node as text; `value` is "float32[2, 8]" where the graph knows it, else empty."""

    opcode: str
    name: str
    target: str
    args: str
    kwargs: str
    value: str


@dataclass(frozen=True)
class GraphReport:
    """A graph's nodes in order of computation, and the modules that they call (path -> module). Print it."""

    nodes: tuple[NodeRow, ...]
    modules: dict[str, nn.Module]

    def tables(self) -> list[RenderableType]:
        """The two tables as rich renderables; columns that would be empty are left out."""
        from rich.table import Table  # here, not above: `import burnish` need not wait for rich
        from rich.text import Text

        titles = ("opcode", "name", "target", "args", "kwargs", "value")
        columns = [t for t in titles if t not in ("kwargs", "value") or any(getattr(row, t) for row in self.nodes)]
        graph = Table(title="Nodes", title_justify="left", box=None, header_style="bold", pad_edge=False)
        for column in columns:
            graph.add_column(column, overflow="fold", min_width=40 if column == "args" else None)
        for row in self.nodes:
            graph.add_row(*(Text(getattr(row, column)) for column in columns))
        if not self.modules:
            return [graph]
        used = Table(title="\nUsed modules", title_justify="left", box=None, header_style="bold", pad_edge=False)
        used.add_column("name", overflow="fold")
        used.add_column("module", overflow="fold")
        for name, module in self.modules.items():
            used.add_row(Text(name), Text(repr(module)))
        return [graph, used]

    def __rich__(self) -> RenderableType:
        from rich.console import Group

        return Group(*self.tables())

    def __str__(self) -> str:
        return plain(*self.tables(), width=160)


def graph_report(gm: fx.GraphModule) -> GraphReport:
    """Every node of `gm` with operation, arguments and (where known) dtype and shape, and the modules that it calls."""
    if not isinstance(gm, fx.GraphModule):
        raise TypeError(f"gm must be a torch.fx.GraphModule (see burnish.graph.trace), got {type(gm).__name__}")
    rows = []
    modules: dict[str, nn.Module] = {}
    for node in gm.graph.nodes:
        if node.op == "call_module":
            modules[str(node.target)] = gm.get_submodule(str(node.target))
        call: Any = map_aggregate((node.args, node.kwargs), _plain)
        args, kwargs = call
        rows.append(
            NodeRow(
                opcode=node.op,
                name=node.name,
                target=_target(node),
                args=str(args) if args else "",
                kwargs=", ".join(f"{k}={v}" for k, v in kwargs.items()),
                value=describe_value(node.meta.get("val")),
            )
        )
    return GraphReport(tuple(rows), modules)


class _Name(str):
    """A node's name inside printed arguments, without quotes."""

    def __repr__(self) -> str:
        return str(self)


def _plain(arg: Any) -> Any:
    return _Name(arg) if isinstance(arg, (fx.Node, torch.dtype, torch.device)) else arg


def _target(node: fx.Node) -> str:
    if isinstance(node.target, str):
        return node.target
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    module = getattr(node.target, "__module__", None) or ""
    name = getattr(node.target, "__name__", str(node.target))
    return f"{module.removeprefix('_')}.{name}" if module else name


def describe_value(value: Any) -> str:
    """ "float32[2, s0, 8]" for a tensor, the expression for a symbolic number, "" for nothing."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(describe_value(v) for v in value)})"
    return "" if value is None else str(value)
