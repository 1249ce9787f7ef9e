"""Find a pattern anywhere in a module's tree, whether or not the whole module can be traced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import fx, nn

from burnish.graph.matcher import Guard, Match, PatternLike, find_matches
from burnish.graph.prepare import Pattern

__all__ = ["Blocked", "Found", "Trace", "find_in_module", "trace_symbolically"]

_PARENT = "parent_module"  # meta key: path of the module whose forward made the call


class Found(list[tuple[str, fx.Node]]):
    """One occurrence: for each of its nodes, in graph order, the path of the module that makes the call, and the node.

    match: the Match; root: the path of the module that was traced; graph_module: its graph, in which the nodes live
    """

    def __init__(self, match: Match, root: str, graph_module: fx.GraphModule) -> None:
        super().__init__((_join(root, node.meta[_PARENT]), node) for node in match.nodes)
        self.match = match
        self.root = root
        self.graph_module = graph_module


class Blocked(Exception):
    """Raised by a `Trace`: `module`, at the root or inside of it, is where tracing ended."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(type(module).__name__)
        self.module = module


Trace = Callable[[nn.Module, set[int]], fx.GraphModule]
"""Makes the graph of a module, in which those with these identities stay whole; `Blocked` where it cannot."""


def trace_symbolically(root: nn.Module, whole: set[int]) -> fx.GraphModule:
    """A `Trace` that inlines all submodules but those of `torch.nn`."""
    tracer = _Tracer(whole)
    try:
        graph = tracer.trace(root)
    except Exception as error:  # forward code may fail on proxies in any way
        raise Blocked(tracer.stack[-1] if tracer.stack else root) from error
    return fx.GraphModule(tracer.root, graph)


def find_in_module(
    root: nn.Module, pattern: PatternLike, *, guard: Guard | None = None, trace: Trace = trace_symbolically
) -> list[Found]:
    """Every occurrence of a pattern in `root`, however deep, in order of computation; `root` is not changed.

    `root` is traced symbolically, its submodules (but those of `torch.nn`) inlined, so that a pattern matches the same
    in a child as at the root. What cannot be traced is left whole there, and its children are searched on their own.

    trace: makes graphs that have the meta key `parent_module` on every node.
    """
    if not isinstance(root, nn.Module):
        raise TypeError(f"root must be a module, got {type(root).__name__}")
    return list(_search(root, "", Pattern.of(pattern), guard, trace, set()))


def _search(
    root: nn.Module, path: str, pattern: Pattern, guard: Guard | None, trace: Trace, seen: set[int]
) -> Iterator[Found]:
    if id(root) in seen:  # a module that is used in two places is searched once
        return
    seen.add(id(root))
    opaque: set[int] = set()
    while True:
        try:
            gm = trace(root, opaque)
            break
        except Blocked as blocked:  # the innermost module at fault is left whole
            if blocked.module is root or id(blocked.module) in opaque:
                for name, child in root.named_children():
                    yield from _search(child, _join(path, name), pattern, guard, trace, seen)
                return
            opaque.add(id(blocked.module))
    graph = gm.graph
    position = {node: i for i, node in enumerate(graph.nodes)}
    parts: list[tuple[int, Any]] = [(position[m.anchor], m) for m in find_matches(gm, pattern, guard=guard)]
    parts += [
        (position[n], n) for n in graph.nodes if n.op == "call_module" and id(gm.get_submodule(str(n.target))) in opaque
    ]
    for _, part in sorted(parts, key=lambda item: item[0]):
        if isinstance(part, Match):
            yield Found(part, path, gm)
            continue
        target = str(part.target)
        for name, child in gm.get_submodule(target).named_children():
            yield from _search(child, _join(path, f"{target}.{name}"), pattern, guard, trace, seen)


class _Tracer(fx.Tracer):
    """Inlines what can be traced, and notes on every node whose forward it came from."""

    def __init__(self, opaque: set[int]) -> None:
        super().__init__()
        self.opaque = opaque
        self.stack: list[nn.Module] = []
        self.paths: list[str] = [""]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return id(m) in self.opaque or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        self.stack.append(m)
        self.paths.append(path)
        result = super().call_module(m, forward, args, kwargs)  # on an error the stack shows where it happened
        self.stack.pop()
        self.paths.pop()
        return result

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta[_PARENT] = self.paths[-1]
        return node


def _join(parent: str, name: str) -> str:
    return f"{parent}.{name}" if parent and name else parent or name
